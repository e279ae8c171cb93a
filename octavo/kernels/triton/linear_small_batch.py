"""y = W·x for one token, at the speed of reading W, with what surrounds the product in the same launch: the norm of
x before it; bias, gated activation and residual sum behind it.

A program owns BLOCK_N rows of W and holds the next tile in registers while it works on one. W depends on no earlier
kernel, so with programmatic dependent launch (sm_90) the first tile is fetched while the kernel before still runs;
`griddepcontrol.wait` stands before the first read of anything else.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.spec import InputNorm, Tensor
from octavo.kernels.triton.early_launch import early_launch_options
from octavo.kernels.triton.gated_activation import activate
from octavo.kernels.triton.launch import ceil_div, launch_by_arguments
from octavo.kernels.triton.norm import rms_norm


@triton.jit
def _tile(weight, n, k, rows, width):
    """Rows n, columns k of weight (rows, width), 0 outside."""
    mask = (n < rows)[:, None] & (k < width)[None, :]
    at = weight + n.to(tl.int64)[:, None] * width + k[None, :]
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["eps"])
def gemv_kernel(
    x, weight, bias, norm_weight, residual, out, rows, width, eps,
    KIND: tl.constexpr, UNIT_OFFSET: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N entries of out (rows,): act(gate) · up where KIND names an activation, with W (2·rows, width), gate's
    rows first; else W (rows, width). x, norm_weight (width,), bias as out's rows of W, residual (rows,)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    tile = _tile(weight, n, k, rows, width)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    square = tl.zeros((BLOCK_K,), tl.float32)
    if KIND is not None:
        up_weight = weight + rows.to(tl.int64) * width
        up_tile = _tile(up_weight, n, k, rows, width)
        up_acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for k0 in range(0, width, BLOCK_K):
        at = k0 + k
        value = tl.load(x + at, mask=at < width, other=0.0).to(tl.float32)
        if norm_weight is not None:
            square += value * value
            scale = tl.load(norm_weight + at, mask=at < width, other=0.0).to(tl.float32)
            value *= scale + 1.0 if UNIT_OFFSET else scale
        following = _tile(weight, n, at + BLOCK_K, rows, width)
        acc += tile.to(tl.float32) * value[None, :]
        tile = following
        if KIND is not None:
            up_following = _tile(up_weight, n, at + BLOCK_K, rows, width)
            up_acc += up_tile.to(tl.float32) * value[None, :]
            up_tile = up_following
    scale = 1.0
    if norm_weight is not None:
        scale = tl.rsqrt(tl.sum(square, 0) / width + eps)
    y = tl.sum(acc, 1) * scale
    used = n < rows
    if bias is not None:
        y += tl.load(bias + n, mask=used, other=0.0).to(tl.float32)
    if KIND is not None:
        up = tl.sum(up_acc, 1) * scale
        if bias is not None:
            up += tl.load(bias + rows + n, mask=used, other=0.0).to(tl.float32)
        y = activate(y, KIND) * up
    if residual is not None:
        y += tl.load(residual + n, mask=used, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=used)


@triton.jit(do_not_specialize=["batch"])
def gemv_dot_kernel(
    x, weight, bias, residual, out, batch, rows, width, stride_x, stride_r,
    KIND: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As `gemv_kernel` for x (batch, width), batch <= BLOCK_M, by matrix instructions, without a norm; out (batch,
    rows)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if KIND is not None:
        up_weight = weight + rows.to(tl.int64) * width
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for k0 in range(0, width, BLOCK_K):
        at = k0 + k
        mask = (m < batch)[:, None] & (at < width)[None, :]
        value = tl.load(x + m[:, None] * stride_x + at[None, :], mask=mask, other=0.0)
        acc = tl.dot(value, _tile(weight, n, at, rows, width).T, acc)
        if KIND is not None:
            up = tl.dot(value, _tile(up_weight, n, at, rows, width).T, up)
    used = (m < batch)[:, None] & (n < rows)[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    if KIND is not None:
        if bias is not None:
            up += tl.load(bias + rows + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
        acc = activate(acc, KIND) * up
    if residual is not None:
        acc += tl.load(residual + m[:, None] * stride_r + n[None, :], mask=used, other=0.0).to(tl.float32)
    tl.store(out + m[:, None] * rows + n[None, :], acc.to(out.dtype.element_ty), mask=used)


MOST_ROWS = 16  # of x; beyond, a library's matrix product reads W as fast
MOST_BYTES_EARLY = 64 << 20  # of W; 4096×14336 by 8 rows took 46.7 µs with an early launch, 43.1 without


def refuses_linear_small_batch(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: InputNorm | None, activation: str | None,
    residual: Tensor | None, out_dtype: torch.dtype,
) -> str | None:  # fmt: skip
    """Why this backend cannot take the call, or None."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or weight.dtype != x.dtype:
        return f"it multiplies tensors of one dtype up to fp32, not {x.dtype} by {weight.dtype}"
    if x.shape[0] > MOST_ROWS:
        return f"it takes at most {MOST_ROWS} rows"
    if x.shape[0] > 1 and x.dtype == torch.float32 and x.is_cuda:
        return "its matrix instructions would multiply fp32 as tf32"
    contiguous = weight.is_contiguous() and x.stride(1) == 1 and (residual is None or residual.stride(1) == 1)
    return None if contiguous else "it takes contiguous rows"


