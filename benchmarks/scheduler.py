"""CPU time per step of scheduler and block manager: 256 running decodes, and admission of prompts.

    python benchmarks/scheduler.py [--sequences 256] [--json]

The model is absent: a step is schedule, a result of constant tokens, update. The budget for the whole engine (with
batch building, sampling and detokenising) is 300 µs at 256 sequences, of which a third may go here. No peer's scheduler
runs without its engine, so none runs beside us.
"""

import argparse
import gc
import json
import platform
import statistics
import time

from octavo.engine.config import EngineConfig
from octavo.engine.request import Request
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.scheduler import Scheduler
from octavo.engine.step import StepResult


def make_scheduler(sequences: int, prefix_caching: bool) -> Scheduler:
    config = EngineConfig(
        num_blocks=sequences * 64,
        max_model_len=1024,
        kv_bytes_per_token=1,
        max_num_seqs=sequences,
        max_num_batched_tokens=max(2048, sequences),
        enable_prefix_caching=prefix_caching,
    )
    return Scheduler(config)


def add_requests(scheduler: Scheduler, sequences: int, prompt: int, shared: int) -> None:
    """Prompts of different lengths, so that block borders are spread over the steps as in real traffic."""
    for number in range(sequences):
        tokens = [*range(shared), *range(10_000 + number, 10_000 + number + prompt + number % 16)]
        scheduler.add_request(Request(f"{number}", tokens, SamplingParams(max_tokens=900, temperature=0)))


def timed_step(scheduler: Scheduler) -> tuple[float, float, int]:
    """Seconds of schedule and of update, and the step's tokens."""
    start = time.perf_counter()
    output = scheduler.schedule()
    scheduled = time.perf_counter()
    result = StepResult([7] * sum(entry.num_samples for entry in output.scheduled))
    executed = time.perf_counter()
    scheduler.update(output, result)
    return scheduled - start, time.perf_counter() - executed, output.num_batched_tokens


def measure(sequences: int, prefix_caching: bool, steps: int) -> dict[str, float]:
    scheduler = make_scheduler(sequences, prefix_caching)
    add_requests(scheduler, sequences, prompt=64, shared=64)
    prefill_seconds, prefill_tokens = 0.0, 0
    while len(scheduler.decoding) < sequences:
        schedule, update, tokens = timed_step(scheduler)
        prefill_seconds, prefill_tokens = prefill_seconds + schedule + update, prefill_tokens + tokens
    times = [timed_step(scheduler) for _ in range(steps)]
    return {
        "schedule_us": statistics.median(t[0] for t in times) * 1e6,
        "update_us": statistics.median(t[1] for t in times) * 1e6,
        "step_us": statistics.median(t[0] + t[1] for t in times) * 1e6,
        "step_p99_us": statistics.quantiles([t[0] + t[1] for t in times], n=100)[98] * 1e6,
        "admission_ns_per_token": prefill_seconds / prefill_tokens * 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256, help="running sequences (default 256)")
    parser.add_argument("--steps", type=int, default=500, help="decode steps timed, at most 800 (default 500)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    gc.freeze()
    results = {
        name: measure(arguments.sequences, caching, arguments.steps)
        for name, caching in (("prefix cache on", True), ("prefix cache off", False))
    }
    if arguments.json:
        print(json.dumps({"sequences": arguments.sequences, "python": platform.python_version(), "results": results}))
        return
    version = platform.python_version()
    print(f"{arguments.sequences} sequences, {arguments.steps} decode steps, Python {version}")
    for name, figures in results.items():
        print(f"{name:17} " + "  ".join(f"{key} {value:7.1f}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
