"""MLA's absorbed projections of a few tokens: W_UK into the queries, with all that the cache write needs beside it, and
W_UV onto the output. A library's batched product takes 5 µs for what reads 2 MB.

Each program holds a tile of one head's matrix, which is loaded before the kernel's wait, for all tokens.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.spec import Rotary, Tensor
from octavo.kernels.triton.early_launch import early_launch_options
from octavo.kernels.triton.launch import ceil_div, launch_by_arguments, next_power_of_2
from octavo.kernels.triton.rotary_cache import rotate_and_store_latent, store_turned, turned

MOST_TOKENS = 16


@triton.jit(do_not_specialize=["tokens", "block_size", "eps"])
def absorb_and_store_kernel(
    latent, q, weight, q_absorbed, norm_weight, cos, sin, kv_cache, slot_mapping, tokens, stride_lt, stride_qt,
    stride_qh, stride_wh, stride_wn, stride_at, stride_ah, block_size, eps, stride_cb, stride_cs,
    HEADS: tl.constexpr, RANK: tl.constexpr, NOPE: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_NOPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (h, j), h < HEADS: BLOCK_N columns of head h's absorbed queries; the first of them turns its rotary
    channels, too. Program (HEADS + t, 0): token t's latent and rotary key, into their slot."""
    head = tl.program_id(0)
    part = tl.program_id(1)
    if head < HEADS:
        n = part * BLOCK_N + tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_NOPE)
        at = weight + head.to(tl.int64) * stride_wh + d[:, None] * stride_wn + n[None, :]
        tile = tl.load(at, mask=(d < NOPE)[:, None] & (n < RANK)[None, :], other=0.0)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        t = tl.arange(0, BLOCK_T)
        row = q + t.to(tl.int64)[:, None] * stride_qt + head * stride_qh
        x = tl.load(row + d[None, :], mask=(t < tokens)[:, None] & (d < NOPE)[None, :], other=0.0)
        to = q_absorbed + t.to(tl.int64)[:, None] * stride_at + head * stride_ah
        y = tl.dot(x, tile)
        tl.store(to + n[None, :], y.to(q_absorbed.dtype.element_ty), mask=(t < tokens)[:, None] & (n < RANK)[None, :])
        if part == 0:
            angle = t[:, None] * (ROTARY // 2)
            a, b, rest, at_a, at_b, at_rest, pairs, others = turned(
                row + NOPE, cos + angle, sin + angle, None, (t < tokens)[:, None], eps,
                ROTARY, ROTARY, INTERLEAVED, False, BLOCK_R, 1,
            )  # fmt: skip
            store_turned(to + RANK, a, b, rest, at_a, at_b, at_rest, pairs, others)
    else:
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        token = (head - HEADS).to(tl.int64)
        slot = tl.load(slot_mapping + token).to(tl.int64)
        if (part == 0) & (slot >= 0):
            to_row = kv_cache + (slot // block_size) * stride_cb + (slot % block_size) * stride_cs
            r = tl.arange(0, BLOCK_RANK)
            c = tl.load(latent + token * stride_lt + r, mask=r < RANK, other=0.0).to(tl.float32)
            c *= tl.rsqrt(tl.sum(c * c, 0) / RANK + eps)
            c *= tl.load(norm_weight + r, mask=r < RANK, other=0.0).to(tl.float32)
            tl.store(to_row + r, c.to(kv_cache.dtype.element_ty), mask=r < RANK)
            one = tl.zeros((1, 1), tl.int32)
            angle = token * (ROTARY // 2) + one
            a, b, rest, at_a, at_b, at_rest, pairs, others = turned(
                latent + token * stride_lt + RANK + one, cos + angle, sin + angle, None, one == 0, eps,
                ROTARY, ROTARY, INTERLEAVED, False, BLOCK_R, 1,
            )  # fmt: skip
            store_turned(to_row + RANK + one, a, b, rest, at_a, at_b, at_rest, pairs, others)


@triton.jit(do_not_specialize=["tokens"])
def values_kernel(
    x, weight, out, tokens, stride_xt, stride_xh, stride_wh, stride_wn,
    HEADS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of one head: out (T, HEADS, WIDTH) = x (T, HEADS, RANK) · weight (HEADS, WIDTH, RANK)ᵀ."""
    head = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_RANK)
    at = weight + head.to(tl.int64) * stride_wh + n[:, None] * stride_wn + r[None, :]
    tile = tl.load(at, mask=(n < WIDTH)[:, None] & (r < RANK)[None, :], other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    t = tl.arange(0, BLOCK_T)
    row = x + t.to(tl.int64)[:, None] * stride_xt + head * stride_xh
    value = tl.load(row + r[None, :], mask=(t < tokens)[:, None] & (r < RANK)[None, :], other=0.0)
    y = tl.dot(value, tile.T)
    to = out + (t.to(tl.int64)[:, None] * HEADS + head) * WIDTH + n[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=(t < tokens)[:, None] & (n < WIDTH)[None, :])


def refuses_absorb_and_store(
    latent: Tensor, q: Tensor, up_k: Tensor, norm_weight: Tensor, eps: float, rotary: Rotary, kv_cache: Tensor,
    slot_mapping: Tensor,
) -> str | None:  # fmt: skip
    """Why this backend cannot take the call, or None."""
    if latent.dtype == torch.float64 or up_k.dtype != q.dtype:
        return f"it multiplies tensors of one dtype up to fp32, not {q.dtype} by {up_k.dtype}"
    if any(x.stride(-1) != 1 for x in (latent, q, up_k, kv_cache)):
        return "it takes tensors whose last axis is contiguous"
    return None if kv_cache.dtype.is_floating_point else f"it writes floating-point caches, not {kv_cache.dtype}"


def absorb_and_store(
    latent: Tensor, q: Tensor, up_k: Tensor, norm_weight: Tensor, eps: float, rotary: Rotary, kv_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:  # fmt: skip
    """latent (T, R + rope), q (T, H, nope + rope), up_k (H, nope, R) → absorbed queries (T, H, R + rope); the latent,
    normalised, and its rotary key, turned, are in the cache."""
    tokens, num_heads, width = q.shape
    rank = norm_weight.shape[0]
    rotary_dim = latent.shape[1] - rank
    q_absorbed = torch.empty((tokens, num_heads, rank + rotary_dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return q_absorbed
    if tokens > MOST_TOKENS or (q.dtype == torch.float32 and q.is_cuda):  # fp32 would be multiplied as tf32
        nope = q[..., : width - rotary_dim].transpose(0, 1)
        torch.bmm(nope, up_k, out=q_absorbed[..., :rank].transpose(0, 1))
        rotate_and_store_latent(latent, q, q_absorbed, norm_weight, eps, rotary, kv_cache, slot_mapping)
        return q_absorbed
    block_n = 64
    early = early_launch_options(q.device)["PDL"]
    arguments = (
        latent, q, up_k, q_absorbed, norm_weight, rotary.cos, rotary.sin, kv_cache, slot_mapping, tokens,
        latent.stride(0), *q.stride()[:2], *up_k.stride()[:2], *q_absorbed.stride()[:2], kv_cache.shape[1], eps,
        *kv_cache.stride()[:2],
    )  # fmt: skip
    constants = (
        ("HEADS", num_heads), ("RANK", rank), ("NOPE", width - rotary_dim), ("ROTARY", rotary_dim),
        ("INTERLEAVED", rotary.interleaved), ("PDL", early), ("BLOCK_T", 16),
        ("BLOCK_RANK", next_power_of_2(rank)),
        ("BLOCK_NOPE", max(16, next_power_of_2(width - rotary_dim))), ("BLOCK_N", block_n),
        ("BLOCK_R", next_power_of_2(rotary_dim // 2)),
    )  # fmt: skip
    grid = (num_heads + tokens, ceil_div(rank, block_n), 1)
    launch_by_arguments(absorb_and_store_kernel, grid, arguments, constants, num_warps=4, launch_pdl=early)
    return q_absorbed


def refuses_project_values(x: Tensor, up_v: Tensor) -> str | None:
    """Why this backend cannot take the call, or None."""
    if x.dtype == torch.float64 or up_v.dtype != x.dtype:
        return f"it multiplies tensors of one dtype up to fp32, not {x.dtype} by {up_v.dtype}"
    return None if x.stride(-1) == 1 and up_v.stride(-1) == 1 else "it takes tensors whose last axis is contiguous"


def project_values(x: Tensor, up_v: Tensor) -> Tensor:
    """x (T, H, R), up_v (H, v, R) → (T, H, v)."""
    tokens, num_heads, rank = x.shape
    width = up_v.shape[1]
    out = torch.empty((tokens, num_heads, width), dtype=x.dtype, device=x.device)
    if tokens > MOST_TOKENS or (x.dtype == torch.float32 and x.is_cuda):
        torch.bmm(x.transpose(0, 1), up_v.transpose(1, 2), out=out.transpose(0, 1))
        return out
    if tokens:
        block_n = 16
        early = early_launch_options(x.device)["PDL"]
        launch_by_arguments(
            values_kernel, (num_heads, ceil_div(width, block_n), 1),
            (x, up_v, out, tokens, *x.stride()[:2], *up_v.stride()[:2]),
            (("HEADS", num_heads), ("RANK", rank), ("WIDTH", width), ("PDL", early), ("BLOCK_T", 16),
             ("BLOCK_RANK", max(16, next_power_of_2(rank))), ("BLOCK_N", block_n)),
            num_warps=4, launch_pdl=early,
        )  # fmt: skip
    return out
