"""Multi-head latent attention over a paged latent cache: the absorbed form, which reads only the latents.

With the up-projections of keys and values absorbed into the query and the output, all heads share one key per token,
the latent beside its rotary part, and its first R numbers are the value (DeepSeek-AI, "DeepSeek-V2", 2024, §2.1).
"""

import torch

from octavo.kernels.spec import AttentionTensors, Tensor
from octavo.ops import custom_ops
from octavo.ops.checks import check_capacity, check_heads, check_index, check_like, check_shape, make_spec
from octavo.ops.kvcache import uniform_cu_seqlens
from octavo.ops.metadata import AttentionMetadata
from octavo.ops.paged import paged_tensors


def mla_attention(
    q: Tensor,
    kv_cache: Tensor,
    head_dim_v: int,
    metadata: AttentionMetadata,
    softmax_scale: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """Causal absorbed attention, decode steps and prefill chunks mixed.

    q (T, Hq, R + rope) packed by `metadata.cu_seqlens_q`, kv_cache (num_blocks, block_size, R + rope) already holding
    the new tokens, `head_dim_v` = R. `softmax_scale` has no default: it is 1/√(nope + rope) of the unabsorbed heads,
    not of this q's width. Returns (T, Hq, head_dim_v). Lengths past the block table: as `paged_attention`.
    """
    check_shape("q", q, ("T", "Hq", "R + rope"))
    check_shape("kv_cache", kv_cache, ("num_blocks", "block_size", q.shape[2]))
    check_like("kv_cache", kv_cache, q)
    _check_head_dim_v(head_dim_v, q.shape[2])
    spec = make_spec(q.shape[2], softmax_scale, True, (-1, -1), 0.0)
    tensors = paged_tensors(q, metadata, kv_cache.shape[1])
    return custom_ops.mla_decode(q, kv_cache, head_dim_v, spec, tensors, backend=backend)[0]


def get_mla_metadata(
    cache_seqlens: Tensor | None = None, num_heads_per_head_k: int = 1, num_heads_k: int = 1
) -> tuple[Tensor, Tensor | None]:
    """FlashMLA's plan of a decode batch, `(tile_scheduler_metadata, num_splits)`, to hand to `flash_mla_with_kvcache`.

    cache_seqlens: (B,) int32, or None, which FlashMLA's own call has come to. Our kernels plan inside their launch, so
    the plan is empty: (0, 8) int32, and (B + 1,) int32, the prefix of one part per sequence, or None without lengths.
    """
    if cache_seqlens is None:
        return torch.zeros(0, 8, dtype=torch.int32), None
    batch = cache_seqlens.shape[0]
    plan = cache_seqlens.new_zeros(0, 8, dtype=torch.int32)
    return plan, torch.arange(batch + 1, dtype=torch.int32, device=cache_seqlens.device)


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: Tensor | None = None,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """FlashMLA's call: absorbed latent attention of q over a paged latent cache.

    q: (B, Sq, Hq, D), D = R + rope. k_cache: (num_blocks, page_size, Hkv, D), any page size; an MLA model has Hkv = 1.
    block_table: (B, max_blocks) int32. cache_seqlens: (B,) int32. head_dim_v: R. tile_scheduler_metadata, num_splits:
    from `get_mla_metadata`. softmax_scale: default 1/√D. causal: mask aligned bottom-right. is_fp8_kvcache and indices
    (sparse attention) are refused.
    Returns out (B, Sq, Hq, R) and softmax_lse (B, Hq, Sq) fp32, −inf where a row sees no key (FlashMLA has +inf).
    Source: DeepSeek-AI, "FlashMLA".
    """
    if is_fp8_kvcache or indices is not None:
        raise ValueError("is_fp8_kvcache, indices: expected False and None; sparse attention over fp8 is not offered")
    check_shape("q", q, ("B", "Sq", "Hq", "D"))
    batch, sq, num_heads, width = q.shape
    check_shape("k_cache", k_cache, ("num_blocks", "page_size", "Hkv", width))
    check_heads(num_heads, k_cache.shape[2])
    check_like("k_cache", k_cache, q)
    check_index("block_table", block_table, (batch, "max_blocks"), q.device)
    check_index("cache_seqlens", cache_seqlens, (batch,), q.device)
    check_capacity("cache_seqlens", cache_seqlens, block_table.shape[1] * k_cache.shape[1])
    _check_head_dim_v(head_dim_v, width)
    tensors = AttentionTensors(
        cu_seqlens_q=uniform_cu_seqlens(batch, sq, q.device),
        max_seqlen_q=sq,
        max_seqlen_k=block_table.shape[1] * k_cache.shape[1],
        seqused_k=cache_seqlens,
        block_table=block_table,
    )
    spec = make_spec(width, softmax_scale, causal, (-1, -1), 0.0)
    # one latent for all heads is what the kernels read; more of them are as many calls
    parts = [
        custom_ops.mla_decode(q_of_one, latents, head_dim_v, spec, tensors, backend=backend)
        for q_of_one, latents in zip(q.flatten(0, 1).chunk(k_cache.shape[2], dim=1), k_cache.unbind(2), strict=True)
    ]
    outs, lses = zip(*parts, strict=True)
    out, lse = (outs[0], lses[0]) if len(parts) == 1 else (torch.cat(outs, dim=1), torch.cat(lses, dim=0))
    lse = lse.reshape(num_heads, batch, sq).transpose(0, 1).contiguous()
    return out.reshape(batch, sq, num_heads, head_dim_v), lse


def _check_head_dim_v(head_dim_v: int, width: int) -> None:
    if not 0 < head_dim_v <= width:
        raise ValueError(f"head_dim_v: expected 1 to {width} (the latent's width), got {head_dim_v}")
