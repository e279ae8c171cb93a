"""The engine on a GPU: a batch of 256 requests, then one alone; beside vLLM where it can be imported.

    python benchmarks/engine.py benchmarks/configs/qwen3-0.6b [--engine octavo vllm] [--seqs 256] [--json out.json]

Random weights from a config.json, drawn as vLLM's load_format="dummy" draws them (uniform within ±0.001, norms too);
`--weights normal`: std 0.02, norms 1. Router logits of such weights differ by 1e-5. vLLM's softmax over them is in
bf16, where all scores are equal, so that every token has the same experts and most expert weights are never read; ours
is in fp32 and tells them apart. `--routing tied` (the default) sets the routers' weights to 0, which gives both engines
the same work; `--routing spread` leaves them as drawn.

256 requests of 100 to 1024 prompt tokens and 100 to 1024 output tokens (seed 0), temperature 0.6, no end token, no
prefix cache; twice, since the first run may still compile. Then one request of 128 tokens in, 256 out, greedy; the time
to the first token of a prompt that fills the context (8k tokens at most), beside what its matrix products and attention
take; and the gaps between the tokens of 32 streams while such prompts come.
`--profile FILE` adds the share of the time in which the GPU is busy, over 100 steps of the batch, from torch's
profiler, the kernels that take it, and a timeline that Perfetto and chrome://tracing show.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

Workload = list[tuple[list[int], int]]  # prompt, tokens to produce


def make_workload(num_seqs: int) -> Workload:
    """In the order of draws of vLLM's offline workload that ANCHORS measured: all prompts, then all lengths."""
    rng = Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(num_seqs)]
    return [(prompt, rng.randint(100, 1024)) for prompt in prompts]


def make_single() -> Workload:
    rng = Random(1)
    return [([rng.randint(0, 10000) for _ in range(128)], 256)]


def max_model_len(directory: str) -> int:
    """8192, or the model's context if that is less: room for a prompt of 8k tokens."""
    context = json.loads((Path(directory) / "config.json").read_text())["max_position_embeddings"]
    return min(8192, int(context))


