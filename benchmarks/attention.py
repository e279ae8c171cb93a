"""Dense attention forward and backward on one GPU: octavo's backends beside every peer that can be imported.

    PYTHONPATH=. python3 benchmarks/attention.py [--dims 64,128,256] [--seqlens 1024,4096,16384] [--out results.json]
    PYTHONPATH=. python3 benchmarks/attention.py --plot results.json attention  # attention_forward.png, …_backward.png

Shapes are those of the FlashAttention-3 paper: bf16, hidden size 2048, 16k tokens in all (batch = 16384 / seqlen).
Peers are torch's cuDNN and FlashAttention-2, FlexAttention, FA3 (vLLM's build) and FA4 (CuTe DSL). All run in one
process on the same tensors; each is checked on one head against fp32. TFLOP/s count 4·B·S²·H·D forward, half of it when
causal, 2.5 times as much backward. The ceiling is a bf16 8192³ product measured in the same run.
"""

import argparse
import functools
import importlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from octavo.kernels.spec import AttentionSpec, AttentionTensors

HIDDEN, TOKENS = 2048, 16384
OURS = ("triton", "hopper", "hopper-deterministic")
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Runnable(NamedTuple):
    """Forward once, then whatever is to be timed; `backward(out)` gives (dq, dk, dv), None where there is none."""

    forward: Callable[[], torch.Tensor]
    backward: Callable[[torch.Tensor], QKV] | None
    saves_lse: bool = False  # its backward needs a forward's output and LSE


def seconds(fn: Callable[[], object], rep: float = 100) -> float:
    """Median time of one call, in seconds; `rep` milliseconds of repeats after a quarter of that for warming up."""
    return do_bench(fn, warmup=rep / 4, rep=rep, return_mode="median") * 1e-3


def host_seconds(fn: Callable[[], object], calls: int = 500) -> float:
    """Time that the host takes to issue one call."""
    for _ in range(20):
        fn()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls


def autograd_runnable(call: Callable[[], torch.Tensor], qkv: QKV, dout: torch.Tensor) -> Runnable:
    """A peer whose backward is torch's autograd."""
    graph: list[torch.Tensor] = []

    def backward(_: torch.Tensor) -> QKV:
        if not graph:
            graph.append(call())
        return torch.autograd.grad(graph[0], qkv, dout, retain_graph=True)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return call()

    return Runnable(forward, backward)


def octavo(backend: str, qkv: QKV, dout: torch.Tensor, causal: bool) -> Runnable:
    """Our kernels, called directly; a refusal is an error that says why."""
    backend, _, deterministic = backend.partition("-")
    right = 0 if causal else -1
    spec = AttentionSpec(qkv[0].shape[-1] ** -0.5, window_right=right, deterministic=bool(deterministic))
    t = AttentionTensors()
    q, k, v = (x.detach() for x in qkv)
    forward_module = importlib.import_module(f"octavo.kernels.{backend}.flash_fwd")
    reason = forward_module.refuses_flash_fwd(q, k, v, spec, t)
    if reason:
        raise ValueError(reason)
    state: dict[str, torch.Tensor] = {}

    def forward() -> torch.Tensor:
        out, state["lse"] = forward_module.flash_fwd(q, k, v, spec, t)
        return out

    try:
        backward_module = importlib.import_module(f"octavo.kernels.{backend}.flash_bwd")
    except ModuleNotFoundError:
        return Runnable(forward, None)
    return Runnable(forward, lambda out: backward_module.flash_bwd(dout, q, k, v, out, state["lse"], spec, t)[:3], True)


def torch_sdpa(kind: SDPBackend, qkv: QKV, dout: torch.Tensor, causal: bool) -> Runnable:
    """torch's own kernels."""

    def call() -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    return autograd_runnable(call, qkv, dout)


def flex(qkv: QKV, dout: torch.Tensor, causal: bool) -> Runnable:
    """FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    length = qkv[0].shape[1]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cuda") if causal else None

    def call() -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        return compiled(q, k, v, block_mask=mask).transpose(1, 2)

    return autograd_runnable(call, qkv, dout)


def fa3(qkv: QKV, dout: torch.Tensor, causal: bool) -> Runnable:
    """FlashAttention-3 of vLLM's wheel: forward only."""
    from vllm.vllm_flash_attn import flash_attn_interface

    batch, length = qkv[0].shape[:2]
    cu = torch.arange(0, (batch + 1) * length, length, device="cuda", dtype=torch.int32)
    q, k, v = (x.detach().flatten(0, 1) for x in qkv)

    def forward() -> torch.Tensor:
        return flash_attn_interface.flash_attn_varlen_func(
            q,
            k,
            v,
            max_seqlen_q=length,
            cu_seqlens_q=cu,
            max_seqlen_k=length,
            cu_seqlens_k=cu,
            causal=causal,
            fa_version=3,
        ).view(qkv[0].shape)

    return Runnable(forward, None)


