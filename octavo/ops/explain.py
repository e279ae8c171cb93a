"""What a call would do, without doing it: the kernel, its tile, the bytes and FLOPs it needs, and the time that allows.

`octavo.explain(fn, *args, **kwargs)` runs the call as far as its first attention kernel, writes nothing, and accounts
for
that kernel: FLOPs are those of the two matmuls over the pairs that the mask lets see each other, bytes are each input
read once and each output written once (paged keys: those in use), and the roofline time is the larger of the two over
the device's peaks (Williams et al., "Roofline", 2009). Peaks are measured on first use: a matmul and a copy.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor
from octavo.ops import dispatch


@dataclass(frozen=True, slots=True)
class Peaks:
    """What a device reaches: FLOP/s of a large matmul, and bytes/s of a large copy, reads and writes both counted."""

    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """The account of one kernel call; `str()` of it is a table."""

    op: str
    backend: str
    kernel: str  # module of the backend
    plan: dict[str, Any]  # tile, splits and whatever else the backend says of itself
    passed_over: dict[str, str]  # each better kernel and why it does not serve this call
    flops: int
    bytes_moved: int
    peaks: Peaks
    double_backward: bool

    @property
    def arithmetic_intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / max(self.bytes_moved, 1)

    @property
    def roofline_seconds(self) -> float:
        """The least time that this device's peaks allow."""
        return max(self.flops / self.peaks.flops_per_second, self.bytes_moved / self.peaks.bytes_per_second)

    @property
    def bound(self) -> str:
        """What the roofline is set by: "compute" or "memory"."""
        compute = self.flops / self.peaks.flops_per_second
        return "compute" if compute >= self.bytes_moved / self.peaks.bytes_per_second else "memory"

    def __str__(self) -> str:
        lines = {
            "op": self.op,
            "kernel": f"{self.kernel} (backend {self.backend!r})",
            **{name.replace("_", " "): value for name, value in self.plan.items()},
            "FLOPs": f"{self.flops:.3e}",
            "bytes moved": f"{self.bytes_moved:.3e}",
            "arithmetic intensity": f"{self.arithmetic_intensity:.1f} FLOP/byte",
            "device peaks": f"{self.peaks.flops_per_second / 1e9:.0f} GFLOP/s, "
            f"{self.peaks.bytes_per_second / 1e9:.1f} GB/s",
            "roofline time": f"{self.roofline_seconds * 1e6:.1f} µs ({self.bound}-bound)",
            "double backward": "yes" if self.double_backward else "no; use_backend('reference') has one",
            **{f"not {name}": reason for name, reason in self.passed_over.items()},
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


class _Reached(Exception):
    """The call came to its attention kernel."""

    def __init__(self, op: str, choice: dispatch.Choice, arguments: tuple[Any, ...]) -> None:
        self.op, self.choice, self.arguments = op, choice, arguments


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """The account of `fn(*args, **kwargs)`: which kernel serves it, why not another, and what it costs at least.

    fn is any octavo attention function, or a function or module that calls one; the first attention kernel it reaches
    is explained. Nothing is computed by that kernel and no cache is written. Raises `ValueError` when fn reaches none.
    """
    try:
        with dispatch.intercept(_stop_at_attention), torch.no_grad():
            fn(*args, **kwargs)
    except _Reached as reached:
        return _account(reached.op, reached.choice, reached.arguments)
    raise ValueError(f"fn: expected a call that reaches an octavo attention kernel, {fn!r} reached none")


def _stop_at_attention(op: str, choice: dispatch.Choice, arguments: tuple[Any, ...]) -> None:
    if op in _SHAPES:
        raise _Reached(op, choice, arguments)


def _account(op: str, choice: dispatch.Choice, arguments: tuple[Any, ...]) -> Explanation:
    call = _SHAPES[op](*arguments)
    q, v_dim = call.q, call.head_dim_v
    pairs = _visible_pairs(call.rows, call.keys, call.spec)
    num_heads, head_dim = q.shape[-2:]
    flops = 2 * num_heads * pairs * (head_dim + v_dim)
    if call.tensors.qv is not None:
        flops += 2 * num_heads * pairs * v_dim
    out_bytes = q[..., 0].numel() * (v_dim * q.element_size() + 4)  # and the fp32 LSE
    bytes_moved = q.numel() * q.element_size() + call.key_bytes + out_bytes
    return Explanation(
        op=op,
        backend=choice.backend,
        kernel=choice.module,
        plan=_plan(choice, arguments),
        passed_over=choice.passed_over,
        flops=flops,
        bytes_moved=bytes_moved,
        peaks=device_peaks(q.device, q.dtype),
        double_backward=choice.backend == "reference" and op == "flash_fwd",
    )


def _plan(choice: dispatch.Choice, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """What the kernel's module says of its tile and splits for this call, if it has a `plan_<op>`."""
    plan = dispatch.beside(choice, "plan")
    return {"tile": "not told"} if plan is None else dict(plan(*arguments))


@dataclass(frozen=True, slots=True)
class _Call:
    q: Tensor
    head_dim_v: int
    key_bytes: int
    rows: list[int]
    keys: list[int]
    spec: AttentionSpec
    tensors: AttentionTensors


def _flash_call(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> _Call:
    rows = _lengths(q, t.cu_seqlens_q, t.seqused_q)
    keys = _lengths(k, t.cu_seqlens_k, t.seqused_k)
    key_bytes = sum(keys) * k.shape[-2] * (k.shape[-1] + v.shape[-1]) * k.element_size()
    return _Call(q, v.shape[-1], key_bytes, rows, keys, spec, t)


def _paged_call(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int
) -> _Call:
    rows, keys = _lengths(q, t.cu_seqlens_q, t.seqused_q), _lengths(q, None, t.seqused_k)
    width = k_cache.shape[-2] * (k_cache.shape[-1] + v_cache.shape[-1])
    return _Call(q, v_cache.shape[-1], sum(keys) * width * k_cache.element_size(), rows, keys, spec, t)


def _latent_call(
    q: Tensor, kv_cache: Tensor, head_dim_v: int, spec: AttentionSpec, t: AttentionTensors, num_splits: int
) -> _Call:
    rows, keys = _lengths(q, t.cu_seqlens_q, t.seqused_q), _lengths(q, None, t.seqused_k)
    return _Call(q, head_dim_v, sum(keys) * kv_cache.shape[-1] * kv_cache.element_size(), rows, keys, spec, t)


_SHAPES: dict[str, Callable[..., _Call]] = {
    "flash_fwd": _flash_call,
    "paged_attention": _paged_call,
    "mla_decode": _latent_call,
}


def _lengths(x: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None) -> list[int]:
    if seqused is not None:
        return [int(n) for n in seqused.tolist()]
    if cu_seqlens is not None:
        return [int(n) for n in cu_seqlens.diff().tolist()]
    return [x.shape[1]] * x.shape[0]


def _visible_pairs(rows: list[int], keys: list[int], spec: AttentionSpec) -> int:
    """How many (query, key) pairs the mask lets see each other, summed over the sequences."""
    return sum(_visible_pairs_of_one(sq, sk, spec) for sq, sk in zip(rows, keys, strict=True))


@functools.lru_cache(maxsize=4096)
def _visible_pairs_of_one(sq: int, sk: int, spec: AttentionSpec) -> int:
    diagonal = torch.arange(sq, dtype=torch.int64) + sk - sq
    first = torch.zeros_like(diagonal) if spec.window_left < 0 else diagonal - spec.window_left
    last = torch.full_like(diagonal, sk) if spec.window_right < 0 else diagonal + spec.window_right + 1
    return int((last.clamp(0, sk) - first.clamp(0, sk)).clamp(min=0).sum())


@functools.cache
def device_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """The peaks of this device in this dtype, measured once per process in about 0.2 s."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)
    source = torch.ones((1 << 26) if device.type == "cpu" else (1 << 30), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    matmul = _best_seconds(lambda: torch.mm(a, a), device)
    copy = _best_seconds(lambda: target.copy_(source), device)
    return Peaks(2 * size**3 / matmul, 2 * source.numel() / copy)


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several runs after one to warm up."""
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else int
    best = float("inf")
    for _ in range(6):
        wait()
        start = time.perf_counter()
        run()
        wait()
        best = min(best, time.perf_counter() - start)
    return max(best, 1e-9)
