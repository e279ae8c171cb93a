"""Attention on the CPU: the fastest of three ways that takes the call.

Large calls go to the compiled kernel of `dense_forward.py`; small plain ones to torch's fused kernel, which needs no
compiling; all the rest to our own tiles of matmuls with online softmax. Every way the scores exist only tile by tile,
so memory is O(S). The own tiles take every option; they fold the query heads of a key/value head into rows, so that
grouped heads are never expanded, and never compute what the mask hides.
"""

import torch

from octavo.kernels.cpu import dense_calls, dense_forward, sdpa
from octavo.kernels.cpu.sequences import Tile, key_tiles, row_tiles, sequences
from octavo.kernels.cpu.tiled_scores import (
    KEYS_PER_TILE,
    ROWS_PER_TILE,
    TILE_ELEMENTS,
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


def plan_flash_fwd(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> dict[str, object]:
    """What this kernel would do with the call, for `octavo.explain`."""
    if dense_calls.takes(q, k, v, spec, t):
        tile = f"{dense_calls.ROWS} rows × {dense_calls.KEYS} keys"
        return {"algorithm": "the compiled kernel of cpu.dense_forward", "tile": tile, "splits": 1}
    by_torch = sdpa.takes_options(q, k, v, spec, t)
    if by_torch and is_whole(t) and sdpa.takes_lengths(spec, q.shape[1], k.shape[1]):
        return {"algorithm": "torch's fused CPU attention", "tile": "torch's", "splits": 1}
    tile = f"at most {ROWS_PER_TILE} rows × {KEYS_PER_TILE} keys, {TILE_ELEMENTS} scores"
    mixed = ", torch's fused attention for the sequences whose mask it has" if by_torch else ""
    return {"algorithm": f"own tiles of matmuls{mixed}", "tile": tile, "splits": 1}


def flash_fwd(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> tuple[Tensor, Tensor]:
    """`(out, softmax_lse)` as `kernels/spec.py` defines them."""
    if dense_calls.takes(q, k, v, spec, t):
        return dense_forward.forward(q, k, v, spec, t)
    by_torch = sdpa.takes_options(q, k, v, spec, t)
    if by_torch and is_whole(t) and q.shape[0] and sdpa.takes_lengths(spec, q.shape[1], k.shape[1]):
        return sdpa.forward(q, k, v, spec)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    lse = q.new_full(lse_shape, -torch.inf, dtype=compute_dtype(q))
    for sequence in sequences(q, k, t):
        if by_torch and sdpa.takes_lengths(spec, sequence.num_rows, sequence.num_keys):
            q_b, k_b, v_b = q[sequence.rows][None], k[sequence.keys][None], v[sequence.keys][None]
            out_b, lse_b = sdpa.forward(q_b, k_b, v_b, spec)
            out[sequence.rows], lse[sequence.lse] = out_b[0], lse_b[0]
        else:
            out_h = by_head(out[sequence.rows], k.shape[-2])
            lse_h = lse[sequence.lse].unflatten(0, (k.shape[-2], -1))
            for chunk in head_chunks(sequence, q, k, v, spec, t):
                for tile in row_tiles(sequence.num_rows, sequence.num_keys, spec, rows_per_tile(chunk)):
                    rows = slice(tile.i0, tile.i1)
                    out_h[chunk.heads, :, rows], lse_h[chunk.heads, :, rows] = _attend_rows(chunk, tile)
    return out, lse


def is_whole(t: AttentionTensors) -> bool:
    """Whether every row and key of a dense call is in use."""
    return t.cu_seqlens_q is None and t.cu_seqlens_k is None and t.seqused_q is None and t.seqused_k is None


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