class Clock:
    """Seconds by phase since the last `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def watch(self, owner: Any, method: str, phase: str) -> None:
        """Adds what `owner.method` takes to `phase`."""
        original: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **options)
            finally:
                self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        taken, self._seconds = self._seconds, {}
        return taken


class Step(NamedTuple):
    """One step of the engine, in seconds. rows: sequences of the step that it launched."""

    rows: int
    prefills: bool
    seconds: float
    phases: dict[str, float]

    @property
    def host(self) -> float:
        return self.seconds - self.waited

    @property
    def waited(self) -> float:
        return self.phases.get("wait", 0.0)


class Octavo:
    """Our engine, with a clock around what a step does on the host."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch

        from octavo import LLM

        self.llm = LLM(
            arguments.directory,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=max_model_len(arguments.directory),
            max_num_seqs=arguments.seqs,
            enable_prefix_caching=False,
            kv_cache_memory=arguments.kv_cache_memory,
            device=arguments.device,
        )
        if arguments.weights == "uniform":
            with torch.inference_mode():
                for parameter in self.llm.engine.model.parameters():
                    parameter.uniform_(-1e-3, 1e-3)
        if arguments.routing == "tied":
            for module in self.llm.engine.model.modules():
                if type(module).__name__ == "Router":
                    torch.nn.init.zeros_(module.weight)
        self._watch()

    def _watch(self) -> None:
        """Times each step, and within it the wait for the device: what remains is the host's work."""
        from octavo.engine.transfer import Readback

        self.steps: list[Step] = []
        engine, clock = self.llm.engine, Clock()
        scheduler, runner = engine.scheduler, engine.runner
        for owner, method, phase in (
            (scheduler, "schedule", "schedule"),
            (scheduler, "schedule_ahead", "schedule"),
            (runner, "_batch", "build the batch"),
            (runner, "_decode", "launch the graph"),
            (runner.sampler, "draw", "sample"),
            (runner, "launch", "launch in all"),
            (Readback, "_wait_for_device", "wait"),
            (scheduler, "update", "update"),
            (engine, "_record", "record"),
        ):
            clock.watch(owner, method, phase)
        step, launch = engine.step, runner.launch
        launched: list[Any] = []

        def noted_launch(output: Any, *args: Any) -> Any:
            launched.append(output.scheduled)
            return launch(output, *args)

        def timed_step() -> Any:
            clock.take()
            launched.clear()
            start = time.perf_counter()
            outputs = step()
            seconds = time.perf_counter() - start
            scheduled = launched[-1] if launched else ()
            prefills = any(entry.num_new_tokens > 1 for entry in scheduled)
            self.steps.append(Step(len(scheduled), prefills, seconds, clock.take()))
            return outputs

        runner.launch, engine.step = noted_launch, timed_step  # type: ignore[method-assign]

    def run(self, workload: Workload, temperature: float) -> list[list[int]]:
        from octavo import SamplingParams

        params = [
            SamplingParams(temperature=temperature, seed=i, ignore_eos=True, max_tokens=length, detokenize=False)
            for i, (_, length) in enumerate(workload)
        ]
        outputs = self.llm.generate([prompt for prompt, _ in workload], params, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        assert [len(ids) for ids in tokens] == [length for _, length in workload]
        return tokens

    def host_work(self, at_least: int) -> dict[str, Any]:
        """Microseconds of the host per step that decodes `at_least` sequences, without its waiting: median, 99th
        percentile, and means by phase; and the share of steps that waited, so that the device was never short of
        work."""
        chosen = [step for step in self.steps if step.rows >= at_least and not step.prefills]
        if len(chosen) < 2:
            return {}
        host = sorted(step.host for step in chosen)
        phases = {name: 0.0 for step in chosen for name in step.phases}
        for name in phases:
            phases[name] = round(statistics.mean(step.phases.get(name, 0.0) for step in chosen) * 1e6, 1)
        return {
            "steps": len(chosen),
            "host_us_median": round(statistics.median(host) * 1e6),
            "host_us_p99": round(host[int(len(host) * 0.99)] * 1e6),
            "steps_that_waited": round(sum(step.waited > 20e-6 for step in chosen) / len(chosen), 4),
            "mean_us_by_phase": phases,
        }

    def prefill_work(self) -> dict[str, float]:
        """Milliseconds of the steps that compute prompts, and of the host in them."""
        chosen = [step for step in self.steps if step.prefills]
        if not chosen:
            return {}
        return {
            "steps": len(chosen),
            "ms_mean": round(statistics.mean(step.seconds for step in chosen) * 1e3, 2),
            "host_ms_mean": round(statistics.mean(step.host for step in chosen) * 1e3, 2),
        }

    def token_gaps(self, length: int) -> dict[str, float]:
        """Milliseconds between the tokens of 32 streams, while four prompts of `length` tokens are computed beside
        them, one each 64 steps."""
        from octavo import SamplingParams

        engine, rng = self.llm.engine, Random(3)

        def add(name: str, tokens: int, out: int) -> None:
            params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=out, detokenize=False)
            engine.add_request(name, [rng.randint(0, 10000) for _ in range(tokens)], params)

        for i in range(32):
            add(f"stream {i}", 128, 300)
        for _ in range(20):
            engine.step()
        gaps = []
        for i in range(256):
            if i % 64 == 0:
                add(f"long {i}", length, 1)
            start = time.perf_counter()
            engine.step()
            gaps.append(time.perf_counter() - start)
        while engine.has_unfinished():
            engine.step()
        gaps.sort()
        quantiles = {"median": gaps[128], "p99": gaps[253], "max": gaps[255]}
        return {"prompt_tokens": length} | {name: round(gap * 1e3, 2) for name, gap in quantiles.items()}

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
            max_model_len=max_model_len(arguments.directory),
            max_num_seqs=arguments.seqs,
            gpu_memory_utilization=0.9,
            kv_cache_memory_bytes=arguments.kv_cache_memory,
            enable_prefix_caching=False,
        )

    def run(self, workload: Workload, temperature: float) -> list[list[int]]:
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=length, detokenize=False)
            for _, length in workload
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in workload]
        return [list(output.outputs[0].token_ids) for output in self.llm.generate(prompts, params, use_tqdm=False)]


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


def prefill_floor(engine: Octavo, length: int) -> dict[str, float]:
    """Milliseconds on this card of a prompt's matrix products, each layer's shapes multiplied by torch, and of causal
    attention over it by cuDNN; for models of plain layers."""
    import torch
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = engine.llm.engine.model
    layer, config = model.layers[0], model.config
    weights = [module.weight for module in layer.modules() if type(module).__name__ == "Linear"]
    inputs = [torch.randn(length, weight.shape[1], dtype=weight.dtype, device=weight.device) for weight in weights]
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    q, k, v = (torch.randn(1, h, length, config.head_dim, dtype=model.dtype, device=model.device) for h in heads)

    def products() -> None:
        for x, weight in zip(inputs, weights, strict=True):
            functional.linear(x, weight)

    def attention() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with torch.inference_mode():
        times = [config.num_layers * seconds_on_device(call) * 1e3 for call in (products, attention)]
    return {"products": round(times[0], 2), "attention": round(times[1], 2), "sum": round(sum(times), 2)}


