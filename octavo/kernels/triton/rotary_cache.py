"""Norms of the heads, rotation and the cache's writes in one launch, from the merged projection.

Separate ops would read and write queries and keys three times, in six or more launches per layer.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.spec import HeadNorm, Rotary, Tensor
from octavo.kernels.triton.early_launch import early_launch_options
from octavo.kernels.triton.launch import ceil_div, launch_by_arguments, next_power_of_2

_HEADS = 4  # of a program: enough programs for one token, enough work in each for many


@triton.jit
def turned(
    x, cos, sin, weight, used, eps,
    WIDTH: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, UNIT_OFFSET: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """(first of each pair, second, channels that do not turn) of rows x (H, 1 pointer each), and their offsets."""
    i = tl.arange(0, BLOCK_R)[None, :]
    half: tl.constexpr = ROTARY // 2
    at_a = 2 * i if INTERLEAVED else i
    at_b = 2 * i + 1 if INTERLEAVED else i + half
    at_rest = ROTARY + tl.arange(0, BLOCK_REST)[None, :]
    pairs = used & (i < half)
    others = used & (at_rest < WIDTH)
    a = tl.load(x + at_a, mask=pairs, other=0.0).to(tl.float32)
    b = tl.load(x + at_b, mask=pairs, other=0.0).to(tl.float32)
    rest = tl.load(x + at_rest, mask=others, other=0.0).to(tl.float32)
    if weight is not None:
        square = tl.sum(a * a, 1) + tl.sum(b * b, 1) + tl.sum(rest * rest, 1)
        scale = tl.rsqrt(square / WIDTH + eps)[:, None]
        offset = 1.0 if UNIT_OFFSET else 0.0
        a *= scale * (tl.load(weight + at_a, mask=i < half, other=0.0).to(tl.float32) + offset)
        b *= scale * (tl.load(weight + at_b, mask=i < half, other=0.0).to(tl.float32) + offset)
        rest *= scale * (tl.load(weight + at_rest, mask=at_rest < WIDTH, other=0.0).to(tl.float32) + offset)
    if ROTARY > 0:
        c = tl.load(cos + i, mask=i < half, other=0.0)
        s = tl.load(sin + i, mask=i < half, other=0.0)
        a, b = a * c - b * s, b * c + a * s
    return a, b, rest, at_a, at_b, at_rest, pairs, others


@triton.jit
def store_turned(to, a, b, rest, at_a, at_b, at_rest, pairs, others):
    tl.store(to + at_a, a.to(to.dtype.element_ty), mask=pairs)
    tl.store(to + at_b, b.to(to.dtype.element_ty), mask=pairs)
    tl.store(to + at_rest, rest.to(to.dtype.element_ty), mask=others)


@triton.jit(do_not_specialize=["block_size", "eps"])
def rotate_and_store_kernel(
    qkv, q, k_cache, v_cache, cos, sin, q_weight, k_weight, slot_mapping, stride_t, block_size, eps,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, UNIT_OFFSET: tl.constexpr, PDL: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one token; the second axis of the grid goes over q's heads, then k's, then v's."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    q_groups: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    kv_groups: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    row = qkv + token * stride_t
    cos += token * (ROTARY // 2)
    sin += token * (ROTARY // 2)
    h = tl.arange(0, BLOCK_H)[:, None]
    if group < q_groups:
        h += group * BLOCK_H
        a, b, rest, at_a, at_b, at_rest, pairs, others = turned(
            row + h * WIDTH, cos, sin, q_weight, h < HEADS, eps,
            WIDTH, ROTARY, INTERLEAVED, UNIT_OFFSET, BLOCK_R, BLOCK_REST,
        )  # fmt: skip
        store_turned(q + token * (HEADS * WIDTH) + h * WIDTH, a, b, rest, at_a, at_b, at_rest, pairs, others)
    else:
        slot = tl.load(slot_mapping + token).to(tl.int64)
        if slot >= 0:
            block = slot // block_size
            offset = slot % block_size
            if group < q_groups + kv_groups:
                h += (group - q_groups) * BLOCK_H
                a, b, rest, at_a, at_b, at_rest, pairs, others = turned(
                    row + HEADS * WIDTH + h * WIDTH, cos, sin, k_weight, h < KV_HEADS, eps,
                    WIDTH, ROTARY, INTERLEAVED, UNIT_OFFSET, BLOCK_R, BLOCK_REST,
                )  # fmt: skip
                to_k = k_cache + block * stride_kb + offset * stride_ks + h * stride_kh
                store_turned(to_k, a, b, rest, at_a, at_b, at_rest, pairs, others)
            else:
                h += (group - q_groups - kv_groups) * BLOCK_H
                d = tl.arange(0, BLOCK_D)[None, :]
                mask = (h < KV_HEADS) & (d < WIDTH)
                value = tl.load(row + (HEADS + KV_HEADS + h) * WIDTH + d, mask=mask)
                to_v = v_cache + block * stride_vb + offset * stride_vs + h * stride_vh + d
                tl.store(to_v, value.to(v_cache.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["block_size", "eps"])
def rotate_and_store_latent_kernel(
    latent, q, q_absorbed, weight, cos, sin, kv_cache, slot_mapping, stride_t, stride_qt, stride_qh, stride_at,
    stride_ah, block_size, eps, stride_cb, stride_cs,
    HEADS: tl.constexpr, RANK: tl.constexpr, NOPE: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One token: program 0 writes its latent and rotary key, the others turn BLOCK_H heads of its query each."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    cos += token * (ROTARY // 2)
    sin += token * (ROTARY // 2)
    if group == 0:
        slot = tl.load(slot_mapping + token).to(tl.int64)
        if slot >= 0:
            to_row = kv_cache + (slot // block_size) * stride_cb + (slot % block_size) * stride_cs
            d = tl.arange(0, BLOCK_RANK)
            x = tl.load(latent + token * stride_t + d, mask=d < RANK, other=0.0).to(tl.float32)
            x *= tl.rsqrt(tl.sum(x * x, 0) / RANK + eps) * tl.load(weight + d, mask=d < RANK, other=0.0).to(tl.float32)
            tl.store(to_row + d, x.to(kv_cache.dtype.element_ty), mask=d < RANK)
            one = tl.zeros((1, 1), tl.int32)
            a, b, rest, at_a, at_b, at_rest, pairs, others = turned(
                latent + token * stride_t + RANK + one, cos, sin, None, one == 0, eps,
                ROTARY, ROTARY, INTERLEAVED, False, BLOCK_R, 1,
            )  # fmt: skip
            store_turned(to_row + RANK + one, a, b, rest, at_a, at_b, at_rest, pairs, others)
    else:
        h = (group - 1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        a, b, rest, at_a, at_b, at_rest, pairs, others = turned(
            q + token * stride_qt + h * stride_qh + NOPE, cos, sin, None, h < HEADS, eps,
            ROTARY, ROTARY, INTERLEAVED, False, BLOCK_R, 1,
        )  # fmt: skip
        to = q_absorbed + token * stride_at + h * stride_ah + RANK
        store_turned(to, a, b, rest, at_a, at_b, at_rest, pairs, others)


def refuses_rotate_and_store(
    qkv: Tensor, num_heads: int, rotary: Rotary | None, norm: HeadNorm | None, k_cache: Tensor, v_cache: Tensor,
    slot_mapping: Tensor,
) -> str | None:  # fmt: skip
    """Why this backend cannot take the call, or None."""
    if qkv.dtype == torch.float64:
        return "it computes in fp32"
    if qkv.stride(-1) != 1 or k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        return "it takes projections and caches whose last axis is contiguous"
    if k_cache.shape != v_cache.shape:
        return "it takes keys and values of one width"
    return None if k_cache.dtype.is_floating_point else f"it writes floating-point caches, not {k_cache.dtype}"


def rotate_and_store(
    qkv: Tensor, num_heads: int, rotary: Rotary | None, norm: HeadNorm | None, k_cache: Tensor, v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:  # fmt: skip
    """qkv (T, (Hq + 2·Hkv)·D) → q (T, Hq, D), normalised and turned; k, likewise, and v go into their slots."""
    tokens = qkv.shape[0]
    block_size, num_kv_heads, width = k_cache.shape[1:]
    q = torch.empty((tokens, num_heads, width), dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return q
    cos, sin, interleaved = (qkv, qkv, False) if rotary is None else rotary
    rotary_dim = 0 if rotary is None else 2 * cos.shape[-1]
    heads = min(_HEADS, next_power_of_2(max(num_heads, num_kv_heads)))
    groups = ceil_div(num_heads, heads) + 2 * ceil_div(num_kv_heads, heads)
    early = early_launch_options(qkv.device)["PDL"]
    q_weight, k_weight, eps, unit_offset = (None, None, 0.0, False) if norm is None else norm
    arguments = (
        qkv, q, k_cache, v_cache, cos, sin, q_weight, k_weight, slot_mapping, qkv.stride(0), block_size, eps,
        *k_cache.stride()[:3], *v_cache.stride()[:3],
    )  # fmt: skip
    constants = (
        ("HEADS", num_heads), ("KV_HEADS", num_kv_heads), ("WIDTH", width), ("ROTARY", rotary_dim),
        ("INTERLEAVED", interleaved), ("UNIT_OFFSET", unit_offset), ("PDL", early), ("BLOCK_H", heads),
        ("BLOCK_R", next_power_of_2(max(rotary_dim // 2, 1))),
        ("BLOCK_REST", next_power_of_2(max(width - rotary_dim, 1))),
        ("BLOCK_D", next_power_of_2(width)),
    )  # fmt: skip
    num_warps = max(1, min(4, heads * width // 128))
    launch_by_arguments(
        rotate_and_store_kernel, (tokens, groups, 1), arguments, constants, num_warps=num_warps, launch_pdl=early
    )
    return q


def rotate_and_store_latent(
    latent: Tensor, q: Tensor, q_absorbed: Tensor, weight: Tensor, eps: float, rotary: Rotary, kv_cache: Tensor,
    slot_mapping: Tensor,
) -> None:  # fmt: skip
    """latent (T, R + rope): [norm, turned] into the cache's slots; the last rope channels of q (T, H, nope + rope),
    turned, into those of q_absorbed (T, H, R + rope)."""
    tokens, num_heads, q_width = q.shape
    rank = weight.shape[0]
    rotary_dim = latent.shape[1] - rank
    if tokens == 0:
        return
    heads = min(_HEADS, next_power_of_2(num_heads))
    early = early_launch_options(latent.device)["PDL"]
    arguments = (
        latent, q, q_absorbed, weight, rotary.cos, rotary.sin, kv_cache, slot_mapping,
        latent.stride(0), *q.stride()[:2], *q_absorbed.stride()[:2], kv_cache.shape[1], eps, *kv_cache.stride()[:2],
    )  # fmt: skip
    constants = (
        ("HEADS", num_heads), ("RANK", rank), ("NOPE", q_width - rotary_dim), ("ROTARY", rotary_dim),
        ("INTERLEAVED", rotary.interleaved), ("PDL", early), ("BLOCK_H", heads),
        ("BLOCK_RANK", next_power_of_2(rank)), ("BLOCK_R", next_power_of_2(rotary_dim // 2)),
    )  # fmt: skip
    grid = (tokens, 1 + ceil_div(num_heads, heads), 1)
    launch_by_arguments(rotate_and_store_latent_kernel, grid, arguments, constants, num_warps=4, launch_pdl=early)