def fa4(qkv: QKV, dout: torch.Tensor, causal: bool) -> Runnable:
    """FlashAttention-4 (CuTe DSL)."""
    from flash_attn.cute import flash_attn_func

    def call() -> torch.Tensor:
        out = flash_attn_func(*qkv, causal=causal)
        return out[0] if isinstance(out, tuple) else out

    return autograd_runnable(call, qkv, dout)


CANDIDATES: dict[str, Callable[..., Runnable]] = {
    **{name: (lambda *a, name=name: octavo(name, *a)) for name in OURS},
    "cudnn": lambda *a: torch_sdpa(SDPBackend.CUDNN_ATTENTION, *a),
    "fa2": lambda *a: torch_sdpa(SDPBackend.FLASH_ATTENTION, *a),
    "flex": flex,
    "fa3": fa3,
    "fa4": fa4,
}


def fp32_head(qkv: QKV, dout: torch.Tensor, causal: bool) -> list[torch.Tensor]:
    """Output and gradients of batch 0, head 0 in fp32."""
    leaves = [x.detach()[:1, :, :1].transpose(1, 2).float().requires_grad_() for x in qkv]
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*leaves, is_causal=causal)
    grads = torch.autograd.grad(out, leaves, dout[:1, :, :1].transpose(1, 2).float())
    return [x.detach().transpose(1, 2) for x in (out, *grads)]


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x.detach()[:1, :, :1].float() - reference).norm() / reference.norm()).item()


def peak_bytes(make: Callable[[], Runnable]) -> int:
    """Memory that one forward and backward adds to the inputs, at its peak."""
    runnable = make()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    # autograd's backward runs its own forward first, so ours must not be counted beside it
    runnable.backward(runnable.forward() if runnable.saves_lse else None)
    return torch.cuda.max_memory_allocated() - before


def measure(
    name: str, qkv: QKV, dout: torch.Tensor, causal: bool, reference: list[torch.Tensor], rep: float
) -> dict[str, object]:
    """One candidate on one shape: TFLOP/s and relative errors, or the reason why there are none."""
    batch, length, heads, head_dim = qkv[0].shape
    flops = 4 * batch * length**2 * heads * head_dim / (2 if causal else 1)
    row: dict[str, object] = {"head_dim": head_dim, "causal": causal, "seqlen": length, "name": name}
    try:
        runnable = CANDIDATES[name](qkv, dout, causal)
        out = runnable.forward()
        row["error"] = relative_error(out, reference[0])
        row["forward"] = flops / seconds(runnable.forward, rep) / 1e12
        if runnable.backward is not None:
            grads = runnable.backward(out)
            row["grad_error"] = max(relative_error(g, r) for g, r in zip(grads, reference[1:], strict=True))
            row["peak_bytes"] = peak_bytes(lambda: CANDIDATES[name](qkv, dout, causal))
            row["backward"] = 2.5 * flops / seconds(lambda: runnable.backward(out), rep) / 1e12
    except Exception as error:  # a peer that is absent or refuses is a row that says so
        row["why"] = f"{type(error).__name__}: {error}"[:200]
    return row


def summarise(rows: list[dict[str, object]], ceiling: float) -> list[str]:
    """One line a shape and pass: ours, the best peer, the ratio, the share of the ceiling."""
    lines = []
    ratios: dict[tuple[str, str], list[float]] = {}
    shapes = dict.fromkeys((r["head_dim"], r["causal"], r["seqlen"]) for r in rows)
    for shape in shapes:
        for direction in ("forward", "backward"):
            speeds = {
                r["name"]: r[direction]
                for r in rows
                if (r["head_dim"], r["causal"], r["seqlen"]) == shape and direction in r
            }
            peers = {name: speed for name, speed in speeds.items() if name not in OURS}
            best = max(peers, key=peers.get) if peers else None
            for name in OURS:
                if name in speeds:
                    ratio = f"{speeds[name] / peers[best]:.2f} of {best} {peers[best]:.0f}" if best else "no peer"
                    lines.append(
                        f"D={shape[0]} causal={shape[1]} S={shape[2]} {direction}: {name} {speeds[name]:.0f} TFLOP/s, "
                        f"{ratio}, {speeds[name] / ceiling:.0%} of the ceiling"
                    )
                    if best:
                        ratios.setdefault((name, direction), []).append(speeds[name] / peers[best])
    for (name, direction), values in ratios.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        lines.append(f"{name} {direction}: {mean:.3f} of the best peer in geometric mean of {len(values)} shapes")
    return lines


