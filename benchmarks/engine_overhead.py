"""What the engine costs beside the model: scheduler, block manager, batch building, sampling, text, per decode step.

    python benchmarks/engine_overhead.py [--seqs 32 256] [--steps 300] [--vocab 512] [--json out.json]

The model is a null model: it computes nothing and its logits are ready. What remains is the engine. Arithmetic over the
vocabulary (an argmax reads 50 MB at 256 rows of 49152) belongs to the device, not to the overhead; so the vocabulary is
small here, and `--vocab 49152` shows the other figure. Times are the processor's, so that other programs on the machine
do not count. Target: ≤ 300 µs at 256 sequences.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models
from torch import nn

from octavo import SamplingParams
from octavo.engine.config import EngineConfig
from octavo.engine.llm_engine import LLMEngine
from octavo.models import SpecialTokens, Tokenizer
from octavo.nn.cache import LayerKVCache


class NullModel(nn.Module):
    """A decoder of no layers: hidden states and logits of the right shape, from memory."""

    def __init__(self, vocab: int, rows: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab, eos_token_ids=())
        self.dtype = self.cache_dtype = torch.float32
        self.device = torch.device("cpu")
        self.layers = nn.ModuleList([NullAttention()])
        self.hidden = torch.zeros(4096, 1)
        self.logits = torch.randn(rows, vocab) * 4  # as peaked as a language model's

    def forward(self, token_ids: torch.Tensor, *args: object) -> torch.Tensor:
        return self.hidden[: len(token_ids)]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(hidden)]


class NullAttention(nn.Module):
    """An attention layer of which only the cache is asked for."""

    def new_cache(self, num_blocks: int, block_size: int, *, dtype: torch.dtype, device: str) -> LayerKVCache:
        k, v = (torch.empty(num_blocks, block_size, 1, 1, dtype=dtype, device=device) for _ in range(2))
        return LayerKVCache(k, v)


def byte_tokenizer(vocab: int) -> Tokenizer:
    """A byte-level tokenizer with `vocab` tokens of two letters."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    names = dict.fromkeys(a + b + c for a in letters for b in letters for c in letters)
    backend = tokenizers.Tokenizer(models.BPE({name: i for i, name in zip(range(vocab), names, strict=False)}, []))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, SpecialTokens())


def processor_seconds() -> float:
    """Seconds of this process on a processor: one thread works here, and a busy machine would add its own."""
    return time.process_time()


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, method: str, phase: str) -> None:
        """Adds what `owner.method` takes to `phase`."""
        original: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **options: Any) -> Any:
            start = processor_seconds()
            result = original(*args, **options)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + processor_seconds() - start
            return result

        setattr(owner, method, timed)


def measure(num_seqs: int, steps: int, vocab: int, run_ahead: bool, params: dict[str, Any]) -> dict[str, float]:
    """Microseconds per decode step of `num_seqs` sequences, by phase. run_ahead: as on a GPU, through the buffers of
    the decode graphs."""
    config = EngineConfig(
        num_blocks=num_seqs * (steps // 16 + 8),
        max_model_len=steps + 100,
        kv_bytes_per_token=8,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(num_seqs, 2048),
    )
    engine = LLMEngine(NullModel(vocab, num_seqs), byte_tokenizer(vocab), config, run_ahead=run_ahead)  # type: ignore[arg-type]
    for i in range(num_seqs):
        sampling = SamplingParams(max_tokens=steps + 40, ignore_eos=True, **params)
        engine.add_request(str(i), [(i + j) % vocab for j in range(8)], sampling)
    for _ in range(20):
        engine.step()
    clock = Clock()
    clock.watch(engine.scheduler, "schedule", "schedule")
    clock.watch(engine.scheduler, "schedule_ahead", "schedule")
    clock.watch(engine.runner, "_batch", "build the batch")
    clock.watch(engine.runner.sampler, "draw", "sample")
    clock.watch(engine.runner.sampler, "report", "sample")
    clock.watch(engine.scheduler, "update", "update")
    clock.watch(engine, "_record", "text and outputs")
    start = processor_seconds()
    for _ in range(steps):
        engine.step()
    total = processor_seconds() - start
    phases = {phase: seconds / steps * 1e6 for phase, seconds in clock.seconds.items()}
    return {**phases, "other": total / steps * 1e6 - sum(phases.values()), "total": total / steps * 1e6}


WORKLOADS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8, "seed": 1},
    "top_p": {"temperature": 0.8, "top_p": 0.95, "seed": 1},
    "penalties": {"temperature": 0, "repetition_penalty": 1.1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqs", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument(
        "--run-ahead", action="store_true", help="as on a GPU: each step launched before the last is read"
    )
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for num_seqs in arguments.seqs:
        for name, params in WORKLOADS.items():
            times = measure(num_seqs, arguments.steps, arguments.vocab, arguments.run_ahead, params)
            results.append({"sequences": num_seqs, "workload": name, "microseconds_per_step": times})
            line = ", ".join(f"{phase} {value:.0f}" for phase, value in times.items() if phase != "total")
            print(f"{num_seqs:4d} sequences, {name:<12} {times['total']:7.0f} µs/step: {line}", flush=True)
    if arguments.json:
        environment = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        with open(arguments.json, "w") as file:
            json.dump({"environment": environment, "vocab": arguments.vocab, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
