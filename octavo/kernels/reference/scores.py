"""The operands and scores of a call in their padded, dense form, which the reference forward and backward share."""

from dataclasses import dataclass

import torch

from octavo.kernels.reference import packing
from octavo.kernels.reference.masks import alibi, offsets_from_diagonal, visible
from octavo.kernels.reference.philox import dropout_keep
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor


@dataclass(frozen=True, slots=True)
class PaddedCall:
    """One call in fp32 (fp64 for fp64 inputs), heads of k and v repeated for their query heads, unused rows 0."""

    q: Tensor  # (B, Sq, Hq, D)
    k: Tensor  # (B, Sk, Hq, D)
    v: Tensor  # (B, Sk, Hq, Dv)
    qv: Tensor | None  # (B, Sq, Hq, Dv)
    uncapped: Tensor  # (B, Hq, Sq, Sk), before softcap
    scores: Tensor  # (B, Hq, Sq, Sk), before the mask
    seen: Tensor  # (B, Hq, Sq, Sk) bool
    rows_used: Tensor  # (B, Sq) bool
    keep: Tensor | None  # (B, Hq, Sq, Sk) bool, what dropout keeps


def padded_call(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> PaddedCall:
    """The scores as `kernels/spec.py` defines them."""
    qv, bias = t.qv, t.attn_bias
    if t.cu_seqlens_q is not None:
        q = packing.pad(q, t.cu_seqlens_q, t.max_seqlen_q)
        qv = None if qv is None else packing.pad(qv, t.cu_seqlens_q, t.max_seqlen_q)
    if t.cu_seqlens_k is not None:
        k, v = (packing.pad(x, t.cu_seqlens_k, t.max_seqlen_k) for x in (k, v))
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    sq, sk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    seqlens_q = _lengths(q, t.cu_seqlens_q, t.seqused_q)
    seqlens_k = _lengths(k, t.cu_seqlens_k, t.seqused_k)
    rows_used = packing.used(seqlens_q, sq)
    keys_used = packing.used(seqlens_k, sk, t.leftpad_k)
    q = _masked(q, rows_used, dtype)
    k, v = (_masked(x, keys_used, dtype).repeat_interleave(group, dim=2) for x in (k, v))
    qv = None if qv is None else _masked(qv, rows_used, dtype)

    uncapped = torch.einsum("bihd,bjhd->bhij", q, k)
    if qv is not None:
        uncapped = uncapped + torch.einsum("bihd,bjhd->bhij", qv, v)
    scores = uncapped = uncapped * spec.softmax_scale
    if spec.softcap > 0:
        scores = spec.softcap * torch.tanh(uncapped / spec.softcap)
    diagonal = offsets_from_diagonal(seqlens_q, seqlens_k, sq, sk)
    if t.alibi_slopes is not None:
        scores = scores + alibi(t.alibi_slopes.to(dtype), diagonal)
    if bias is not None:
        scores = scores + bias.to(dtype)
    seen = visible(spec, diagonal, rows_used, keys_used) & (scores.detach() > -torch.inf)
    keep = _kept(spec, t, scores) if spec.dropout_p > 0 else None
    return PaddedCall(q, k, v, qv, uncapped, scores, seen, rows_used, keep)


def softmax(scores: Tensor, seen: Tensor, rows_used: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities (with a last column for the sink, if any) and the LSE of each row.

    No NaN in either derivative: rows without a key are computed on zeros and masked afterwards.
    """
    if sink is not None:
        sink_column = sink.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink_column], dim=-1)
        seen = torch.cat([seen, rows_used[:, None, :, None].expand(*seen.shape[:3], 1)], dim=-1)
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:3], -torch.inf)
    live = seen.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(~live, 0)
    lse = torch.logsumexp(scores, dim=-1, keepdim=True).masked_fill(~live, -torch.inf)
    return torch.softmax(scores, dim=-1).masked_fill(~live, 0), lse.squeeze(-1)


def _lengths(x: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None) -> Tensor:
    if seqused is not None:
        return seqused
    if cu_seqlens is not None:
        return packing.lengths(cu_seqlens)
    return torch.full((x.shape[0],), x.shape[1], device=x.device, dtype=torch.int32)


def _masked(x: Tensor, used: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (B, S) in use, the others 0: what lies in padding, NaN included, must not matter."""
    return x.to(dtype).masked_fill(~used[:, :, None, None], 0)


def _kept(spec: AttentionSpec, t: AttentionTensors, scores: Tensor) -> Tensor:
    batch, num_heads, sq, sk = scores.shape
    heads = torch.arange(batch * num_heads, device=scores.device).reshape(batch, num_heads, 1, 1)
    rows = torch.arange(sq, device=scores.device)[:, None]
    columns = torch.arange(sk, device=scores.device)
    max_sq, max_sk = t.max_seqlen_q or sq, t.max_seqlen_k or sk
    return dropout_keep(t.dropout_seed, spec.dropout_p, heads, rows, columns, max_sq, max_sk)
