"""Paged and latent decode on one GPU: octavo beside FA3 and FlashMLA, in one process on the same tensors.

    PYTHONPATH=. python3 benchmarks/decode.py [--out results.json]
    PYTHONPATH=. python3 benchmarks/decode.py --plot results.json decode  # decode_paged.png, decode_mla.png

One query token a sequence, bf16, a random block table; ragged rows have lengths log-uniform in 64 … 32768. GB/s count
each key and value (or latent) byte once; "of the copy" is against a device-to-device copy measured in the same run
(read + write). Three times each: of CUDA graph replays by Triton's `do_bench`, which zeroes 256 MB before each, so that
the part of the L2 left dirty (up to 50 MB) is written back while the kernel reads; of replays with an L2 filled by
reading, as the kernels of a model leave it; and of calls from Python. `torch fa2` gathers the pages and calls
`scaled_dot_product_attention`, which takes no pages and no ragged lengths.

All are checked against the fp32 reference on the first sequence; `octavo fp8` and `octavo int8` read the same keys and
values quantised with one scale a head, so their error is that of the quantisation.
"""

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from octavo.kernels.reference.cache import quantise
from octavo.kernels.reference.mla_decode import mla_decode as reference_mla
from octavo.kernels.reference.paged_attention import paged_attention as reference_paged
from octavo.kernels.spec import AttentionSpec, AttentionTensors
from octavo.ops import dispatch

HEAD_DIM, LATENT, ROPE = 128, 512, 64
RAGGED = (64, 32768)  # shortest and longest of log-uniform lengths
TIMES = ("after_zeroing_us", "after_reading_us", "eager_us")
PEERS = ("fa3", "flash_mla")
QUANTISED = {"octavo fp8": (torch.float8_e4m3fn, 448.0), "octavo int8": (torch.int8, 127.0)}
#       batch, context (0: ragged), Hq, Hkv
PAGED = [(128, 4096, 32, 8), (64, 8192, 32, 8), (16, 32768, 32, 8), (1, 131072, 32, 8), (256, 1024, 32, 8),
         (128, 4096, 32, 32), (32, 1024, 32, 8), (128, 0, 32, 8)]  # fmt: skip
#       batch, context, heads
MLA = [(128, 4096, 16), (128, 4096, 64), (128, 4096, 128), (32, 8192, 128), (1, 32768, 128), (32, 1024, 16),
       (128, 0, 16), (128, 0, 128)]  # fmt: skip


