"""A call as its single sequences, and each as the row tiles that attention is computed in.

Packed, padded and unevenly used calls differ only in where a sequence's rows lie; the tiles know which keys their
rows can see, so that masked regions are never computed.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from octavo.kernels.reference.philox import dropout_keep
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor

LOG2_E = math.log2(math.e)

Index = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence of a call: where its used rows and keys lie, and its share of the optional tensors."""

    batch: int
    rows: Index  # of q, qv, out and their gradients
    keys: Index  # of k, v and their gradients
    lse: Index  # of softmax_lse
    num_rows: int
    num_keys: int
    first_key: int  # keys of the sequence that are left out before the used ones
    alibi_slopes: Tensor | None  # (Hq,)

    def bias(self, x: Tensor | None) -> Tensor | None:
        """The sequence's part of a bias or its gradient (B or 1, Hq or 1, Sq or 1, Sk or 1), a view without B."""
        if x is None:
            return None
        x = x[self.batch if x.shape[0] > 1 else 0]
        return x[..., self.first_key : self.first_key + self.num_keys] if x.shape[2] > 1 else x


def sequences(q: Tensor, k: Tensor, t: AttentionTensors) -> Iterator[Sequence]:
    """Every sequence with at least one used row."""
    starts_q, ends_q = _spans(q, t.cu_seqlens_q, t.seqused_q)
    starts_k, ends_k = _spans(k, t.cu_seqlens_k, t.seqused_k)
    leftpads = [0] * len(ends_k) if t.leftpad_k is None else t.leftpad_k.tolist()
    for b, (start_q, end_q, start_k, end_k) in enumerate(zip(starts_q, ends_q, starts_k, ends_k, strict=True)):
        first_key = min(start_k + leftpads[b], end_k)
        if end_q <= start_q:
            continue
        rows, keys = slice(start_q, end_q), slice(first_key, end_k)
        slopes = t.alibi_slopes
        yield Sequence(
            batch=b,
            rows=(b, rows) if t.cu_seqlens_q is None else (rows,),
            keys=(b, keys) if t.cu_seqlens_k is None else (keys,),
            lse=(b, slice(None), rows) if t.cu_seqlens_q is None else (slice(None), rows),
            num_rows=end_q - start_q,
            num_keys=end_k - first_key,
            first_key=first_key - start_k,
            alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[b],
        )


def _spans(x: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None) -> tuple[list[int], list[int]]:
    """First and one-past-last used position of each sequence, within its batch row or within the packed tensor."""
    if cu_seqlens is None:
        starts, ends = [0] * x.shape[0], [x.shape[1]] * x.shape[0]
    else:
        prefix = checked_prefix_sums(cu_seqlens, x.shape[0])
        starts, ends = prefix[:-1], prefix[1:]
    if seqused is not None:
        ends = [min(start + used, end) for start, used, end in zip(starts, seqused.tolist(), ends, strict=True)]
    return starts, ends


def checked_prefix_sums(cu_seqlens: Tensor, total: int) -> list[int]:
    """cu_seqlens as numbers; `ValueError` unless they rise from 0 to at most `total`, the rows there are."""
    prefix: list[int] = cu_seqlens.tolist()
    if prefix[0] != 0 or prefix[-1] > total or any(b < a for a, b in itertools.pairwise(prefix)):
        raise ValueError(f"cu_seqlens: expected prefix sums from 0 to at most {total}, got {prefix}")
    return prefix


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows [i0, i1) of a sequence and keys [j0, j1), some of which those rows see; p = i + shift is a row's
    diagonal.
    """

    i0: int
    i1: int
    j0: int
    j1: int


def row_tiles(num_rows: int, num_keys: int, spec: AttentionSpec, rows_per_tile: int) -> Iterator[Tile]:
    """Row tiles with the span of keys that any of their rows sees; the span may be empty."""
    shift = num_keys - num_rows
    for i0 in range(0, num_rows, rows_per_tile):
        i1 = min(i0 + rows_per_tile, num_rows)
        j0 = 0 if spec.window_left < 0 else i0 + shift - spec.window_left
        j1 = num_keys if spec.window_right < 0 else i1 + shift + spec.window_right
        j0, j1 = min(max(j0, 0), num_keys), min(max(j1, 0), num_keys)
        yield Tile(i0, i1, j0, max(j0, j1))


def key_tiles(tile: Tile, keys_per_tile: int) -> Iterator[Tile]:
    """The tile cut along its keys."""
    for j0 in range(tile.j0, tile.j1, keys_per_tile):
        yield Tile(tile.i0, tile.i1, j0, min(j0 + keys_per_tile, tile.j1))


def mask_(scores: Tensor, tile: Tile, shift: int, spec: AttentionSpec) -> None:
    """−inf where row i of scores (…, rows, keys) does not see key j; touches only columns that some row does not
    see.
    """
    rows = torch.arange(tile.i0, tile.i1)[:, None] + shift
    if spec.window_right >= 0:
        first = max(tile.j0, tile.i0 + shift + spec.window_right + 1)
        if first < tile.j1:
            columns = torch.arange(first, tile.j1)
            scores[..., first - tile.j0 :].masked_fill_(columns > rows + spec.window_right, -torch.inf)
    if spec.window_left >= 0:
        last = min(tile.j1, tile.i1 - 1 + shift - spec.window_left)
        if last > tile.j0:
            columns = torch.arange(tile.j0, last)
            scores[..., : last - tile.j0].masked_fill_(columns < rows - spec.window_left, -torch.inf)


def add_alibi_(scores: Tensor, tile: Tile, shift: int, slopes: Tensor) -> None:
    """Subtract slope · |i + shift − j| from scores (Hkv, G, rows, keys); slopes (Hkv, G)."""
    distance = torch.arange(tile.i0, tile.i1, dtype=scores.dtype)[:, None] + shift
    distance = (distance - torch.arange(tile.j0, tile.j1, dtype=scores.dtype)).abs_()
    scores.addcmul_(slopes[:, :, None, None], distance, value=-1)


def bias_slice(bias: Tensor, tile: Tile, heads: slice, num_kv_heads: int) -> Tensor:
    """The tile's part of a bias (Hq or 1, Sq or 1, Sk or 1), as a view that broadcasts to (Hkv, G, rows, keys)."""
    if bias.shape[1] > 1:
        bias = bias[:, tile.i0 : tile.i1]
    if bias.shape[2] > 1:
        bias = bias[..., tile.j0 : tile.j1]
    return bias.unflatten(0, (num_kv_heads, -1))[heads] if bias.shape[0] > 1 else bias[None]


def tile_keep(spec: AttentionSpec, t: AttentionTensors, first_key: int, head_index: Tensor, tile: Tile) -> Tensor:
    """What dropout keeps of the tile; head_index (Hkv, G) is b · Hq + h."""
    rows = torch.arange(tile.i0, tile.i1)[:, None]
    columns = torch.arange(tile.j0, tile.j1) + first_key
    heads = head_index[:, :, None, None]
    return dropout_keep(t.dropout_seed, spec.dropout_p, heads, rows, columns, t.max_seqlen_q, t.max_seqlen_k)
