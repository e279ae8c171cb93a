"""Our engine on the CPU beside llama.cpp (xllamacpp) and OpenVINO GenAI: same model file, same token ids, same machine.

    python benchmarks/engine_cpu.py --peer-python /path/to/venv/with/peers/bin/python [--json out.json]

Each engine lives in its own process (peers run under `--peer-python`, where `pip install xllamacpp openvino-genai`
was done), is loaded once and then asked in alternation, so that a busy moment of the machine hits all of them; the
others are stopped meanwhile (an idle OpenVINO costs llama.cpp half its speed). Every repeat has fresh random prompts,
so no engine finds one in its prefix cache; all decode greedily and never stop early. Rates in tokens/s:

    prefill-512    one prompt of 512 tokens, 1 token out:                 512 / t
    stream-empty   one prompt of 1 token, 128 out:                        127 / (t − t(1 out))
    stream-512     one prompt of 512 tokens, 64 out:                      63 / (t − t(1 out))
    batch-8, -32   8 or 32 prompts of 64 tokens, 64 out each:             63 · n / (t − t(1 out))
    mixed          64 prompts of 32–512 tokens, 32–256 out, half of them share their first 256 tokens: all out / t
"""

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

VOCAB = (1000, 40000)  # ordinary tokens of the default model
CONTEXT = 1024
SLOTS = 32


class Engine(Protocol):
    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[int]:
        """Decodes greedily without stopping; how many tokens came of each prompt."""


class Octavo:
    def __init__(self, model: str | None, threads: int) -> None:
        import torch

        from octavo import LLM

        torch.set_num_threads(threads)
        options: dict[str, Any] = {} if model is None else {"model": model}
        self._llm = LLM(max_model_len=CONTEXT, **options)

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[int]:
        from octavo import SamplingParams

        params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in max_tokens]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [len(o.outputs[0].token_ids) for o in outputs]


