"""The engine on a GPU: a batch of 256 requests, then one alone; beside vLLM where it can be imported.

    python benchmarks/engine.py benchmarks/configs/qwen3-0.6b [--engine octavo vllm] [--seqs 256] [--json out.json]

Random weights from a config.json, drawn as vLLM's load_format="dummy" draws them (uniform within ±0.001, norms too), so
that both engines do the same work: a mixture of experts routes almost all tokens to the same few experts then, and most
expert weights are never read. `--weights normal` (std 0.02, norms 1) routes to all.

256 requests of 100 to 1024 prompt tokens and 100 to 1024 output tokens (seed 0), temperature 0.6, no end token, no
prefix cache; twice, since the first run may still compile. Then one request of 128 tokens in, 256 out, greedy.
`--profile FILE` adds the share of the time in which the GPU is busy, over 100 steps of the batch, from torch's
profiler, the kernels that take it, and a timeline that Perfetto and chrome://tracing show.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

Workload = list[tuple[list[int], int]]  # prompt, tokens to produce


def make_workload(num_seqs: int) -> Workload:
    """In the order of draws of vLLM's offline workload that ANCHORS measured: all prompts, then all lengths."""
    rng = Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(num_seqs)]
    return [(prompt, rng.randint(100, 1024)) for prompt in prompts]


def make_single() -> Workload:
    rng = Random(1)
    return [([rng.randint(0, 10000) for _ in range(128)], 256)]


class Octavo:
    """Our engine, with a clock around what a step does on the host."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch

        from octavo import LLM

        self.llm = LLM(
            arguments.directory,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=4096,
            max_num_seqs=arguments.seqs,
            enable_prefix_caching=False,
            kv_cache_memory=arguments.kv_cache_memory,
            device="cuda",
        )
        if arguments.weights == "uniform":
            with torch.inference_mode():
                for parameter in self.llm.engine.model.parameters():
                    parameter.uniform_(-1e-3, 1e-3)
        self._watch()

    def _watch(self) -> None:
        """Times each step, and within it the wait for the device: what remains is the host's work."""
        from octavo.engine.model_runner import StepInFlight

        self.steps: list[tuple[int, float, float]] = []  # sequences in flight, seconds of the step, and of its wait
        waited = [0.0]
        wait, step = StepInFlight.wait, self.llm.engine.step

        def timed_wait(flight: Any) -> Any:
            start = time.perf_counter()
            try:
                return wait(flight)
            finally:
                waited[0] += time.perf_counter() - start

        def timed_step() -> Any:
            waited[0], start = 0.0, time.perf_counter()
            outputs = step()
            flights = self.llm.engine.scheduler.in_flight
            rows = len(flights[-1].scheduled) if flights else 0
            self.steps.append((rows, time.perf_counter() - start, waited[0]))
            return outputs

        StepInFlight.wait = timed_wait  # type: ignore[method-assign]
        self.llm.engine.step = timed_step  # type: ignore[method-assign]

    def run(self, workload: Workload, temperature: float) -> None:
        from octavo import SamplingParams

        params = [
            SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=length, detokenize=False)
            for _, length in workload
        ]
        outputs = self.llm.generate([prompt for prompt, _ in workload], params, use_tqdm=False)
        assert [len(o.outputs[0].token_ids) for o in outputs] == [length for _, length in workload]

    def host_work(self, at_least: int) -> dict[str, float]:
        """Microseconds of the host per step that has `at_least` sequences, without its waiting: median and 99th
        percentile; and the share of the time in which it waited, so that the device was never short of work."""
        chosen = [(step - waited, waited > 20e-6) for rows, step, waited in self.steps if rows >= at_least]
        if len(chosen) < 2:
            return {}
        work = sorted(seconds for seconds, _ in chosen)
        return {
            "host_us_median": round(statistics.median(work) * 1e6),
            "host_us_p99": round(work[int(len(work) * 0.99)] * 1e6),
            "steps_that_waited": round(sum(waits for _, waits in chosen) / len(chosen), 4),
        }

    def profile(self, workload: Workload, path: Path) -> dict[str, Any]:
        """The GPU's busy share over 100 steps in the middle of the batch, and the ten kernels that take most."""
        from torch.profiler import ProfilerActivity, profile

        from octavo import SamplingParams

        engine = self.llm.engine
        for i, (prompt, length) in enumerate(workload):
            params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=length, detokenize=False)
            engine.add_request(f"profiled-{i}", prompt, params)
        for _ in range(80):
            engine.step()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(100):
                engine.step()
        for i in range(len(workload)):
            engine.abort(f"profiled-{i}")
        while engine.has_unfinished():
            engine.step()
        profiler.export_chrome_trace(str(path))
        return read_timeline(path)


