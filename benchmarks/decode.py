"""Paged and latent decode on one GPU: octavo's backends beside FA3 and FlashMLA, in one process on the same tensors.

    PYTHONPATH=. python3 benchmarks/decode.py [--out results.json]

One query token a sequence, bf16, a random block table. GB/s count each key and value (or latent) byte once; "of the
copy" is against a device-to-device copy measured in the same run (read + write). All are checked against the fp32
reference on the first sequence. `--ragged` draws the lengths between 1 and the context instead.
"""

import argparse
import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

from octavo.kernels.reference.mla_decode import mla_decode as reference_mla
from octavo.kernels.reference.paged_attention import paged_attention as reference_paged
from octavo.kernels.spec import AttentionSpec, AttentionTensors

OURS = ("triton", "hopper")
HEAD_DIM, LATENT, ROPE, MLA_PAGE = 128, 512, 64, 64
#       batch, context, Hq, Hkv
PAGED = [(128, 4096, 32, 8), (64, 8192, 32, 8), (16, 32768, 32, 8), (1, 131072, 32, 8), (256, 1024, 32, 8),
         (128, 4096, 32, 32), (32, 1024, 32, 8)]  # fmt: skip
#       batch, context, heads
MLA = [(128, 4096, 16), (128, 4096, 64), (128, 4096, 128), (32, 8192, 128), (1, 32768, 128), (32, 1024, 16)]


def seconds(fn: Callable[[], object]) -> float:
    """Median time of one call, from a CUDA graph's replays: launches cost nothing then, as in an engine."""
    fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return do_bench(graph.replay, warmup=25, rep=100, return_mode="median") * 1e-3


