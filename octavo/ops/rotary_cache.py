"""From the merged projection to what attention needs: norms of the heads, rotation, and the cache's writes, fused."""

from typing import cast

from octavo.kernels.reference import rotary_cache as reference
from octavo.kernels.spec import HeadNorm as HeadNorm
from octavo.kernels.spec import Rotary as Rotary
from octavo.kernels.spec import Tensor
from octavo.ops import inference
from octavo.ops.checks import check_shape


def rotate_and_store(
    qkv: Tensor,
    num_heads: int,
    rotary: Rotary | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    norm: HeadNorm | None = None,
) -> Tensor:
    """qkv (T, (Hq + 2·Hkv)·D), rows q, k, v → q (T, Hq, D), normalised and turned; k, likewise, and v into their slots.

    rotary: cos and sin (T, rotary_dim / 2) fp32 of each token, both styles; None turns nothing. norm: per head, before
    the rotation. k_cache, v_cache (num_blocks, block_size, Hkv, D), written in place; slot_mapping (T,) int64 as in
    `store_kv_cache`. No gradient reaches the caches.
    """
    check_shape("k_cache", k_cache, ("num_blocks", "block_size", "Hkv", "D"))
    check_shape("v_cache", v_cache, tuple(k_cache.shape))
    if not k_cache.is_floating_point() or k_cache.itemsize < 2:
        raise ValueError(f"k_cache: expected a float of 16 bits or more, got {k_cache.dtype}; use store_kv_cache")
    num_kv_heads, head_dim = k_cache.shape[2:]
    check_shape("qkv", qkv, ("T", (num_heads + 2 * num_kv_heads) * head_dim))
    check_shape("slot_mapping", slot_mapping, (qkv.shape[0],))
    if rotary is not None:
        check_rotary(rotary, qkv.shape[0], head_dim)
    arguments = (qkv, num_heads, rotary, norm, k_cache, v_cache, slot_mapping)
    return cast(Tensor, inference.run("rotate_and_store", reference.rotate_and_store, arguments))


def check_rotary(rotary: Rotary, tokens: int, head_dim: int) -> None:
    """Raise `ValueError` unless there are angles for each token, and not too many for a head."""
    check_shape("rotary.cos", rotary.cos, (tokens, "rotary_dim / 2"))
    check_shape("rotary.sin", rotary.sin, tuple(rotary.cos.shape))
    if 2 * rotary.cos.shape[1] > head_dim:
        raise ValueError(f"rotary.cos: expected at most {head_dim // 2} angles per token, got {rotary.cos.shape[1]}")
