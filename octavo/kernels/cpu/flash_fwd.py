"""Attention on the CPU: torch's fused kernel where it fits the call, our own tiles of matmuls with online softmax
elsewhere.

Either way the scores exist only tile by tile, so memory is O(S). The own tiles take every option; they fold the query
heads of a key/value head into rows, so that grouped heads are never expanded, and never compute what the mask hides.
"""

import torch

from octavo.kernels.cpu.sequences import Tile, key_tiles, row_tiles, sequences
from octavo.kernels.cpu.tiled_scores import (
    KEYS_PER_TILE,
    HeadChunk,
    by_head,
    compute_dtype,
    head_chunks,
    rows_per_tile,
)
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor

LN_2 = 0.6931471805599453


def refuses_flash_fwd(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> str | None:
    """The CPU forward takes every call."""
    return None


def flash_fwd(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> tuple[Tensor, Tensor]:
    """`(out, softmax_lse)` as `kernels/spec.py` defines them."""
    if fits_sdpa(q, k, v, spec, t):
        return _sdpa(q, k, v, spec)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    lse = q.new_full(lse_shape, -torch.inf, dtype=compute_dtype(q))
    for sequence in sequences(q, k, t):
        out_h = by_head(out[sequence.rows], k.shape[-2])
        lse_h = lse[sequence.lse].unflatten(0, (k.shape[-2], -1))
        for chunk in head_chunks(sequence, q, k, v, spec, t):
            for tile in row_tiles(sequence.num_rows, sequence.num_keys, spec, rows_per_tile(chunk)):
                rows = slice(tile.i0, tile.i1)
                out_h[chunk.heads, :, rows], lse_h[chunk.heads, :, rows] = _attend_rows(chunk, tile)
    return out, lse


def fits_sdpa(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> bool:
    """Whether torch's fused CPU attention computes this very call: plain dense attention, all tokens in use."""
    options = (
        *(t.cu_seqlens_q, t.cu_seqlens_k, t.seqused_q, t.seqused_k, t.leftpad_k),
        *(t.qv, t.alibi_slopes, t.learnable_sink, t.attn_bias),
    )
    if any(option is not None for option in options) or spec.softcap or spec.dropout_p or q.dtype == torch.float16:
        return False
    masked = spec.window_left >= 0 or spec.window_right >= 0
    # torch aligns its causal mask top-left, which is the same on a square
    mask_fits = not masked or (spec.causal and q.shape[1] == k.shape[1])
    heads_fit = q.shape[2] == k.shape[2] and q.shape[3] == v.shape[3]
    return mask_fits and heads_fit and min(q.shape[0], q.shape[1], k.shape[1]) > 0


def _sdpa(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, spec.causal, attn_mask=None, scale=spec.softmax_scale
    )
    return out.transpose(1, 2), lse


def _attend_rows(chunk: HeadChunk, tile: Tile) -> tuple[Tensor, Tensor]:
    """Output (Hkv', G, rows, Dv) and LSE (Hkv', G, rows) of a tile's rows: the online softmax over its keys."""
    kv_heads, group = chunk.q.shape[:2]
    shape = (kv_heads, group, tile.i1 - tile.i0, 1)
    highest = chunk.q.new_full(shape, -torch.inf)
    total = chunk.q.new_zeros(shape)
    out = chunk.q.new_zeros(*shape[:3], chunk.v.shape[-1])
    if chunk.sink is not None:
        highest = chunk.sink.expand(shape)
        total = torch.ones(shape, dtype=chunk.q.dtype)
    for part in key_tiles(tile, KEYS_PER_TILE):
        x, _ = chunk.scores(part)
        previous, highest = highest, torch.maximum(highest, x.amax(dim=-1, keepdim=True))
        base = highest.masked_fill(highest == -torch.inf, 0)  # −inf − (−inf) is NaN
        weights = x.sub_(base).exp2_()
        rescale = torch.exp2(previous - base)
        total = total * rescale + weights.sum(dim=-1, keepdim=True)
        keep = chunk.keep(part)
        if keep is not None:
            weights.mul_(keep).div_(1 - chunk.spec.dropout_p)
        partial = torch.bmm(weights.flatten(1, 2), chunk.v[:, part.j0 : part.j1])
        out.mul_(rescale).add_(partial.unflatten(1, shape[1:3]))
    base = highest.masked_fill(highest == -torch.inf, 0)
    lse = (torch.log2(total) + base).squeeze(-1) * LN_2
    return out.div_(total.masked_fill(total == 0, 1)), lse
