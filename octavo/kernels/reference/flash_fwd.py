"""Attention as its equation says, every option of `kernels/spec.py`, in fp32 (fp64 for fp64 inputs), O(Sq·Sk) memory.

The oracle that every other backend is tested against. All of it is differentiable torch, twice too:

    S = score(Q Kᵀ)    P = softmax(S)    O = dropout(P) V    LSE = log Σ exp S
"""

import torch

from octavo.kernels.reference import packing
from octavo.kernels.reference.masks import alibi, offsets_from_diagonal, visible
from octavo.kernels.reference.philox import dropout_keep
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor


def refuses_flash_fwd(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> str | None:
    """The reference takes every call."""
    return None


def flash_fwd(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> tuple[Tensor, Tensor]:
    """`(out, softmax_lse)`: out as q with v's last axis, LSE (B, Hq, Sq) or (Hq, Tq), fp32 (fp64 for fp64 inputs)."""
    out, lse, _ = flash_fwd_with_probs(q, k, v, spec, t)
    return out, lse


def flash_fwd_with_probs(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors
) -> tuple[Tensor, Tensor, Tensor]:
    """As `flash_fwd`, and the probabilities (B, Hq, Sq, Sk), negated where dropped."""
    qv = t.qv
    if t.cu_seqlens_q is not None:
        total = q.shape[0]
        q = packing.pad(q, t.cu_seqlens_q, t.max_seqlen_q)
        qv = None if qv is None else packing.pad(qv, t.cu_seqlens_q, t.max_seqlen_q)
    if t.cu_seqlens_k is not None:
        k, v = (packing.pad(x, t.cu_seqlens_k, t.max_seqlen_k) for x in (k, v))
    out, lse, probs = _padded(q, k, v, qv, spec, t)
    if t.cu_seqlens_q is not None:
        out = packing.unpad(out, t.cu_seqlens_q, total)
        # rows of no sequence saw nothing: shift so that unpad's 0 stands for −inf
        live = packing.unpad(torch.isfinite(lse).transpose(1, 2), t.cu_seqlens_q, total)
        lse = packing.unpad(lse.transpose(1, 2), t.cu_seqlens_q, total).masked_fill(~live, -torch.inf).transpose(0, 1)
    return out, lse.contiguous(), probs


def _lengths(x: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None) -> Tensor:
    if seqused is not None:
        return seqused
    if cu_seqlens is not None:
        return packing.lengths(cu_seqlens)
    return torch.full((x.shape[0],), x.shape[1], device=x.device, dtype=torch.int32)


def _masked(x: Tensor, used: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (B, S) in use, the others 0: what lies in padding, NaN included, must not matter."""
    return x.to(dtype).masked_fill(~used[:, :, None, None], 0)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None, spec: AttentionSpec, t: AttentionTensors
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, sq, num_heads, _ = q.shape
    sk, group = k.shape[1], num_heads // k.shape[2]
    seqlens_q = _lengths(q, t.cu_seqlens_q, t.seqused_q)
    seqlens_k = _lengths(k, t.cu_seqlens_k, t.seqused_k)
    rows_used = packing.used(seqlens_q, sq)
    keys_used = packing.used(seqlens_k, sk, t.leftpad_k)
    q_, k_, v_ = _masked(q, rows_used, dtype), _masked(k, keys_used, dtype), _masked(v, keys_used, dtype)
    k_, v_ = k_.repeat_interleave(group, dim=2), v_.repeat_interleave(group, dim=2)

    scores = torch.einsum("bihd,bjhd->bhij", q_, k_)
    if qv is not None:
        scores = scores + torch.einsum("bihd,bjhd->bhij", _masked(qv, rows_used, dtype), v_)
    scores = scores * spec.softmax_scale
    if spec.softcap > 0:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    diagonal = offsets_from_diagonal(seqlens_q, seqlens_k, sq, sk)
    if t.alibi_slopes is not None:
        scores = scores + alibi(t.alibi_slopes.to(dtype), diagonal)
    if t.attn_bias is not None:
        scores = scores + t.attn_bias.to(dtype)
    seen = visible(spec, diagonal, rows_used, keys_used) & (scores.detach() > -torch.inf)
    probs, lse = _softmax(scores, seen, rows_used, t.learnable_sink)
    if spec.dropout_p > 0:
        keep = _keep(spec, t, batch, num_heads, sq, sk, q.device)
        out = torch.einsum("bhij,bjhd->bihd", probs * keep / (1 - spec.dropout_p), v_)
        probs = torch.where(keep, probs, -probs)
    else:
        out = torch.einsum("bhij,bjhd->bihd", probs, v_)
    return out.to(q.dtype), lse, probs


def _softmax(scores: Tensor, seen: Tensor, rows_used: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities and LSE of each row, NaN-free in both derivatives: rows with no key are computed on zeros, then masked."""
    if sink is not None:
        sink_column = sink.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink_column], dim=-1)
        seen = torch.cat([seen, rows_used[:, None, :, None].expand(*seen.shape[:3], 1)], dim=-1)
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:3], -torch.inf)
    live = seen.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(~live, 0)
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    probs = torch.softmax(scores, dim=-1).masked_fill(~live, 0)
    lse = lse.masked_fill(~live, -torch.inf)
    return (probs if sink is None else probs[..., :-1]), lse.squeeze(-1)


def _keep(
    spec: AttentionSpec, t: AttentionTensors, batch: int, num_heads: int, sq: int, sk: int, device: torch.device
) -> Tensor:
    heads = torch.arange(batch * num_heads, device=device).reshape(batch, num_heads, 1, 1)
    rows = torch.arange(sq, device=device)[:, None]
    columns = torch.arange(sk, device=device)
    return dropout_keep(
        t.dropout_seed, spec.dropout_p, heads, rows, columns, t.max_seqlen_q or sq, t.max_seqlen_k or sk
    )
