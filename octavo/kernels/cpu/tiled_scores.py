"""Scores and probabilities of one tile, in base 2, which the CPU's own forward and backward share.

A tile holds a few key/value heads with their query heads folded into rows: (Hkv', G, rows, keys). exp2 costs a third
of exp here (6.2 against 2.3 G/s on two Zen 4 cores, torch 2.13), so log₂e goes into the scale and all scores are in
base 2.
"""

from dataclasses import dataclass

import torch

from octavo.kernels.cpu.sequences import LOG2_E, Sequence, Tile, add_alibi_, bias_slice, mask_, tile_keep
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor

# elements of a tile of scores: 4 MiB in fp32, the most that stays near the cores of the machines we measured
TILE_ELEMENTS = 1 << 20
ROWS_PER_TILE = 128
KEYS_PER_TILE = 2048


@dataclass(frozen=True, slots=True)
class HeadChunk:
    """Some key/value heads of one sequence, in the dtype of the computation."""

    sequence: Sequence
    spec: AttentionSpec
    t: AttentionTensors
    heads: slice  # of the key/value heads
    num_kv_heads: int
    q: Tensor  # (Hkv', G, Sq, D), already times the factor of `score_factor`
    k: Tensor  # (Hkv', Sk, D)
    v: Tensor  # (Hkv', Sk, Dv)
    qv: Tensor | None  # (Hkv', G, Sq, Dv), times the same factor

    @property
    def shift(self) -> int:
        return self.sequence.num_keys - self.sequence.num_rows

    def rows(self, x: Tensor, tile: Tile) -> Tensor:
        """The tile's rows of x (Hkv', G, Sq, …) with the group folded in, (Hkv', G · rows, …)."""
        return x[:, :, tile.i0 : tile.i1].flatten(1, 2)

    def scores(self, tile: Tile) -> tuple[Tensor, Tensor | None]:
        """Base-2 scores of the tile, −inf where masked, and the tanh of softcap, which its gradient needs."""
        keys = slice(tile.j0, tile.j1)
        x = torch.bmm(self.rows(self.q, tile), self.k[:, keys].transpose(1, 2))
        if self.qv is not None:
            x.baddbmm_(self.rows(self.qv, tile), self.v[:, keys].transpose(1, 2))
        x = x.unflatten(1, (-1, tile.i1 - tile.i0))
        tanh = None
        if self.spec.softcap > 0:
            tanh = x.tanh_()
            x = tanh * (self.spec.softcap * LOG2_E)
        if self.sequence.alibi_slopes is not None:
            slopes = self.sequence.alibi_slopes.to(x.dtype) * LOG2_E
            add_alibi_(x, tile, self.shift, slopes.unflatten(0, (self.num_kv_heads, -1))[self.heads])
        bias = self.bias_part(self.t.attn_bias, tile)
        if bias is not None:
            x.add_(bias.to(x.dtype), alpha=LOG2_E)
        mask_(x, tile, self.shift, self.spec)
        return x, tanh

    def bias_part(self, bias: Tensor | None, tile: Tile) -> Tensor | None:
        """The tile's part of a bias or its gradient, a view that broadcasts to (Hkv', G, rows, keys)."""
        bias = self.sequence.bias(bias)
        return None if bias is None else bias_slice(bias, tile, self.heads, self.num_kv_heads)

    def keep(self, tile: Tile) -> Tensor | None:
        """What dropout keeps of the tile, if there is dropout."""
        if self.spec.dropout_p == 0:
            return None
        num_heads = self.num_kv_heads * self.q.shape[1]
        index = torch.arange(num_heads).unflatten(0, (self.num_kv_heads, -1))[self.heads]
        index = index + self.sequence.batch * num_heads
        return tile_keep(self.spec, self.t, self.sequence.first_key, index, tile)

    @property
    def sink(self) -> Tensor | None:
        """Base-2 sinks, (Hkv', G, 1, 1)."""
        if self.t.learnable_sink is None:
            return None
        sink = self.t.learnable_sink.to(self.q.dtype).unflatten(0, (self.num_kv_heads, -1))[self.heads]
        return sink[..., None, None] * LOG2_E


def score_factor(spec: AttentionSpec) -> float:
    """What q is multiplied by: the scale, over the cap where tanh comes next, else times log₂e."""
    return spec.softmax_scale / spec.softcap if spec.softcap > 0 else spec.softmax_scale * LOG2_E


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def by_head(x: Tensor, num_kv_heads: int) -> Tensor:
    """(S, Hq, …) to (Hkv, G, S, …), a view."""
    return x.unflatten(1, (num_kv_heads, -1)).movedim(0, 2)


def head_chunks(
    sequence: Sequence, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors
) -> list[HeadChunk]:
    """The sequence cut along its key/value heads, so that a tile of `ROWS_PER_TILE` rows keeps to `TILE_ELEMENTS`."""
    dtype, factor = compute_dtype(q), score_factor(spec)
    num_kv_heads = k.shape[-2]
    group = q.shape[-2] // num_kv_heads
    width = min(sequence.num_keys, KEYS_PER_TILE) * min(sequence.num_rows, ROWS_PER_TILE) * group
    heads_per_chunk = max(min(2, num_kv_heads), TILE_ELEMENTS // max(width, 1))
    q_h, qv_h = by_head(q[sequence.rows], num_kv_heads), None
    if t.qv is not None:
        qv_h = by_head(t.qv[sequence.rows], num_kv_heads)
    k_h, v_h = k[sequence.keys].transpose(0, 1), v[sequence.keys].transpose(0, 1)
    chunks = []
    for first in range(0, num_kv_heads, heads_per_chunk):
        heads = slice(first, first + heads_per_chunk)
        chunks.append(
            HeadChunk(
                sequence,
                spec,
                t,
                heads,
                num_kv_heads,
                q=torch.mul(q_h[heads].to(dtype), factor),
                k=k_h[heads].to(dtype).contiguous(),
                v=v_h[heads].to(dtype).contiguous(),
                qv=None if qv_h is None else torch.mul(qv_h[heads].to(dtype), factor),
            )
        )
    return chunks


def rows_per_tile(chunk: HeadChunk) -> int:
    """Rows of a tile as wide as `KEYS_PER_TILE` keys or the sequence."""
    width = min(chunk.sequence.num_keys, KEYS_PER_TILE) * chunk.q.shape[0] * chunk.q.shape[1]
    return min(max(TILE_ELEMENTS // max(width, 1), 8), ROWS_PER_TILE)