def read_timeline(path: Path) -> dict[str, Any]:
    """Busy share of the device between its first and last event, and the kernels by their time."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") in kinds]
    events.sort(key=lambda e: e["ts"])
    busy, end, by_name = 0.0, events[0]["ts"], {}
    for e in events:
        busy += max(0.0, e["ts"] + e["dur"] - max(end, e["ts"]))
        end = max(end, e["ts"] + e["dur"])
        total, count = by_name.get(e["name"], (0.0, 0))
        by_name[e["name"]] = total + e["dur"], count + 1
    span = end - events[0]["ts"]
    top = sorted(by_name.items(), key=lambda item: -item[1][0])[:25]
    return {
        "gpu_busy": round(busy / span, 4),
        "span_ms": round(span / 1e3, 2),
        "kernels": [
            {"name": name[:90], "share": round(total / busy, 4), "count": count, "us": round(total / count, 2)}
            for name, (total, count) in top
        ],
    }


class VLLM:
    """vLLM, as ANCHORS measured it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from vllm import LLM

        if arguments.weights != "uniform":
            raise ValueError("--weights: vLLM's random weights are uniform")
        self.llm = LLM(
            arguments.directory,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=4096,
            max_num_seqs=arguments.seqs,
            gpu_memory_utilization=0.9,
            kv_cache_memory_bytes=arguments.kv_cache_memory,
            enable_prefix_caching=False,
        )

    def run(self, workload: Workload, temperature: float) -> None:
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=length, detokenize=False)
            for _, length in workload
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in workload]
        self.llm.generate(prompts, params, use_tqdm=False)


def seconds_of(engine: Octavo | VLLM, workload: Workload, temperature: float) -> float:
    start = time.perf_counter()
    engine.run(workload, temperature)
    return time.perf_counter() - start


def time_to_first_token(engine: Octavo | VLLM, length: int) -> float:
    """Seconds until the one token of a prompt of `length` tokens, median of three fresh prompts."""
    rng = Random(2)
    prompts = [[rng.randint(0, 10000) for _ in range(length)] for _ in range(4)]
    times = [seconds_of(engine, [(prompt, 1)], 0.0) for prompt in prompts]
    return statistics.median(times[1:])


def measure(engine_class: type[Octavo] | type[VLLM], arguments: argparse.Namespace) -> dict[str, Any]:
    workload, single = make_workload(arguments.seqs), make_single()
    start = time.perf_counter()
    engine = engine_class(arguments)
    result: dict[str, Any] = {"engine": engine_class.__name__.lower(), "model": Path(arguments.directory).name}
    result["weights"] = arguments.weights
    result["start_s"] = round(time.perf_counter() - start, 2)
    result["first_generation_s"] = round(seconds_of(engine, [(workload[0][0], 8)], 0.6), 3)
    tokens = sum(length for _, length in workload)
    result["batch_tokens"] = {"in": sum(len(prompt) for prompt, _ in workload), "out": tokens}
    for repetition in ("first", "second")[: arguments.batches]:
        if isinstance(engine, Octavo):
            engine.steps.clear()
        seconds = seconds_of(engine, workload, 0.6)
        result[f"{repetition}_batch"] = {"s": round(seconds, 3), "tokens_per_s": round(tokens / seconds, 1)}
        print(json.dumps(result), flush=True)
    if isinstance(engine, Octavo):
        result["at_full_batch"] = engine.host_work(int(arguments.seqs * 0.9))
        engine.steps.clear()
    seconds_of(engine, single, 0.0)
    result["single_ms_per_token"] = round(min(seconds_of(engine, single, 0.0) for _ in range(3)) / 256 * 1e3, 4)
    result["ttft_of_4000_tokens_ms"] = round(time_to_first_token(engine, 4000) * 1e3, 2)
    if isinstance(engine, Octavo):
        result["alone"] = engine.host_work(1)
        memory = engine.llm.engine.device_memory()
        result["memory"] = None if memory is None else memory.to_dict()
        result["kv_cache_blocks"] = engine.llm.engine.config.num_blocks
        if arguments.profile:
            result["profile"] = engine.profile(workload, Path(arguments.profile))
    print(json.dumps(result), flush=True)
    return result


def environment() -> dict[str, str]:
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {**versions, "gpu": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="holds a config.json")
    parser.add_argument("--engine", nargs="+", choices=["octavo", "vllm"], default=["octavo"])
    parser.add_argument("--weights", choices=["uniform", "normal"], default="uniform")
    parser.add_argument("--seqs", type=int, default=256)
    parser.add_argument("--batches", type=int, choices=[1, 2], default=2, help="how often to run the batch")
    parser.add_argument("--kv-cache-memory", type=int, help="bytes; default what is free")
    parser.add_argument("--profile", help="where to write a timeline")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    results = []
    for name in arguments.engine:
        try:
            results.append(measure({"octavo": Octavo, "vllm": VLLM}[name], arguments))
        except ImportError as error:
            sys.exit(f"--engine {name}: {error}")
    if len(results) == 2:
        last = ("first_batch", "second_batch")[arguments.batches - 1]
        batch, single = (
            [result[last]["tokens_per_s"] for result in results],
            [result["single_ms_per_token"] for result in results],
        )
        print(f"{results[0]['engine']} / {results[1]['engine']}: batch tokens/s {batch[0] / batch[1]:.3f}, ", end="")
        print(f"time per token of one stream {single[0] / single[1]:.3f}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"environment": environment(), "results": results}, indent=2))


if __name__ == "__main__":
    main()