def host_times(names: list[str]) -> dict[str, float]:
    """Microseconds of host time for one forward and one backward of each on a small causal shape."""
    qkv = tuple(torch.randn(1, 256, 2, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    dout = torch.randn(1, 256, 2, 128, device="cuda", dtype=torch.bfloat16)
    times = {}
    for name in names:
        try:
            runnable = CANDIDATES[name](qkv, dout, True)
            out = runnable.forward()
            times[f"{name} forward"] = host_seconds(runnable.forward) * 1e6
            if runnable.backward is not None:
                times[f"{name} backward"] = host_seconds(functools.partial(runnable.backward, out)) * 1e6
        except Exception as error:  # as in `measure`
            print(f"host time of {name}: {type(error).__name__}: {error}"[:200])
    return times


def plot(results: Path, prefix: Path) -> None:
    """`{prefix}_forward.png` and `{prefix}_backward.png` of a JSON file: one panel for each head size and mask."""
    import matplotlib.pyplot as plt

    data = json.loads(results.read_text())
    for direction in ("forward", "backward"):
        # the deterministic form differs in the backward alone
        rows = [r for r in data["rows"] if direction in r and (direction == "backward" or "-" not in r["name"])]
        masks, dims, names = (list(dict.fromkeys(r[key] for r in rows)) for key in ("causal", "head_dim", "name"))
        size, options = (4 * len(dims), 3 * len(masks) + 0.6), {"sharey": True, "squeeze": False}
        figure, axes = plt.subplots(len(masks), len(dims), figsize=size, layout="constrained", **options)
        for panel, causal, head_dim in ((axes[i][j], m, d) for i, m in enumerate(masks) for j, d in enumerate(dims)):
            shown = [row for row in rows if (row["causal"], row["head_dim"]) == (causal, head_dim)]
            lengths = list(dict.fromkeys(row["seqlen"] for row in shown))
            for place, name in enumerate(names):
                bars = {row["seqlen"]: row[direction] for row in shown if row["name"] == name}
                at = [i + (place - (len(names) - 1) / 2) * 0.8 / len(names) for i in range(len(lengths))]
                panel.bar(at, [bars.get(length, 0) for length in lengths], 0.8 / len(names), label=name)
            panel.axhline(data["ceiling_tflops"], color="grey", linewidth=0.8, linestyle="--")
            panel.set_xticks(range(len(lengths)), [f"{length // 1024}k" for length in lengths])
            panel.set_title(f"head size {head_dim}, {'causal' if causal else 'no mask'}", fontsize=10)
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize=9)
        figure.supylabel("TFLOP/s")
        figure.suptitle(f"attention {direction}: {data['machine']}; dashed: a bf16 product of 8192³", fontsize=10)
        figure.savefig(prefix.with_name(f"{prefix.name}_{direction}.png"), dpi=110)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", default="64,128,256")
    parser.add_argument("--seqlens", default="1024,4096,16384")
    parser.add_argument("--names", default=",".join(CANDIDATES), help="which of " + ", ".join(CANDIDATES))
    parser.add_argument("--causal", choices=("no", "yes", "both"), default="both")
    parser.add_argument("--rep", type=float, default=100, help="milliseconds that each kernel is repeated for")
    parser.add_argument("--out", type=Path, help="JSON file for every row")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("JSON", "PREFIX"), help="draw a JSON file and end")
    args = parser.parse_args()
    if args.plot:
        plot(*args.plot)
        return
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    ceiling = 2 * 8192**3 / seconds(lambda: a @ b) / 1e12
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}"
    print(f"{machine}; ceiling {ceiling:.0f} TFLOP/s")
    rows = []
    for head_dim in map(int, args.dims.split(",")):
        for causal in {"no": (False,), "yes": (True,), "both": (False, True)}[args.causal]:
            for length in map(int, args.seqlens.split(",")):
                shape = (max(1, TOKENS // length), length, HIDDEN // head_dim, head_dim)
                qkv = tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
                dout = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
                reference = fp32_head(qkv, dout, causal)
                for name in args.names.split(","):
                    rows.append(measure(name, qkv, dout, causal, reference, args.rep))
                    print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    host = host_times(args.names.split(","))
    print("\n".join([*summarise(rows, ceiling), *(f"host time, {name}: {us:.0f} µs" for name, us in host.items())]))
    if args.out:
        results = {"machine": machine, "ceiling_tflops": ceiling, "rows": rows, "host_us": host}
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
