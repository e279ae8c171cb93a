"""The workloads of `octavo bench`: random prompts of known lengths, greedy answers that never stop early.

Times come from the requests' own metrics and from a clock around each step, so what is measured is the engine as it
serves.
"""

import os
import platform
import random
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from octavo import __version__
from octavo.engine.outputs import RequestOutput
from octavo.engine.sampling_params import SamplingParams
from octavo.llm import LLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """concurrent: all requests at once, or one after the other. range_ratio: lengths are uniform in (1 ± ratio) ·
    length. shared_prefix_len: tokens that every second prompt begins with, within its length."""

    concurrent: bool = True
    num_prompts: int = 32
    input_len: int = 128
    output_len: int = 64
    range_ratio: float = 0.0
    shared_prefix_len: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("num_prompts", "input_len", "output_len"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        if not 0 <= self.range_ratio < 1:
            raise ValueError(f"range_ratio: expected at least 0 and below 1, got {self.range_ratio}")
        if not 0 <= self.shared_prefix_len <= self.input_len:
            longest, got = self.input_len, self.shared_prefix_len
            raise ValueError(f"shared_prefix_len: expected 0 to input_len ({longest}), got {got}")

    def requests(self, vocab_size: int) -> list[tuple[list[int], int]]:
        """(prompt's token ids, tokens to produce) of each request; the same for the same seed."""
        rng = random.Random(self.seed)
        shared = [rng.randrange(vocab_size) for _ in range(self.shared_prefix_len)]
        requests = []
        for i in range(self.num_prompts):
            prompt = [rng.randrange(vocab_size) for _ in range(self._length(rng, self.input_len))]
            if i % 2:
                prompt[: len(shared)] = shared[: len(prompt)]
            requests.append((prompt, self._length(rng, self.output_len)))
        return requests

    def _length(self, rng: random.Random, mean: int) -> int:
        spread = int(mean * self.range_ratio)
        return max(1, rng.randint(mean - spread, mean + spread))


def run_workload(llm: LLM, workload: Workload) -> dict[str, Any]:
    """Runs it once after a short warm-up. Returns JSON-ready figures, times in seconds, and what they depend on."""
    requests = workload.requests(llm.engine.model.config.vocab_size)
    _serve(llm, [([1] * min(8, workload.input_len), 2)], "warm-up", show=False)
    start = time.perf_counter()
    outputs: list[RequestOutput] = []
    if workload.concurrent:
        outputs = _serve(llm, requests, "w")
    else:
        for i, request in enumerate(tqdm(requests, "Requests", delay=1.0)):
            outputs += _serve(llm, [request], f"w{i}-", show=False)
    seconds = time.perf_counter() - start
    return {
        "figures": _figures(outputs, seconds),
        "workload": asdict(workload),
        "engine": {"config": asdict(llm.engine.config), "device": str(llm.engine.model.device)},
        "environment": {
            "octavo": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }


def _serve(llm: LLM, requests: list[tuple[list[int], int]], name: str, show: bool = True) -> list[RequestOutput]:
    engine = llm.engine
    for i, (prompt, count) in enumerate(requests):
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        engine.add_request(f"{name}{i}", prompt, params)
    outputs: list[RequestOutput] = []
    with tqdm(total=len(requests), desc="Requests", delay=1.0, disable=not show) as bar:
        while engine.has_unfinished():
            finished = engine.step()
            bar.update(len(finished))
            outputs += finished
    if any(output.outputs[0].finish_reason == "error" for output in outputs):
        raise RuntimeError("a step of the benchmark failed; the log holds the reason")
    return outputs


def _figures(outputs: list[RequestOutput], seconds: float) -> dict[str, float]:
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    output_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    to_first = [t for output in outputs if (t := _metric(output, "time_to_first_token")) is not None]
    between = [t for output in outputs if (t := _time_per_token(output)) is not None]
    figures = {
        "seconds": seconds,
        "requests_per_s": len(outputs) / seconds,
        "output_tokens_per_s": output_tokens / seconds,
        "total_tokens_per_s": (prompt_tokens + output_tokens) / seconds,
        "prompt_tokens": prompt_tokens,
        "cached_prompt_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
        "output_tokens": output_tokens,
        "preemptions": sum(output.metrics.num_preemptions for output in outputs if output.metrics),
    }
    for name, values in (("time_to_first_token", to_first), ("time_per_output_token", between)):
        if values:
            figures[f"{name}_mean"] = statistics.fmean(values)
            figures[f"{name}_p50"] = statistics.median(values)
            figures[f"{name}_p99"] = sorted(values)[min(len(values) - 1, round(0.99 * len(values)))]
    return figures


def _metric(output: RequestOutput, name: str) -> float | None:
    return getattr(output.metrics, name) if output.metrics else None


def _time_per_token(output: RequestOutput) -> float | None:
    """Mean time of an output token after the first."""
    metrics, count = output.metrics, len(output.outputs[0].token_ids)
    if metrics is None or metrics.first_token_time is None or metrics.last_token_time is None or count < 2:
        return None
    return (metrics.last_token_time - metrics.first_token_time) / (count - 1)