def linear_small_batch(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: InputNorm | None, activation: str | None,
    residual: Tensor | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x (M, K), weight (N, K) → (M, N), or (M, N / 2) gated."""
    batch, width = x.shape
    rows = weight.shape[0] if activation is None else weight.shape[0] // 2
    out = torch.empty((batch, rows), dtype=out_dtype, device=x.device)
    early = early_launch_options(x.device)["PDL"]
    if batch == 1:
        norm_weight, eps, unit_offset = (None, 0.0, False) if norm is None else norm
        block_n, block_k, num_warps = gemv_tile(rows, width, activation is not None)
        launch_by_arguments(
            gemv_kernel, (ceil_div(rows, block_n), 1, 1),
            (x, weight, bias, norm_weight, residual, out, rows, width, eps),
            (("KIND", activation), ("UNIT_OFFSET", unit_offset), ("PDL", early), ("BLOCK_N", block_n),
             ("BLOCK_K", block_k)),
            num_warps=num_warps, launch_pdl=early,
        )  # fmt: skip
    elif batch:
        if norm is not None:  # inside, every program would sum all squares: twice the time of the product
            x = rms_norm(x, *norm)
        if weight.nbytes > MOST_BYTES_EARLY:
            early = False
        block_n, block_k, num_warps, num_stages = gemv_dot_tile(rows, width, activation is not None)
        stride_r = 0 if residual is None else residual.stride(0)
        launch_by_arguments(
            gemv_dot_kernel, (ceil_div(rows, block_n), 1, 1),
            (x, weight, bias, residual, out, batch, rows, width, x.stride(0), stride_r),
            (("KIND", activation), ("PDL", early), ("BLOCK_M", 16), ("BLOCK_N", block_n), ("BLOCK_K", block_k)),
            num_warps=num_warps, num_stages=num_stages, launch_pdl=early,
        )  # fmt: skip
    return out


def gemv_tile(rows: int, width: int, gated: bool) -> tuple[int, int, int]:
    """(BLOCK_N, BLOCK_K, warps).

    µs on an H100 beside the time to read W at 3.02 TB/s, and cuBLAS's (2026-11-24, Triton 3.6, graph of many W):
    1024×2048 2.6 / 1.4, 6.0; 4096×1024 4.0 / 2.8, 5.9; 4096×4096 12.0 / 11.1, 16.7; 4096×14336 38.8 / 38.9, 44.2;
    151936×1024 100 / 103, 112. Gated, with the norm: 6144×1024 5.7 / 4.2; 28672×4096 77.5 / 77.8.
    """
    if gated:
        return (8, 512, 4) if width <= 2048 else (4, 1024, 4)
    if rows <= 2048:
        return 2, 2048, 4
    return (4, 512, 4) if width <= 1024 else (4, 1024, 4)


def gemv_dot_tile(rows: int, width: int, gated: bool) -> tuple[int, int, int, int]:
    """(BLOCK_N, BLOCK_K, warps, stages).

    µs for 8 rows, as above: 1024×2048 4.9 / 1.4, 5.9; 4096×1024 5.3 / 2.8, 6.0; 4096×4096 14.9 / 11.1, 16.8;
    28672×4096 83 / 78, 86; 151936×1024 106 / 103, 114. Gated: 6144×1024 6.6 / 4.2; 28672×4096 81 / 78.
    """
    if gated:
        return 32, 256, 4, 3
    if rows <= 2048:
        return 16, 512, 4, 3
    if width > 8192:
        return 16, 256, 4, 5
    return (32, 128, 4, 4) if rows <= 6144 else (32, 256, 4, 3)
