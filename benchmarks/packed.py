"""Packed sequences (cu_seqlens) on one GPU: octavo's Hopper kernels beside FA3 and beside its own dense call.

    PYTHONPATH=.:PEERS python3 benchmarks/packed.py [--rep 20] [--out results.json]

bf16, causal, 16 heads. TFLOP/s count the visible pairs of query and key: 2 products forward, 5 backward. The dense call
is the same kernel on the same rows, where all lengths are the same; *two passes* is the deterministic backward.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import triton
from prefill import fa3
from triton.testing import do_bench

from octavo.kernels.hopper.flash_bwd import flash_bwd
from octavo.kernels.hopper.flash_fwd import flash_fwd
from octavo.kernels.spec import AttentionSpec, AttentionTensors

HEADS = 16
SHORT = [377 + 10 * i for i in range(40)]
MIXED = [int(64 * 2 ** (8 * i / 23)) for i in range(24)]  # 64 to 16384
CASES = [
    (128, 128, [4096] * 4), (128, 128, SHORT), (128, 128, MIXED), (64, 64, SHORT),
    (192, 128, [4096] * 4), (192, 128, SHORT),
]  # fmt: skip


def measure(head_dim: int, head_dim_v: int, lengths: list[int], rep: float) -> dict[str, object]:
    rows = sum(lengths)
    q, k = (torch.randn(rows, HEADS, head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qk")
    v, dout = (torch.randn(rows, HEADS, head_dim_v, device="cuda", dtype=torch.bfloat16) for _ in "vg")
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    spec, t = AttentionSpec(head_dim**-0.5, window_right=0), AttentionTensors(cu, cu, max(lengths), max(lengths))
    pairs = HEADS * sum(n * (n + 1) / 2 for n in lengths)
    forward, backward = 2 * (head_dim + head_dim_v) * pairs, 2 * (3 * head_dim + 2 * head_dim_v) * pairs

    def tflops(flops: float, fn: Callable[[], object]) -> float:
        return flops / do_bench(fn, warmup=rep / 4, rep=rep, return_mode="median") / 1e9

    out, lse = flash_fwd(q, k, v, spec, t)
    row: dict[str, object] = {"head_dim": head_dim, "head_dim_v": head_dim_v, "sequences": len(lengths), "rows": rows}
    row["forward"] = tflops(forward, lambda: flash_fwd(q, k, v, spec, t))
    row["backward"] = tflops(backward, lambda: flash_bwd(dout, q, k, v, out, lse, spec, t))
    in_turn = replace(spec, deterministic=True)
    row["deterministic"] = tflops(backward, lambda: flash_bwd(dout, q, k, v, out, lse, in_turn, t))
    peer = fa3(q, k, v, t)
    if peer is not None:
        row["fa3 error"] = ((peer() - out).float().norm() / out.float().norm()).item()
        row["fa3 forward"] = tflops(forward, peer)
    if len(set(lengths)) == 1:
        dense = [x.view(len(lengths), lengths[0], HEADS, -1) for x in (q, k, v)]
        row["dense forward"] = tflops(forward, lambda: flash_fwd(*dense, spec, AttentionTensors()))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rep", type=float, default=100, help="milliseconds that each kernel is repeated for")
    parser.add_argument("--out", type=Path, help="JSON file for every row")
    args = parser.parse_args()
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}"
    print(machine)
    rows = []
    for case in CASES:
        rows.append(measure(*case, args.rep))
        print({name: round(x, 4) if isinstance(x, float) else x for name, x in rows[-1].items()}, flush=True)
    if args.out:
        args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
