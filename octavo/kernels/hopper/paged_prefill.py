"""Chunks of prompts over a paged cache on Hopper (sm_90): the forward kernel, its producer fetching page by page.

A block of keys comes in TMA boxes of up to one page by 64 columns, addressed through the block table; rows past the end
of a sequence come as zeros, whatever the page holds there. Decode rows may stand in the same call; each takes a tile
of its own, so where most sequences have one the kernels that pack heads and split keys serve better.
"""

from octavo.kernels.hopper.flash_fwd import (
    MIN_QUERIES,
    PAGED_TILES,
    _descriptor,
    _width,
    refuses_inputs,
    run_forward,
)
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor

MIN_BOX = 16  # rows of the smallest box: two of the 8-row pieces in which shared memory is laid out
MIN_MEAN_QUERIES = 32  # measured: a chunk of 512 beside 16 decode rows is faster than by Triton, beside 32 slower
_UNSUPPORTED = ("seqused_q", "leftpad_k", "qv", "alibi_slopes", "attn_bias")


def refuses_paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> str | None:
    """Why this backend cannot take the call, or None."""
    reason = refuses_inputs(q, v_cache, spec, t, _UNSUPPORTED)
    if reason is not None:
        return reason
    if t.cu_seqlens_q is None or num_splits > 1:
        return "it takes queries packed by cu_seqlens_q, and splits no keys"
    sequences = t.cu_seqlens_q.shape[0] - 1
    if t.max_seqlen_q < MIN_QUERIES or q.shape[0] < MIN_MEAN_QUERIES * sequences:
        return f"it takes {MIN_MEAN_QUERIES} queries a sequence on average, the call has {q.shape[0]} for {sequences}"
    page = k_cache.shape[1]
    if page % MIN_BOX:
        return f"it takes block sizes in multiples of {MIN_BOX}, not {page}"
    for cache in (k_cache, v_cache):
        size = cache.element_size()
        contiguous = cache.stride(3) == 1 and cache.stride(0) == page * cache.stride(1)
        aligned = cache.stride(1) * size % 16 == 0 and cache.stride(2) * size % 16 == 0 and cache.data_ptr() % 16 == 0
        if not contiguous or not aligned or cache.numel() == 0 or cache.dtype != q.dtype:
            return "it takes caches of q's dtype whose blocks follow each other, with rows on 16 bytes"
    return None


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> tuple[Tensor, Tensor]:
    """`(out (T, Hq, Dv), softmax_lse (Hq, T))` of q (T, Hq, D) over caches (num_blocks, block_size, Hkv, D or Dv)."""
    assert t.cu_seqlens_q is not None
    page = k_cache.shape[1]
    rows = min(page & -page, PAGED_TILES[_width(q.shape[-1]), _width(v_cache.shape[-1])].block_n)
    k_boxes, v_boxes = (_descriptor(x.flatten(0, 1), rows, True, 64) for x in (k_cache, v_cache))
    sizes = (t.cu_seqlens_q.shape[0] - 1, t.max_seqlen_q, t.max_seqlen_k)
    heads_and_dim_v = (k_cache.shape[-2], v_cache.shape[-1])
    return run_forward(q, (k_boxes, v_boxes), sizes, heads_and_dim_v, t.seqused_k, t.block_table, page, spec, t)