def seconds_on_device(call: Callable[[], None]) -> float:
    """Median of ten calls, after three."""
    import torch

    times = []
    for _ in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def measure(engine_class: type[Octavo] | type[VLLM], arguments: argparse.Namespace) -> dict[str, Any]:
    workload = make_workload(arguments.seqs)
    start = time.perf_counter()
    engine = engine_class(arguments)
    result: dict[str, Any] = {"engine": engine_class.__name__.lower(), "model": Path(arguments.directory).name}
    result["weights"], result["routing"] = arguments.weights, arguments.routing
    result["start_s"] = round(time.perf_counter() - start, 2)
    result["first_generation_s"] = round(seconds_of(engine, [(workload[0][0], 8)], 0.6), 3)
    tokens = sum(length for _, length in workload)
    result["batch_tokens"] = {"in": sum(len(prompt) for prompt, _ in workload), "out": tokens}
    outputs = []
    for repetition in ("first", "second")[: arguments.batches]:
        if isinstance(engine, Octavo):
            engine.steps.clear()
        start = time.perf_counter()
        outputs.append(engine.run(workload, 0.6))
        seconds = time.perf_counter() - start
        result[f"{repetition}_batch"] = {"s": round(seconds, 3), "tokens_per_s": round(tokens / seconds, 1)}
        print(json.dumps(result), flush=True)
    if isinstance(engine, Octavo):
        if arguments.batches == 2:
            result["same_tokens_twice"] = outputs[0] == outputs[1]
        result["at_full_batch"] = engine.host_work(int(arguments.seqs * 0.9))
        result["prefill_steps"] = engine.prefill_work()
        engine.steps.clear()
    if "single" in arguments.parts:
        measure_single(engine, result)
    if "long" in arguments.parts:
        measure_long(engine, max_model_len(arguments.directory) - 1, arguments.device, result)
    if isinstance(engine, Octavo):
        memory = engine.llm.engine.device_memory()
        result["memory"] = None if memory is None else memory.to_dict()
        result["kv_cache_blocks"] = engine.llm.engine.config.num_blocks
        if arguments.profile:
            result["profile"] = engine.profile(workload, Path(arguments.profile))
    print(json.dumps(result), flush=True)
    return result


def measure_single(engine: Octavo | VLLM, result: dict[str, Any]) -> None:
    """One request alone: the best of three, after one."""
    single = make_single()
    seconds_of(engine, single, 0.0)
    result["single_ms_per_token"] = round(min(seconds_of(engine, single, 0.0) for _ in range(3)) / 256 * 1e3, 4)
    if isinstance(engine, Octavo):
        result["alone"] = engine.host_work(1)
    print(json.dumps(result), flush=True)


def measure_long(engine: Octavo | VLLM, length: int, device: str, result: dict[str, Any]) -> None:
    """Prompts of `length` tokens: the time to the first token, and the gaps that they make in other streams."""
    result["first_token_ms"] = {"prompt_tokens": length, "ms": round(time_to_first_token(engine, length) * 1e3, 2)}
    if isinstance(engine, Octavo):
        result["token_gaps_ms"] = engine.token_gaps(length)
        if device == "cuda" and engine.llm.engine.model.config.moe is None:
            result["first_token_floor_ms"] = prefill_floor(engine, length)


def environment() -> dict[str, str]:
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**versions, "gpu": gpu, "date": time.strftime("%Y-%m-%d")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="holds a config.json")
    parser.add_argument("--engine", nargs="+", choices=["octavo", "vllm"], default=["octavo"])
    parser.add_argument("--weights", choices=["uniform", "normal"], default="uniform")
    parser.add_argument("--routing", choices=["tied", "spread"], default="tied", help="of a mixture of experts")
    parser.add_argument(
        "--parts", nargs="*", choices=["single", "long"], default=["single", "long"], help="after the batch"
    )
    parser.add_argument("--seqs", type=int, default=256)
    parser.add_argument("--batches", type=int, choices=[1, 2], default=2, help="how often to run the batch")
    parser.add_argument("--kv-cache-memory", type=int, help="bytes; default what is free")
    parser.add_argument("--device", default="cuda", help="cpu: to try this script, with --engine octavo")
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