def copy_gb_per_s() -> float:
    x = torch.randn(2**29, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / (do_bench(lambda: y.copy_(x), return_mode="median") * 1e-3) / 1e9


def lengths_of(batch: int, context: int, ragged: bool) -> torch.Tensor:
    if ragged:
        return torch.randint(1, context + 1, (batch,), dtype=torch.int32, device="cuda")
    return torch.full((batch,), context, dtype=torch.int32, device="cuda")


def tensors_of(batch: int, context: int, page: int, seqused: torch.Tensor) -> tuple[AttentionTensors, int]:
    """The call's tensors over a random table, and the number of blocks."""
    per_sequence = -(-context // page)
    table = torch.randperm(batch * per_sequence, device="cuda", dtype=torch.int32).view(batch, -1)
    cu = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    t = AttentionTensors(cu_seqlens_q=cu, max_seqlen_q=1, max_seqlen_k=context, block_table=table, seqused_k=seqused)
    return t, batch * per_sequence


def first_sequence(t: AttentionTensors) -> AttentionTensors:
    return replace(t, cu_seqlens_q=t.cu_seqlens_q[:2], block_table=t.block_table[:1], seqused_k=t.seqused_k[:1])


def ours(backend: str, op: str, *arguments: object) -> Callable[[], torch.Tensor]:
    """Our kernel as a call without arguments; a refusal is an error that says why."""
    module = importlib.import_module(f"octavo.kernels.{backend}.{op}")
    reason = getattr(module, f"refuses_{op}")(*arguments)
    if reason:
        raise ValueError(reason)
    return lambda: getattr(module, op)(*arguments)[0]


def fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, t: AttentionTensors) -> Callable[[], torch.Tensor]:
    """FlashAttention-3 of vLLM's wheel."""
    from vllm.vllm_flash_attn import flash_attn_interface

    return lambda: flash_attn_interface.flash_attn_varlen_func(
        q, k, v, max_seqlen_q=1, cu_seqlens_q=t.cu_seqlens_q, max_seqlen_k=t.max_seqlen_k, seqused_k=t.seqused_k,
        causal=True, block_table=t.block_table, fa_version=3,
    )  # fmt: skip


def flash_mla(q: torch.Tensor, cache: torch.Tensor, t: AttentionTensors, scale: float) -> Callable[[], torch.Tensor]:
    """FlashMLA of vLLM's wheel."""
    from vllm.third_party.flashmla.flash_mla_interface import flash_mla_with_kvcache, get_mla_metadata

    try:
        metadata = get_mla_metadata(t.seqused_k, q.shape[1], 1)
    except TypeError:
        metadata = get_mla_metadata()
    call = lambda: flash_mla_with_kvcache(  # noqa: E731
        q[:, None], cache[:, :, None], t.block_table, t.seqused_k, LATENT, *metadata, softmax_scale=scale, causal=True
    )[0][:, 0]
    call()  # its metadata is computed on the first call
    return call


def measure(case: dict, name: str, make: Callable, reference: torch.Tensor, nbytes: float, flops: float) -> dict:
    """One candidate on one case, or the reason why not."""
    row = {**case, "name": name}
    try:
        call = make()
        row["error"] = ((call()[:1].float() - reference).norm() / reference.norm()).item()
        elapsed = seconds(call)
        row |= {"microseconds": elapsed * 1e6, "gb_per_s": nbytes / elapsed / 1e9, "tflops": flops / elapsed / 1e12}
    except Exception as error:  # a peer that is absent or refuses is a row that says so
        row["why"] = f"{type(error).__name__}: {error}"[:200]
    return row


def paged_rows(batch: int, context: int, heads: int, kv_heads: int, page: int, ragged: bool) -> list[dict]:
    t, blocks = tensors_of(batch, context, page, lengths_of(batch, context, ragged))
    k, v = (torch.randn(blocks, page, kv_heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    q = torch.randn(batch, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    spec = AttentionSpec(HEAD_DIM**-0.5, window_right=0)
    one = first_sequence(t)
    used = one.block_table[0].long()
    one = replace(one, block_table=torch.arange(len(used), dtype=torch.int32, device="cuda")[None])
    reference = reference_paged(q[:1].float(), k[used].float(), v[used].float(), spec, one)[0]
    tokens = int(t.seqused_k.sum())
    nbytes, flops = 4.0 * tokens * kv_heads * HEAD_DIM, 4.0 * tokens * heads * HEAD_DIM
    case = {
        "op": "paged",
        "batch": batch,
        "context": context,
        "heads": heads,
        "kv_heads": kv_heads,
        "page": page,
        "ragged": ragged,
    }
    makers = {name: lambda name=name: ours(name, "paged_attention", q, k, v, spec, t, 0) for name in OURS}
    makers["fa3"] = lambda: fa3(q, k, v, t)
    return [measure(case, name, make, reference, nbytes, flops) for name, make in makers.items()]


def mla_rows(batch: int, context: int, heads: int, ragged: bool) -> list[dict]:
    t, blocks = tensors_of(batch, context, MLA_PAGE, lengths_of(batch, context, ragged))
    cache = torch.randn(blocks, MLA_PAGE, LATENT + ROPE, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(batch, heads, LATENT + ROPE, device="cuda", dtype=torch.bfloat16)
    spec = AttentionSpec((128 + ROPE) ** -0.5, window_right=0)
    used = t.block_table[0].long()
    one = replace(first_sequence(t), block_table=torch.arange(len(used), dtype=torch.int32, device="cuda")[None])
    reference = reference_mla(q[:1].float(), cache[used].float(), LATENT, spec, one)[0]
    tokens = int(t.seqused_k.sum())
    nbytes, flops = 2.0 * tokens * (LATENT + ROPE), 2.0 * tokens * heads * (2 * LATENT + ROPE)
    case = {"op": "mla", "batch": batch, "context": context, "heads": heads, "page": MLA_PAGE, "ragged": ragged}
    makers = {name: lambda name=name: ours(name, "mla_decode", q, cache, LATENT, spec, t, 0) for name in OURS}
    makers["flash_mla"] = lambda: flash_mla(q, cache, t, spec.softmax_scale)
    return [measure(case, name, make, reference, nbytes, flops) for name, make in makers.items()]


def summarise(rows: list[dict], ceiling: float) -> list[str]:
    """One line a case: ours, the peer, the ratio, the share of the copy's bandwidth."""
    lines = []
    for row in rows:
        if row["name"] not in OURS or "why" in row:
            continue
        same = lambda r, row=row: all(r[k] == row[k] for k in ("op", "batch", "context", "heads", "page", "ragged"))  # noqa: E731
        peer = [r for r in rows if r["name"] not in OURS and same(r) and r.get("kv_heads") == row.get("kv_heads")]
        beside = (
            f"{row['gb_per_s'] / peer[0]['gb_per_s']:.2f} of {peer[0]['name']} {peer[0]['gb_per_s']:.0f}"
            if peer and "why" not in peer[0]
            else "no peer"
        )
        lines.append(
            f"{row['op']} B={row['batch']} ctx={row['context']} heads={row['heads']}/{row.get('kv_heads', 1)} "
            f"page={row['page']}: {row['name']} {row['microseconds']:.1f} us, {row['gb_per_s']:.0f} GB/s, "
            f"{row['tflops']:.0f} TFLOP/s, {beside}, {row['gb_per_s'] / ceiling:.0%} of the copy"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", default="16,256")
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file for every row")
    args = parser.parse_args()
    ceiling = copy_gb_per_s()
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}"
    print(f"{machine}; copy {ceiling:.0f} GB/s")
    rows: list[dict] = []
    for case in PAGED:
        for page in map(int, args.pages.split(",")):
            rows += paged_rows(*case, page, args.ragged)
    for mla_case in MLA:
        rows += mla_rows(*mla_case, args.ragged)
    print("\n".join(f"{r['op']} {r['name']}: {r['why']}" for r in rows if "why" in r and r["name"] != "hopper"))
    print("\n".join(summarise(rows, ceiling)))
    if args.out:
        args.out.write_text(json.dumps({"machine": machine, "copy_gb_per_s": ceiling, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
