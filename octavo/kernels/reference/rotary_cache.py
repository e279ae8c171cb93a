"""What a decode step does to the merged projection before it attends, in plain torch: norms of the heads, rotation,
and the writes into the cache."""

import torch

from octavo.kernels.reference.cache import store_kv_cache
from octavo.kernels.reference.norm import rms_norm
from octavo.kernels.spec import HeadNorm, Rotary, Tensor


def refuses_rotate_and_store(
    qkv: Tensor, num_heads: int, rotary: Rotary | None, norm: HeadNorm | None, k_cache: Tensor, v_cache: Tensor,
    slot_mapping: Tensor,
) -> str | None:  # fmt: skip
    """The reference takes every call."""
    return None


def rotate_and_store(
    qkv: Tensor, num_heads: int, rotary: Rotary | None, norm: HeadNorm | None, k_cache: Tensor, v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:  # fmt: skip
    """qkv (T, (Hq + 2·Hkv)·D) → q (T, Hq, D), normalised and turned; k, likewise, and v go into their slots."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.reshape(-1, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads[:, :num_heads], heads[:, num_heads:-num_kv_heads], heads[:, -num_kv_heads:]
    if norm is not None:
        q = rms_norm(q, norm.q_weight, norm.eps, norm.unit_offset)
        k = rms_norm(k, norm.k_weight, norm.eps, norm.unit_offset)
    if rotary is not None:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    store_kv_cache(k.detach(), v.detach(), k_cache, v_cache, slot_mapping)
    return q.contiguous()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x (…, H, D) with its first 2·cos.shape[-1] channels turned by the angles of cos and sin (…, rotary_dim / 2) fp32.

    Computed in fp32 (fp64 for fp64 inputs), rounded once to x's dtype.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    rotary_dim = 2 * cos.shape[-1]
    turned = x[..., :rotary_dim]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    out = out.to(x.dtype)
    return out if rotary_dim == x.shape[-1] else torch.cat((out, x[..., rotary_dim:]), dim=-1)
