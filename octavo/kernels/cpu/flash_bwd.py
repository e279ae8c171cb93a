"""Gradients of attention on the CPU: the compiled kernel of `dense_backward.py` for large calls, torch's fused kernel
where it fits a small one, our own tiles elsewhere.

Probabilities are recomputed tile by tile from the LSE, as in "FlashAttention" (Dao et al., 2022), so memory is O(S).
The reference backward (`kernels/reference/flash_bwd.py`) spells out the formulas.
"""

import torch

from octavo.kernels.cpu import dense_backward, dense_calls, sdpa
from octavo.kernels.cpu.flash_fwd import is_whole
from octavo.kernels.cpu.sequences import LOG2_E, Tile, key_tiles, row_tiles, sequences
from octavo.kernels.cpu.tiled_scores import KEYS_PER_TILE, HeadChunk, by_head, compute_dtype, head_chunks, rows_per_tile
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Gradients, Tensor


def refuses_flash_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    spec: AttentionSpec,
    t: AttentionTensors,
    dlse: Tensor | None = None,
) -> str | None:
    """The CPU backward takes every call."""
    return None


def flash_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    spec: AttentionSpec,
    t: AttentionTensors,
    dlse: Tensor | None = None,
) -> Gradients:
    """Gradients in the dtypes of their tensors; every sum runs in a fixed order, so repeats give the same bits."""
    if dense_calls.takes(q, k, v, spec, t):
        delta = _row_shift(dout, out, dlse, torch.float32).transpose(-1, -2)
        grads = dense_backward.backward(dout, q, k, v, delta, softmax_lse, spec, t)
        sink = t.learnable_sink
        return Gradients(*grads, None, None if sink is None else _sink_gradient(sink, softmax_lse, delta))
    by_torch = dlse is None and sdpa.takes_options(q, k, v, spec, t)
    if by_torch and is_whole(t) and q.shape[0] and sdpa.takes_lengths(spec, q.shape[1], k.shape[1]):
        return Gradients(*sdpa.backward(dout, q, k, v, out, softmax_lse, spec))
    dtype = compute_dtype(q)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    bias = t.attn_bias if spec.wants_dbias else None
    dqv, dsink, dbias = (
        None if x is None else torch.zeros(x.shape, dtype=dtype) for x in (t.qv, t.learnable_sink, bias)
    )
    delta = _row_shift(dout, out, dlse, dtype)
    for sequence in sequences(q, k, t):
        if by_torch and sdpa.takes_lengths(spec, sequence.num_rows, sequence.num_keys):
            rows = (x[sequence.rows][None] for x in (dout, q, out))
            keys = (x[sequence.keys][None] for x in (k, v))
            dout_b, q_b, out_b, k_b, v_b = *rows, *keys
            grads = sdpa.backward(dout_b, q_b, k_b, v_b, out_b, softmax_lse[sequence.lse][None], spec)
            dq[sequence.rows], dk[sequence.keys], dv[sequence.keys] = (x[0] for x in grads)
            continue
        views = [by_head(x[sequence.rows], k.shape[-2]) for x in (dout, delta, dq)]
        lse = softmax_lse[sequence.lse].unflatten(0, (k.shape[-2], -1)) * LOG2_E
        dk_h, dv_h = dk[sequence.keys].transpose(0, 1), dv[sequence.keys].transpose(0, 1)
        for chunk in head_chunks(sequence, q, k, v, spec, t):
            dout_c, delta_c, dq_c = (x[chunk.heads] for x in views)
            backward = _ChunkBackward(chunk, dout_c.to(dtype), delta_c, lse[chunk.heads], dbias)
            dq_c.copy_(backward.run())
            dk_h[chunk.heads], dv_h[chunk.heads] = backward.dk, backward.dv
            if dqv is not None and backward.dqv is not None:
                by_head(dqv[sequence.rows], k.shape[-2])[chunk.heads] = backward.dqv
            if dsink is not None and chunk.sink is not None:
                dsink.unflatten(0, (k.shape[-2], -1))[chunk.heads] += backward.sink_gradient(chunk.sink)
    return Gradients(
        dq,
        dk,
        dv,
        None if dqv is None or t.qv is None else dqv.to(t.qv.dtype),
        None if dsink is None or t.learnable_sink is None else dsink.to(t.learnable_sink.dtype),
        None if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def _row_shift(dout: Tensor, out: Tensor, dlse: Tensor | None, dtype: torch.dtype) -> Tensor:
    """δ − dL, (…, Sq, Hq): what each row's dP is shifted by."""
    delta = (dout.to(dtype) * out.to(dtype)).sum(dim=-1)
    return delta if dlse is None else delta - dlse.to(dtype).transpose(-1, -2)


def _sink_gradient(sink: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """−Σ exp(sink − LSE) · δ over batch and rows, (Hq,): a sink is a key whose value is 0."""
    weights = torch.exp(sink.to(lse.dtype)[:, None] - lse).masked_fill(lse == -torch.inf, 0)
    shift = delta.masked_fill(lse == -torch.inf, 0)  # rows of no sequence may hold anything
    return -(weights * shift).sum(dim=(0, 2) if lse.dim() == 3 else 1).to(sink.dtype)


class _ChunkBackward:
    """The backward of a few heads of one sequence; `dk`, `dv` and `dbias` grow tile by tile."""

    def __init__(self, chunk: HeadChunk, dout: Tensor, delta: Tensor, lse: Tensor, dbias: Tensor | None) -> None:
        self.chunk, self.dout, self.dbias = chunk, dout, dbias
        self.delta = delta.unsqueeze(-1)  # (Hkv', G, Sq, 1)
        # a row that saw nothing has −inf here: +inf makes all its probabilities 0 instead of NaN
        self.lse = lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1)
        self.dk, self.dv = torch.zeros_like(chunk.k), torch.zeros_like(chunk.v)
        self.dqv = None if chunk.qv is None else torch.zeros_like(chunk.qv)

    def run(self) -> Tensor:
        """dq of the chunk, (Hkv', G, Sq, D)."""
        chunk, sequence = self.chunk, self.chunk.sequence
        dq = torch.zeros_like(chunk.q)
        for tile in row_tiles(sequence.num_rows, sequence.num_keys, chunk.spec, rows_per_tile(chunk)):
            for part in key_tiles(tile, KEYS_PER_TILE):
                self._add_tile(part, dq)
        # chunk.q carries the scale and log₂e (or 1/softcap), which dk has therefore got already and dq has not
        unscale = chunk.spec.softcap if chunk.spec.softcap > 0 else 1 / LOG2_E
        self.dk.mul_(unscale)
        if self.dqv is not None:
            self.dqv.mul_(chunk.spec.softmax_scale)
        return dq.mul_(chunk.spec.softmax_scale)

    def sink_gradient(self, sink: Tensor) -> Tensor:
        """(Hkv', G): the sink is one more key whose dP is 0."""
        return -(torch.exp2(sink - self.lse) * self.delta).sum(dim=(2, 3))

    def _add_tile(self, part: Tile, dq: Tensor) -> None:
        chunk = self.chunk
        rows, keys = slice(part.i0, part.i1), slice(part.j0, part.j1)
        scores, tanh = chunk.scores(part)
        probs = scores.sub_(self.lse[:, :, rows]).exp2_()
        dout = chunk.rows(self.dout, part)
        dprobs = torch.bmm(dout, chunk.v[:, keys].transpose(1, 2)).view_as(probs)
        keep = chunk.keep(part)
        kept = probs
        if keep is not None:
            factor = keep.to(probs.dtype).div_(1 - chunk.spec.dropout_p)
            kept = probs * factor
            dprobs.mul_(factor)
        self.dv[:, keys].baddbmm_(kept.flatten(1, 2).transpose(1, 2), dout)
        dscores = dprobs.sub_(self.delta[:, :, rows]).mul_(probs)
        dbias = chunk.bias_part(self.dbias, part)
        if dbias is not None:
            dbias += dscores.sum_to_size(dbias.shape)
        if tanh is not None:
            dscores.mul_(1 - tanh.square_())
        dscores = dscores.flatten(1, 2)
        dq[:, :, rows] += torch.bmm(dscores, chunk.k[:, keys]).unflatten(1, (-1, part.i1 - part.i0))
        self.dk[:, keys].baddbmm_(dscores.transpose(1, 2), chunk.rows(chunk.q, part))
        if chunk.qv is not None and self.dqv is not None:
            self.dqv[:, :, rows] += torch.bmm(dscores, chunk.v[:, keys]).unflatten(1, (-1, part.i1 - part.i0))
            unscale = chunk.spec.softcap if chunk.spec.softcap > 0 else 1 / LOG2_E
            self.dv[:, keys].baddbmm_(dscores.transpose(1, 2), chunk.rows(chunk.qv, part), alpha=unscale)
