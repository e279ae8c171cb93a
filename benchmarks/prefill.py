"""Chunks of prompts over a paged cache on one GPU: octavo beside its own dense kernel and FA3, on the same keys.

    PYTHONPATH=.:PEERS python3 benchmarks/prefill.py [--pages 16,64,256] [--out results.json]

bf16, 32 query heads over 8 of head size 128, causal. A case is (sequences, new tokens of each, keys cached before); the
block table is a random permutation. TFLOP/s count 4·D for each visible pair of query and key. The ratio is the time of
octavo's dense forward over that of the paged one. The last case mixes one chunk with decode rows.
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

from octavo.kernels.spec import AttentionSpec, AttentionTensors
from octavo.ops import dispatch

HEADS, HEADS_K, HEAD_DIM = 32, 8, 128
CASES = [(8, 512, 3584), (4, 512, 8192), (1, 2048, 8192), (1, 8192, 0), (1, 2048, 30720)]
MIXED = [(1024, 8192), *[(1, 4096)] * 8]


def milliseconds(fn: Callable[[], object], rep: float) -> float:
    return do_bench(fn, warmup=rep / 4, rep=rep, return_mode="median")


def paged_cache(lengths: list[int], page: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(k_cache, v_cache, block_table) of random numbers, the blocks in random order."""
    blocks = [-(-n // page) for n in lengths]
    shape = (sum(blocks), page, HEADS_K, HEAD_DIM)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    order = torch.randperm(sum(blocks), device="cuda", dtype=torch.int32)
    table = torch.zeros(len(lengths), max(blocks), device="cuda", dtype=torch.int32)
    for b, part in enumerate(order.split(blocks)):
        table[b, : blocks[b]] = part
    return k, v, table


def tensors_of(new: list[int], lengths: list[int], table: torch.Tensor) -> AttentionTensors:
    return AttentionTensors(
        cu_seqlens_q=torch.tensor([0, *new], device="cuda").cumsum(0).int(),
        max_seqlen_q=max(new),
        max_seqlen_k=max(lengths),
        seqused_k=torch.tensor(lengths, device="cuda", dtype=torch.int32),
        block_table=table,
    )


def fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, t: AttentionTensors) -> Callable[[], object] | None:
    """FlashAttention-3 of vLLM's wheel over the same packed keys or pages, or None."""
    try:
        from vllm.vllm_flash_attn import flash_attn_interface
    except ImportError:
        return None
    return lambda: flash_attn_interface.flash_attn_varlen_func(
        q, k, v, max_seqlen_q=t.max_seqlen_q, cu_seqlens_q=t.cu_seqlens_q, max_seqlen_k=t.max_seqlen_k,
        cu_seqlens_k=t.cu_seqlens_k, seqused_k=t.seqused_k, block_table=t.block_table, causal=True, fa_version=3,
    )  # fmt: skip


def measure(new: list[int], before: list[int], pages: list[int], rep: float) -> list[dict[str, object]]:
    lengths = [a + b for a, b in zip(new, before, strict=True)]
    spec = AttentionSpec(HEAD_DIM**-0.5, window_right=0)
    pairs = sum(a * b + a * (a + 1) / 2 for a, b in zip(new, before, strict=True))
    flops = 4 * HEADS * HEAD_DIM * pairs
    q = torch.randn(sum(new), HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    dense = None
    if len(set(zip(new, before, strict=True))) == 1:
        shape = (len(new), lengths[0], HEADS_K, HEAD_DIM)
        k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        arguments = (q.view(len(new), new[0], HEADS, HEAD_DIM), k, v, spec, AttentionTensors())
        dense = milliseconds(lambda: dispatch.run("flash_fwd", q.device, arguments), rep)
    rows = []
    for page in pages:
        k, v, table = paged_cache(lengths, page)
        t = tensors_of(new, lengths, table)
        choice = dispatch.choose("paged_attention", q.device, (q, k, v, spec, t, 0))
        ms = milliseconds(functools.partial(choice.kernel, q, k, v, spec, t, 0), rep)
        peer = fa3(q, k, v, t)
        peer_ms = milliseconds(peer, rep) if peer else None
        row: dict[str, object] = {"new": new[0], "before": before[0], "sequences": len(new), "page": page}
        row |= {"backend": choice.module, "tflops": flops / ms / 1e9}
        if peer_ms is not None:
            row["fa3_tflops"] = flops / peer_ms / 1e9
        if dense is not None:
            row |= {"dense_tflops": flops / dense / 1e9, "of_dense": dense / ms}
        rows.append(row)
        print({name: round(x, 3) if isinstance(x, float) else x for name, x in row.items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", default="16,64,256")
    parser.add_argument("--rep", type=float, default=100, help="milliseconds that each kernel is repeated for")
    parser.add_argument("--out", type=Path, help="JSON file for every row")
    args = parser.parse_args()
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}"
    print(machine)
    pages = [int(page) for page in args.pages.split(",")]
    rows = []
    for sequences, new, before in CASES:
        rows += measure([new] * sequences, [before] * sequences, pages, args.rep)
    rows += measure([new for new, _ in MIXED], [before for _, before in MIXED], pages[:1], args.rep)
    if args.out:
        args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
