"""From a file to a model: each part of loading the default model, beside its peer, and a cold start in a new process.

    python benchmarks/loading.py [--json FILE]

Peers: the `gguf` package's reader and dequantisation. A cold start is a process that imports, loads and computes the
first token of a short chat through a paged cache; kernels are compiled and cached on disk already. Medians, seconds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import gguf
import torch

from octavo.models import default_model_path, load_model
from octavo.models.ggml_dequantize import dequantize
from octavo.models.gguf_file import read_gguf
from octavo.models.gguf_tokenizer import tokenizer_from_gguf

COLD_START = """
import time; start = time.perf_counter()
import torch
from octavo.models import default_model_path, load_model
imported = time.perf_counter()
loaded = load_model(default_model_path(), progress=False)
ready = time.perf_counter()
from octavo.nn import make_caches
text = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
ids = loaded.tokenizer.encode(text, add_special_tokens=False)
with torch.inference_mode():
    rows, caches = make_caches(loaded.model, 1, 256, dtype=torch.float32, device="cpu")
    step = rows.append(len(ids))
    hidden = loaded.model(torch.tensor(ids), step.positions, caches, step.metadata)
    int(loaded.model.compute_logits(hidden[-1:]).argmax())
print(imported - start, ready - imported, time.perf_counter() - ready)
"""


def median(function: Callable[[], object], repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def cold_start() -> list[float]:
    output = subprocess.run([sys.executable, "-c", COLD_START], check=True, capture_output=True, text=True).stdout
    return [float(part) for part in output.split()]


def measure() -> dict[str, float]:
    path = default_model_path()
    file, reader = read_gguf(path), gguf.GGUFReader(path)
    results = {
        "read header": median(lambda: read_gguf(path)),
        "read header, gguf package": median(lambda: gguf.GGUFReader(path), 3),
        "tokenizer": median(lambda: tokenizer_from_gguf(file.metadata)),
        "dequantise all": median(
            lambda: [dequantize(torch.from_numpy(t.data), t.type) for t in file.tensors.values()], 3
        ),
        "dequantise all, gguf package": median(
            lambda: [gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors], 1
        ),
        "load, kept quantised": median(lambda: load_model(path, progress=False), 3),
        "load, unpacked": median(lambda: load_model(path, keep_quantized=False, progress=False), 3),
    }
    runs = sorted((cold_start() for _ in range(3)), key=sum)
    parts = ("imports", "load", "first token")
    return results | {f"cold start: {part}": value for part, value in zip(parts, runs[1], strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results to this file too")
    arguments = parser.parse_args()
    results = measure()
    for name, seconds in results.items():
        peer = results.get(f"{name}, gguf package")
        print(
            f"{name:<34} {seconds:8.3f} s" + (f"   {peer / seconds:5.1f}× as fast as the gguf package" if peer else "")
        )
    total = sum(seconds for name, seconds in results.items() if name.startswith("cold start"))
    print(f"{'cold start to the first token':<34} {total:8.3f} s")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