def captured(fn: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The call as a CUDA graph: launches cost nothing then, as in an engine."""
    fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph


def seconds_after_zeroing(graph: torch.cuda.CUDAGraph) -> float:
    return do_bench(graph.replay, warmup=20, rep=80, return_mode="median") * 1e-3


def seconds_after_reading(graph: torch.cuda.CUDAGraph, runs: int = 30) -> float:
    other = torch.zeros(64 << 20, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        other.sum()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[runs // 2] * 1e-3


def eager_seconds(fn: Callable[[], object], calls: int = 50) -> float:
    """Seconds from call to call out of Python, without waiting in between: the host's time where that is larger."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def copy_gb_per_s() -> float:
    x = torch.randn(2**29, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / (do_bench(lambda: y.copy_(x), return_mode="median") * 1e-3) / 1e9


def lengths_of(batch: int, context: int) -> torch.Tensor:
    """(batch,) int32 on the GPU: all `context`, or log-uniform where that is 0."""
    if context:
        return torch.full((batch,), context, dtype=torch.int32, device="cuda")
    low, high = RAGGED
    exponent = torch.rand(batch, generator=torch.Generator().manual_seed(0))
    return (low * (high / low) ** exponent).int().cuda()


def tensors_of(page: int, seqused: torch.Tensor) -> tuple[AttentionTensors, int]:
    """The call's tensors over a random table, and the number of blocks; unused entries of the table are absurd."""
    counts = -(-seqused.cpu() // page)
    batch, blocks = len(counts), int(counts.sum())
    table = torch.full((batch, int(counts.max())), 2**31 - 1, dtype=torch.int32)
    used = torch.arange(table.shape[1]) < counts[:, None]
    table[used] = torch.randperm(blocks, dtype=torch.int32)
    cu = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    longest = int(seqused.max())
    return AttentionTensors(
        cu_seqlens_q=cu, max_seqlen_q=1, max_seqlen_k=longest, block_table=table.cuda(), seqused_k=seqused
    ), blocks  # fmt: skip


def first_sequence(t: AttentionTensors) -> tuple[AttentionTensors, torch.Tensor]:
    """The first sequence alone, over a cache of the pages it uses, and those pages."""
    table = t.block_table[0]
    used = table[table != 2**31 - 1].long()
    alone = torch.arange(len(used), dtype=torch.int32, device="cuda")[None]
    return replace(t, cu_seqlens_q=t.cu_seqlens_q[:2], block_table=alone, seqused_k=t.seqused_k[:1]), used


def ours(op: str, *arguments: object, backend: str | None = None) -> Callable[[], torch.Tensor]:
    """The kernel that octavo chooses, or that of one backend, as a call without arguments."""
    choice = dispatch.choose(op, torch.device("cuda"), arguments, backend)
    return lambda: choice.kernel(*arguments)[0]


def quantised(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, t: AttentionTensors, name: str
) -> Callable[[], torch.Tensor]:
    """The paged call over the same cache in fp8 or int8; the scale of a head makes its largest number just fit."""
    dtype, largest = QUANTISED[name]
    scales = [x.abs().amax((0, 1, 3)).float() / largest for x in (k, v)]
    k, v = (quantise(x, scale, dtype) for x, scale in zip((k, v), scales, strict=True))
    return ours("paged_attention", q, k, v, spec, replace(t, k_scale=scales[0], v_scale=scales[1]), 0)


def fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, t: AttentionTensors) -> Callable[[], torch.Tensor]:
    """FlashAttention-3 of vLLM's wheel."""
    from vllm.vllm_flash_attn import flash_attn_interface

    return lambda: flash_attn_interface.flash_attn_varlen_func(
        q, k, v, max_seqlen_q=1, cu_seqlens_q=t.cu_seqlens_q, max_seqlen_k=t.max_seqlen_k, seqused_k=t.seqused_k,
        causal=True, block_table=t.block_table, fa_version=3,
    )  # fmt: skip


def torch_fa2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, t: AttentionTensors) -> Callable[[], torch.Tensor]:
    """FlashAttention-2 of torch over the pages gathered into one tensor, the gathering included."""
    if int(t.seqused_k.min()) != t.max_seqlen_k or t.max_seqlen_k % k.shape[1]:
        raise ValueError("it takes sequences of one length, in whole pages")
    batch, (kv_heads, head_dim) = q.shape[0], k.shape[2:]

    def call() -> torch.Tensor:
        gathered = (x[t.block_table].view(batch, -1, kv_heads, head_dim).transpose(1, 2) for x in (k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q[:, :, None], *gathered, enable_gqa=True)[:, :, 0]

    return call


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


def measure(
    case: dict, makers: dict[str, Callable], reference: torch.Tensor, nbytes: float, flops: float
) -> list[dict]:
    """A row for every candidate on one case: its time and error, or the reason why it has none."""
    rows = []
    for name, make in makers.items():
        row = {**case, "name": name}
        try:
            call = make()
            row["error"] = ((call()[:1].float() - reference).norm() / reference.norm()).item()
            graph = captured(call)
            row["after_zeroing_us"] = seconds_after_zeroing(graph) * 1e6
            elapsed = seconds_after_reading(graph)
            row |= {"after_reading_us": elapsed * 1e6, "tflops": flops / elapsed / 1e12}
            row["gb_per_s"] = nbytes / (2 if name in QUANTISED else 1) / elapsed / 1e9
            row["eager_us"] = eager_seconds(call) * 1e6
        except Exception as error:  # a peer that is absent or refuses is a row that says so
            row["why"] = f"{type(error).__name__}: {error}"[:200]
        rows.append(row)
    return rows


def paged_rows(batch: int, context: int, heads: int, kv_heads: int, page: int) -> list[dict]:
    t, blocks = tensors_of(page, lengths_of(batch, context))
    k, v = (torch.randn(blocks, page, kv_heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    q = torch.randn(batch, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    spec = AttentionSpec(HEAD_DIM**-0.5, window_right=0)
    one, used = first_sequence(t)
    reference = reference_paged(q[:1].float(), k[used].float(), v[used].float(), spec, one)[0]
    tokens = int(t.seqused_k.sum())
    nbytes, flops = 4.0 * tokens * kv_heads * HEAD_DIM, 4.0 * tokens * heads * HEAD_DIM
    case = {"op": "paged", "batch": batch, "context": context, "heads": heads, "kv_heads": kv_heads, "page": page}
    makers: dict[str, Callable] = {"torch fa2": lambda: torch_fa2(q, k, v, t), "fa3": lambda: fa3(q, k, v, t)}
    makers["octavo"] = lambda: ours("paged_attention", q, k, v, spec, t, 0)
    makers |= {name: lambda name=name: quantised(q, k, v, spec, t, name) for name in QUANTISED}
    return measure(case, makers, reference, nbytes, flops)


def mla_rows(batch: int, context: int, heads: int, page: int) -> list[dict]:
    t, blocks = tensors_of(page, lengths_of(batch, context))
    cache = torch.randn(blocks, page, LATENT + ROPE, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(batch, heads, LATENT + ROPE, device="cuda", dtype=torch.bfloat16)
    spec = AttentionSpec((128 + ROPE) ** -0.5, window_right=0)
    one, used = first_sequence(t)
    reference = reference_mla(q[:1].float(), cache[used].float(), LATENT, spec, one)[0]
    tokens = int(t.seqused_k.sum())
    nbytes, flops = 2.0 * tokens * (LATENT + ROPE), 2.0 * tokens * heads * (2 * LATENT + ROPE)
    case = {"op": "mla", "batch": batch, "context": context, "heads": heads, "kv_heads": 1, "page": page}
    makers: dict[str, Callable] = {"flash_mla": lambda: flash_mla(q, cache, t, spec.softmax_scale)}
    makers["octavo"] = lambda: ours("mla_decode", q, cache, LATENT, spec, t, 0)
    return measure(case, makers, reference, nbytes, flops)


def case_of(row: dict) -> str:
    heads = f"{row['heads']}/{row['kv_heads']}"
    return f"{row['op']} B={row['batch']} ctx={row['context'] or 'ragged'} {heads} page {row['page']}"


def peer_of(rows: list[dict]) -> dict[str, dict]:
    """The peer's row of each case: FA3 or FlashMLA."""
    return {case_of(row): row for row in rows if row["name"] in PEERS}


def summarise(rows: list[dict], ceiling: float) -> list[str]:
    """One line a candidate: times, their ratios to the peer's, rates, share of the copy's bandwidth, error."""
    lines = []
    peers = peer_of(rows)
    for row in rows:
        case = case_of(row)
        peer = peers[case]
        if "why" in row:
            lines.append(f"{case}: {row['name']}: {row['why']}")
        else:
            times = " / ".join(f"{row[key]:.1f}" for key in TIMES)
            ratios = " / ".join(f"{peer[key] / row[key]:.2f}" for key in TIMES) if "why" not in peer else "no ratio"
            lines.append(
                f"{case}: {row['name']} {times} us, {ratios} of {peer['name']}, {row['gb_per_s']:.0f} GB/s, "
                f"{row['tflops']:.0f} TFLOP/s, {row['gb_per_s'] / ceiling:.0%} of the copy, error {row['error']:.1e}"
            )
    return lines


def plot(source: Path, prefix: Path) -> None:
    """`{prefix}_paged.png` and `{prefix}_mla.png` of a JSON file: speed over the peer's, in both states of the L2."""
    import matplotlib.pyplot as plt

    results = json.loads(source.read_text())
    for op in ("paged", "mla"):
        rows = [row for row in results["rows"] if row["op"] == op]
        peers = peer_of(rows)
        cases = [case for case in dict.fromkeys(map(case_of, rows)) if "why" not in peers[case]]
        names = [name for name in dict.fromkeys(row["name"] for row in rows) if name not in PEERS]
        size = (12, 1.5 + 0.13 * len(cases) * len(names))
        figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
        for axis, key, title in zip(axes, TIMES, ("after zeroing (do_bench)", "after reading"), strict=False):
            for i, name in enumerate(names):
                found = {case_of(row): row for row in rows if row["name"] == name and "why" not in row}
                speed = [peers[case][key] / found[case][key] if case in found else 0.0 for case in cases]
                places = [y + (i + 0.5) / len(names) * 0.8 for y in range(len(cases))]
                axis.barh(places, speed, 0.8 / len(names), label=name)
            axis.axvline(1.0, color="black", linewidth=0.8)
            axis.set(title=title, xlabel=f"speed, {peers[cases[0]]['name']} = 1")
        axes[0].set_yticks([y + 0.4 for y in range(len(cases))], [case.removeprefix(f"{op} ") for case in cases])
        axes[0].invert_yaxis()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize=9)
        figure.suptitle(f"{results['machine']}, {results['date']}", fontsize=9)
        figure.savefig(prefix.with_name(f"{prefix.name}_{op}.png"), dpi=110)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("mla", "paged"))
    parser.add_argument("--pages", default="16,256", help="of keys and values")
    parser.add_argument("--latent-pages", default="64", help="of latents")
    parser.add_argument("--out", type=Path, help="JSON file for every row")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("JSON", "PREFIX"), help="draw a JSON file and end")
    args = parser.parse_args()
    if args.plot:
        plot(*args.plot)
        return
    ceiling = copy_gb_per_s()
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}"
    print(f"{machine}; copy {ceiling:.0f} GB/s")
    rows: list[dict] = []
    tables = {"mla": (MLA, args.latent_pages, mla_rows), "paged": (PAGED, args.pages, paged_rows)}
    for cases, pages, run in [tables[args.only]] if args.only else tables.values():
        for case in cases:
            for page in map(int, pages.split(",")):
                measured = run(*case, page)
                print("\n".join(summarise(measured, ceiling)), flush=True)
                rows += measured
    if args.out:
        about = {"machine": machine, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
        about |= {"command": " ".join(sys.argv), "copy_gb_per_s": ceiling}
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
