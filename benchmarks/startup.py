"""Seconds from a new process to the first token, with a warm kernel cache and a cold one.

    python benchmarks/startup.py benchmarks/configs/qwen3-0.6b [--device cuda] [--json out.json]

Each run is a process of its own: interpreter, imports, random weights, memory, graphs, one token. Cold is with empty
folders for the compilers' caches. Also the time of `import octavo` alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FIRST_TOKEN = """
import json, sys, time
marks = {"interpreter": time.time()}
import torch
marks["import torch"] = time.time()
from octavo import LLM, SamplingParams
marks["import octavo"] = time.time()
if sys.argv[2] == "cuda":
    torch.zeros(1, device="cuda")
marks["CUDA context"] = time.time()
llm = LLM(sys.argv[1], load_format="dummy", skip_tokenizer_init=True, device=sys.argv[2], max_model_len=4096)
marks["engine"] = time.time()
llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1), use_tqdm=False)
marks["first token"] = time.time()
print(json.dumps(marks))
"""
CACHES = ("TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "NUMBA_CACHE_DIR")


def first_token(directory: str, device: str, environment: dict[str, str]) -> dict[str, float]:
    """Seconds of each phase, and in all."""
    start = time.time()
    process = subprocess.run(
        [sys.executable, "-c", FIRST_TOKEN, directory, device],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    marks = json.loads(process.stdout.splitlines()[-1])
    phases, last = {}, start
    for name, at in marks.items():
        phases[name] = round(at - last, 2)
        last = at
    return {**phases, "total": round(last - start, 2)}


def import_seconds() -> float:
    """Of `import octavo` in a new interpreter, less the interpreter's own start; the best of three."""

    def run(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    return round(min(run("import octavo") for _ in range(3)) - min(run("pass") for _ in range(3)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="holds a config.json")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"model": Path(arguments.directory).name, "import_octavo_s": import_seconds()}
    with tempfile.TemporaryDirectory() as empty:
        caches = {name: str(Path(empty) / name) for name in CACHES}
        for run in ("cold", "warm"):
            results[run] = first_token(arguments.directory, arguments.device, caches)
            print(run, json.dumps(results[run]), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
