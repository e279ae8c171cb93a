"""Attention of one step's packed tokens over a paged KV cache, and the writes that fill the cache.

The ops of an engine's layer: `store_kv_cache` puts the step's keys and values into their slots, then `paged_attention`
reads every sequence's blocks through its block table. No gradients.
"""

import torch

from octavo.kernels.spec import AttentionTensors, Tensor
from octavo.ops import custom_ops
from octavo.ops.checks import (
    check_capacity,
    check_heads,
    check_index,
    check_like,
    check_score_options,
    check_shape,
    make_spec,
)
from octavo.ops.metadata import AttentionMetadata

QUANTISED = (torch.float8_e4m3fn, torch.int8)  # dtypes of a quantised cache


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttentionMetadata,
    *,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    learnable_sink: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention of new tokens over the cache, which already holds their keys and values.

    q (T, Hq, D) packed by `metadata.cu_seqlens_q`; k_cache (num_blocks, block_size, Hkv, D) and v_cache (…, Dv) of q's
    dtype, or on the CPU fp16 under fp32; the masks align bottom-right, so a sequence's last new token sees all of its
    `cache_seqlens` keys.
    `softmax_scale` defaults to 1/√D; `learnable_sink` is (Hq,). Returns (T, Hq, Dv); rows of no sequence give 0.
    A cache in float8_e4m3fn or int8, as `store_kv_cache` quantises, comes with its `k_scale` and `v_scale` (Hkv,) fp32
    (FA3's k_descale and v_descale): the true key is k_cache · k_scale.
    Raises `ValueError` for shapes and dtypes that do not fit, on a CPU also for lengths past the block table; on a GPU,
    where looking would wait for the device, such lengths count as what the table can name.
    Source: Kwon et al., "PagedAttention", SOSP 2023.
    """
    check_shape("q", q, ("T", "Hq", "D"))
    check_shape("k_cache", k_cache, ("num_blocks", "block_size", "Hkv", q.shape[2]))
    check_shape("v_cache", v_cache, (*k_cache.shape[:3], "Dv"))
    check_heads(q.shape[1], k_cache.shape[2])
    if k_scale is None and v_scale is None:
        halved = (q.dtype, k_cache.dtype, v_cache.dtype) == (torch.float32, torch.float16, torch.float16)
        like = q.new_empty(0, dtype=torch.float16) if halved and q.device.type == "cpu" else q
        check_like("k_cache", k_cache, like)
        check_like("v_cache", v_cache, like)
    else:
        check_quantised(k_cache, v_cache, k_scale, v_scale)
    tensors = paged_tensors(q, metadata, k_cache.shape[1], learnable_sink, k_scale, v_scale)
    spec = make_spec(q.shape[2], softmax_scale, True, window_size, softcap)
    return custom_ops.paged_attention(q, k_cache, v_cache, spec, tensors, backend=backend)[0]


def check_quantised(k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """Raise `ValueError` unless both caches are of one quantised dtype with a scale for each head."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype not in QUANTISED or cache.dtype != k_cache.dtype:
            raise ValueError(f"{name}: with k_scale and v_scale expected float8_e4m3fn or int8, got {cache.dtype}")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            raise ValueError(f"{name}: a quantised cache needs both k_scale and v_scale, got None")
        check_shape(name, scale, (k_cache.shape[2],))
        if scale.dtype != torch.float32 or scale.device != k_cache.device:
            raise ValueError(f"{name}: expected float32 on {k_cache.device}, got {scale.dtype} on {scale.device}")


def paged_tensors(
    q: Tensor,
    metadata: AttentionMetadata,
    block_size: int,
    learnable_sink: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> AttentionTensors:
    """The metadata's tensors, checked against q, as kernels take them."""
    batch = metadata.cache_seqlens.shape[0]
    for name, expected in (
        ("cu_seqlens_q", (batch + 1,)),
        ("cache_seqlens", (batch,)),
        ("block_table", (batch, "blocks")),
    ):
        check_index(name, getattr(metadata, name), expected, q.device)
    check_capacity("cache_seqlens", metadata.cache_seqlens, metadata.block_table.shape[1] * block_size)
    check_score_options(q, batch, None, learnable_sink)
    return AttentionTensors(
        cu_seqlens_q=metadata.cu_seqlens_q,
        max_seqlen_q=metadata.max_seqlen_q,
        max_seqlen_k=metadata.max_seqlen_k,
        seqused_k=metadata.cache_seqlens,
        block_table=metadata.block_table,
        learnable_sink=learnable_sink,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def store_kv_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write k (T, Hkv, D) and v (T, Hkv, Dv) into the caches (num_blocks, block_size, Hkv, D or Dv), in place.

    `slot_mapping` (T,) int64 is `block · block_size + offset` of each token; tokens with a negative slot are skipped.
    With `k_scale` and `v_scale` (Hkv,) fp32 the caches are float8_e4m3fn or int8 and take k / k_scale and v / v_scale,
    rounded to the nearest and clamped to ±448 or ±127. A number within the range is then off by at most 1/16 of itself
    in fp8 (2^-10 scales near 0), by half a scale in int8.
    """
    check_shape("k", k, ("T", "Hkv", "D"))
    check_shape("v", v, (*k.shape[:2], "Dv"))
    check_shape("k_cache", k_cache, ("num_blocks", "block_size", *k.shape[1:]))
    check_shape("v_cache", v_cache, (*k_cache.shape[:2], *v.shape[1:]))
    check_shape("slot_mapping", slot_mapping, (k.shape[0],))
    if k_scale is not None or v_scale is not None or k_cache.dtype in QUANTISED:
        check_quantised(k_cache, v_cache, k_scale, v_scale)
    custom_ops.store_kv_cache(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)


def store_latent_cache(latent: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write latent (T, R + rope) into kv_cache (num_blocks, block_size, R + rope), in place; slots as
    `store_kv_cache`.
    """
    check_shape("latent", latent, ("T", "R + rope"))
    check_shape("kv_cache", kv_cache, ("num_blocks", "block_size", latent.shape[1]))
    check_shape("slot_mapping", slot_mapping, (latent.shape[0],))
    custom_ops.store_latent_cache(latent, kv_cache, slot_mapping)
