"""Attention on the CPU, forward and backward, beside torch's `scaled_dot_product_attention`: GFLOP/s of both and the
ratio.

    python benchmarks/attention_cpu.py [--seqlen 1024 4096] [--head-dim 64 128] [--heads 16] [--kv-heads 16]
    [--seconds 0.5] [--clock cpu]

Both compute the same thing on the same numbers, forward and backward each through autograd as a user calls them. Runs
alternate, ours and torch's, and the fastest of each counts. On a busy machine OMP_NUM_THREADS=1 and `--clock cpu`, the
processor's time, still tell who is faster. FLOPs: forward 4·S²·H·D, backward 2.5 times that, half
when causal.
"""

import argparse
import itertools
import platform
import time
from collections.abc import Callable

import torch

import octavo

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def fastest(
    candidates: list[Callable[[], object]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Seconds of the fastest run of each, runs alternating, at least 3 and for about `seconds` each."""
    best = [float("inf")] * len(candidates)
    for run in candidates:
        run()
    rounds, start = 0, clock()
    while rounds < 3 or clock() - start < seconds * len(candidates):
        for i, run in enumerate(candidates):
            before = clock()
            run()
            best[i] = min(best[i], clock() - before)
        rounds += 1
    return best


def measure(dtype: torch.dtype, seqlen: int, head_dim: int, causal: bool, options: argparse.Namespace) -> list[float]:
    """Forward seconds of ours and torch's, backward seconds of ours and torch's."""
    shapes = [(1, seqlen, heads, head_dim) for heads in (options.heads, options.kv_heads, options.kv_heads)]
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)

    def ours() -> torch.Tensor:
        return octavo.flash_attn_func(q, k, v, causal=causal)

    def torchs() -> torch.Tensor:
        grouped = options.heads != options.kv_heads
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2)

    def without_grad(run: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return torch.no_grad()(run)

    forward = fastest([without_grad(ours), without_grad(torchs)], options.seconds, CLOCKS[options.clock])
    dout = torch.randn_like(q)
    outs = [ours(), torchs()]
    difference = (outs[0] - outs[1]).abs().max().item()
    assert difference < (1e-4 if dtype == torch.float32 else 5e-2), difference
    backward = [lambda out=out: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for out in outs]
    return forward + fastest(backward, options.seconds, CLOCKS[options.clock])


def main() -> None:
    """Print one row per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlen", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=0.5, help="per case and contender")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the process's processor time")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("dtype  S     D    causal | forward GFLOP/s: ours, torch, ratio | backward: ours, torch, ratio")
    for dtype, seqlen, head_dim, causal in itertools.product(
        options.dtype, options.seqlen, options.head_dim, (False, True)
    ):
        seconds = measure(DTYPES[dtype], seqlen, head_dim, causal, options)
        flops = 4 * seqlen**2 * options.heads * head_dim / (2 if causal else 1)
        speeds = [factor * flops / s / 1e9 for factor, s in zip((1, 1, 2.5, 2.5), seconds, strict=True)]
        ours_f, torch_f, ours_b, torch_b = speeds
        print(
            f"{dtype:5}  {seqlen:<5} {head_dim:<4} {'yes' if causal else 'no':6} | "
            f"{ours_f:7.1f} {torch_f:7.1f} {ours_f / torch_f:5.2f} | "
            f"{ours_b:7.1f} {torch_b:7.1f} {ours_b / torch_b:5.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