class LlamaCpp:
    def __init__(self, model: str, threads: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = model
        params.n_parallel = SLOTS
        params.n_ctx = SLOTS * CONTEXT
        params.kv_unified = False  # unified, each slot's attention walks over what the others left in the cache
        params.cache_ram_mib = 0  # no saving of idle slots' state between requests
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity = -1
        self._server = xllamacpp.Server(params)

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[int]:
        counts = [0] * len(prompts)

        def ask(i: int) -> None:
            request = {"prompt": prompts[i], "n_predict": max_tokens[i], "temperature": 0.0, "ignore_eos": True}
            counts[i] = self._server.handle_completions(request)["usage"]["completion_tokens"]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        return counts


class OpenVino:
    def __init__(self, model: str, threads: int, **properties: Any) -> None:
        import numpy as np
        import openvino
        import openvino_genai

        self._genai, self._tensor, self._int64 = openvino_genai, openvino.Tensor, np.int64
        self._array = np.array
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB
        scheduler.enable_prefix_caching = True
        scheduler.max_num_batched_tokens = 512
        options = {"INFERENCE_NUM_THREADS": threads} | properties
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", options)

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[int]:
        configs = [
            self._genai.GenerationConfig(max_new_tokens=n, min_new_tokens=n, ignore_eos=True, do_sample=False)
            for n in max_tokens
        ]
        ids = [self._tensor(self._array([p], dtype=self._int64)) for p in prompts]
        return [len(r.m_generation_ids[0]) for r in self._pipeline.generate(ids, configs)]


ENGINES = ("octavo", "llama.cpp", "openvino", "openvino-f32")


def make_engine(name: str, model: str | None, threads: int) -> Engine:
    if name == "octavo":
        return Octavo(model, threads)
    assert model is not None
    if name == "llama.cpp":
        return LlamaCpp(model, threads)
    return OpenVino(model, threads, **({"INFERENCE_PRECISION_HINT": "f32"} if name == "openvino-f32" else {}))


def serve(name: str, model: str | None, threads: int) -> None:
    """The worker: one JSON request a line on stdin, one answer a line on what was stdout (engines log to stderr)."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    start = time.perf_counter()
    engine = make_engine(name, model, threads)
    print(json.dumps({"seconds": time.perf_counter() - start}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        counts = engine.generate(request["prompts"], request["max_tokens"])
        seconds = time.perf_counter() - start
        if counts != request["max_tokens"]:
            raise RuntimeError(f"{name}: expected {request['max_tokens']} tokens, got {counts}")
        print(json.dumps({"seconds": seconds}), file=answers)


class Worker:
    """An engine in its own process."""

    def __init__(self, name: str, python: str, model: str | None, threads: int) -> None:
        command = [python, __file__, "--worker", name, "--threads", str(threads)]
        command += [] if model is None else ["--model", model]
        self.name = name
        self._log = open(os.devnull, "w")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.load_seconds = self._answer()
        self._process.send_signal(signal.SIGSTOP)

    def seconds(self, prompts: list[list[int]], max_tokens: list[int]) -> float:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def _answer(self) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} stopped; run `--worker {self.name}` by hand to see why")
        return float(json.loads(line)["seconds"])


@dataclass(frozen=True)
class Decode:
    """`batch` prompts of `prompt` tokens, `output` tokens each; the rate of all tokens after the first ones."""

    batch: int
    prompt: int
    output: int

    def rate(self, worker: Worker, rng: random.Random) -> float:
        first = worker.seconds([tokens(rng, self.prompt) for _ in range(self.batch)], [1] * self.batch)
        whole = worker.seconds([tokens(rng, self.prompt) for _ in range(self.batch)], [self.output] * self.batch)
        return self.batch * (self.output - 1) / (whole - first)


@dataclass(frozen=True)
class Prefill:
    prompt: int

    def rate(self, worker: Worker, rng: random.Random) -> float:
        return self.prompt / worker.seconds([tokens(rng, self.prompt)], [1])


@dataclass(frozen=True)
class Mixed:
    requests: int
    shared: int

    def rate(self, worker: Worker, rng: random.Random) -> float:
        prefix = tokens(rng, self.shared)
        prompts = []
        for i in range(self.requests):
            length = rng.randint(32, 512)
            if i % 2 == 0:
                prompts.append(prefix + tokens(rng, max(1, length - self.shared)))
            else:
                prompts.append(tokens(rng, length))
        outputs = [rng.randint(32, 256) for _ in prompts]
        return sum(outputs) / worker.seconds(prompts, outputs)


WORKLOADS: dict[str, Prefill | Decode | Mixed] = {
    "prefill-512": Prefill(512),
    "stream-empty": Decode(1, 1, 128),
    "stream-512": Decode(1, 512, 64),
    "batch-8": Decode(8, 64, 64),
    "batch-32": Decode(32, 64, 64),
    "mixed": Mixed(64, 256),
}


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(*VOCAB) for _ in range(count)]


def measure(workers: Sequence[Worker], names: Sequence[str], repeats: int) -> dict[str, dict[str, float]]:
    """The median rate of each workload and engine. One unmeasured round first; the mixed workload runs once."""
    rates: dict[str, dict[str, float]] = {}
    for name in names:
        workload = WORKLOADS[name]
        rounds = 1 if isinstance(workload, Mixed) else repeats + 1
        seen: dict[str, list[float]] = {w.name: [] for w in workers}
        for i in range(rounds):
            for worker in workers:  # the same seed for each engine: the same tokens
                seen[worker.name].append(workload.rate(worker, random.Random(f"{name} {i}")))
        rates[name] = {engine: statistics.median(r[1:] or r) for engine, r in seen.items()}
        print(row(name, rates[name]), flush=True)
    return rates


def row(name: str, rates: dict[str, float]) -> str:
    cells = " | ".join(f"{rate:.0f}" for rate in rates.values())
    peers = [rate for engine, rate in rates.items() if engine != "octavo"]
    ratio = f"{rates['octavo'] / max(peers):.2f}×" if "octavo" in rates and peers else "–"
    return f"| {name} | {cells} | {ratio} |"


def default_model() -> str:
    from octavo.models import default_model_path

    return str(default_model_path())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a GGUF file; the default model when absent")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="interpreter that has xllamacpp and openvino-genai"
    )
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="write the rates to this file")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(args.worker, args.model, args.threads)
        return
    model = args.model or default_model()
    names = args.engines.split(",")
    workers: list[Worker] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no stopped worker is left behind
    try:
        for n in names:
            workers.append(Worker(n, sys.executable if n == "octavo" else args.peer_python, model, args.threads))
        print(
            f"{platform.processor() or platform.machine()}, {args.threads} threads; {os.path.basename(model)}; tokens/s"
        )
        print("loaded in: " + ", ".join(f"{w.name} {w.load_seconds:.1f} s" for w in workers))
        print(f"| workload | {' | '.join(names)} | octavo / best peer |\n|{'---|' * (len(names) + 2)}")
        rates = measure(workers, args.workloads.split(","), args.repeats)
    finally:
        for worker in workers:
            worker.close()
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"threads": args.threads, "model": os.path.basename(model), "rates": rates}, file, indent=1)


if __name__ == "__main__":
    main()
