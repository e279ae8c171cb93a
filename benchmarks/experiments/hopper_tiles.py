"""Compare tiles of the Hopper forward: how the constants in `octavo.kernels.hopper.flash_fwd.TILES` were chosen.

    PYTHONPATH=. python3 benchmarks/experiments/hopper_tiles.py --head-dim 64 2,128,3,240,168,1 2,64,3,240,168

A tile is num_wg,block_n,stages,registers,max_registers[,q_in_registers[,out_in_q]]; the one in use comes first,
unasked. Each runs in a process of its own that is ended after --limit seconds, since a schedule that does not fit can
wait for ever. Shapes are those of `benchmarks/attention.py`; the error is against cuDNN on the same tensors.
"""

import argparse
import json
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from octavo.kernels.hopper import flash_fwd
from octavo.kernels.spec import AttentionSpec, AttentionTensors

HIDDEN, TOKENS = 2048, 16384


def measure(head_dim: int, length: int, causal: bool) -> dict[str, object]:
    """One shape with the tile in use: TFLOP/s and the relative error."""
    heads, batch = HIDDEN // head_dim, max(1, TOKENS // length)
    q, k, v = (torch.randn(batch, length, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    spec = AttentionSpec(head_dim**-0.5, window_right=0 if causal else -1)

    def ours() -> torch.Tensor:
        return flash_fwd.flash_fwd(q, k, v, spec, AttentionTensors())[0]

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        peer = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal).transpose(1, 2)
    error = (ours().float() - peer.float()).norm() / peer.float().norm()
    seconds = do_bench(ours, warmup=25, rep=100, return_mode="median") * 1e-3
    flops = 4 * batch * length**2 * heads * head_dim / (2 if causal else 1)
    shape = f"{length}{' causal' if causal else ''}"
    return {"shape": shape, "tflops": round(flops / seconds / 1e12, 1), "error": round(error.item(), 5)}


def measure_all(head_dim: int, tile: str, seqlens: list[int]) -> None:
    """Print a JSON line for each shape."""
    if tile != "in use":
        width = flash_fwd._width(head_dim)
        flash_fwd.TILES[width, width] = flash_fwd.Tile(*map(int, tile.split(",")))
    for causal in (False, True):
        for length in seqlens:
            print(json.dumps({"tile": tile, **measure(head_dim, length, causal)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiles", nargs="*")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seqlens", default="1024,4096,16384")
    parser.add_argument("--limit", type=float, default=30, help="seconds a tile may take")
    parser.add_argument("--here", action="store_true", help="measure the one tile given in this process")
    args = parser.parse_args()
    if args.here:
        measure_all(args.head_dim, args.tiles[0], [int(x) for x in args.seqlens.split(",")])
        return
    for tile in ["in use", *args.tiles]:
        options = ["--here", "--head-dim", str(args.head_dim), "--seqlens", args.seqlens]
        try:
            subprocess.run([sys.executable, __file__, tile, *options], timeout=args.limit, check=True)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            print(json.dumps({"tile": tile, "why": f"{type(error).__name__}: {error}"[:200]}), flush=True)


if __name__ == "__main__":
    main()
