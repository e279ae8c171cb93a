"""RMSNorm, alone or behind the residual sum, a program per row: x is read once, where separate ops read it three
times."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.spec import Tensor
from octavo.kernels.triton.early_launch import early_launch_options
from octavo.kernels.triton.launch import launch_by_arguments, next_power_of_2

_WIDEST = 16384  # columns that one program holds in registers


@triton.jit(do_not_specialize=["eps"])
def rms_norm_kernel(
    x, residual, weight, out, total, stride_x, stride_r, eps,
    WIDTH: tl.constexpr, UNIT_OFFSET: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row `pid` of x (T, WIDTH), plus that of `residual` if there is one; out and total are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    used = d < WIDTH
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    scale = tl.load(weight + d, mask=used, other=0.0).to(tl.float32)
    value = tl.load(x + row * stride_x + d, mask=used, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row * stride_r + d, mask=used, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * WIDTH + d, rounded, mask=used)
        value = rounded.to(tl.float32)  # the norm of what the stream holds
    if UNIT_OFFSET:
        scale += 1.0
    mean_square = tl.sum(value * value, 0) / WIDTH
    value = value * tl.rsqrt(mean_square + eps) * scale
    tl.store(out + row * WIDTH + d, value.to(out.dtype.element_ty), mask=used)


def refuses_rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> str | None:
    """Why this backend cannot take the call, or None."""
    if x.dtype == torch.float64:
        return "it computes in fp32"
    return None if x.shape[-1] <= _WIDEST else f"it holds rows of at most {_WIDEST} entries"


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    """x (…, D) of any layout; returns its shape and dtype, contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(_rows(x), None, weight, eps, unit_offset, out, None)
    return out


def refuses_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> str | None:
    """Why this backend cannot take the call, or None."""
    return refuses_rms_norm(x, weight, eps, unit_offset)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    """`(norm(x + residual), x + residual)`, both new and contiguous, in x's dtype."""
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(_rows(x), _rows(residual), weight, eps, unit_offset, out, total)
    return out, total


def _rows(x: Tensor) -> Tensor:
    """(T, D) with contiguous columns; copies only what has no such view."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, unit_offset: bool, out: Tensor, total: Tensor | None
) -> None:
    rows, width = x.shape
    if rows == 0:
        return
    block = next_power_of_2(width)
    early = early_launch_options(x.device)["PDL"]
    stride_r = 0 if residual is None else residual.stride(0)
    arguments = (x, residual, weight, out, total, x.stride(0), stride_r, eps)
    constants = (("WIDTH", width), ("UNIT_OFFSET", unit_offset), ("PDL", early), ("BLOCK", block))
    num_warps = min(max(block // 512, 1), 16)
    launch_by_arguments(rms_norm_kernel, (rows, 1, 1), arguments, constants, num_warps=num_warps, launch_pdl=early)
