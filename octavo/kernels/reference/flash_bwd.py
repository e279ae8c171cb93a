"""Gradients of the reference forward, spelled out (autograd through `flash_fwd` gives the same, which a test proves).

With P the probabilities, Z the kept ones over 1 − p (dropout), dO and dL the gradients of output and LSE:

    dV = Zᵀ dO    dP = Z/P ∘ (dO Vᵀ)    δ = rowsum(P ∘ dP)    dS = P ∘ (dP − δ + dL)

dS is the bias gradient; through softcap and scale it reaches q and k (and qv and v). A sink is one more column of S
whose dP is 0.
"""

import torch

from octavo.kernels.reference import packing
from octavo.kernels.reference.scores import padded_call, softmax
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
    """The reference takes every call."""
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
    """Gradients in the dtypes of their tensors; `dlse` is the gradient that reached `softmax_lse`, if any did."""
    call = padded_call(q, k, v, spec, t)
    sk = call.k.shape[1]
    probs, _ = softmax(call.scores, call.seen, call.rows_used, t.learnable_sink)
    dout = _pad_rows(dout, call.rows_used, t)
    dprobs = torch.einsum("bihd,bjhd->bhij", dout, call.v)
    kept = probs[..., :sk]
    if call.keep is not None:
        factor = call.keep.to(probs.dtype) / (1 - spec.dropout_p)
        kept, dprobs = kept * factor, dprobs * factor
    delta = (probs[..., :sk] * dprobs).sum(dim=-1, keepdim=True)
    if dlse is not None:
        if t.cu_seqlens_q is not None:
            dlse = dlse.transpose(0, 1)
        else:
            dlse = dlse.transpose(1, 2)
        delta = delta - _pad_rows(dlse.unsqueeze(-1), call.rows_used, t).transpose(1, 2)
    dscores = probs[..., :sk] * (dprobs - delta)
    draw = dscores * spec.softmax_scale
    if spec.softcap > 0:
        draw = draw * (1 - torch.tanh(call.uncapped / spec.softcap) ** 2)

    dq = torch.einsum("bhij,bjhd->bihd", draw, call.k)
    dk = torch.einsum("bhij,bihd->bjhd", draw, call.q)
    dv = torch.einsum("bhij,bihd->bjhd", kept, dout)
    dqv = dsink = dbias = None
    if t.qv is not None and call.qv is not None:
        dqv = _unpad(torch.einsum("bhij,bjhd->bihd", draw, call.v), t.qv, t.cu_seqlens_q)
        dv = dv + torch.einsum("bhij,bihd->bjhd", draw, call.qv)
    if t.learnable_sink is not None:
        dsink = (probs[..., sk:] * -delta).sum(dim=(0, 2, 3)).to(t.learnable_sink.dtype)
    if t.attn_bias is not None and spec.wants_dbias:
        dbias = dscores.sum_to_size(t.attn_bias.shape).to(t.attn_bias.dtype)
    return Gradients(
        _unpad(dq, q, t.cu_seqlens_q),
        _unpad(_sum_groups(dk, k), k, t.cu_seqlens_k),
        _unpad(_sum_groups(dv, v), v, t.cu_seqlens_k),
        dqv,
        dsink,
        dbias,
    )


def _pad_rows(x: Tensor, rows_used: Tensor, t: AttentionTensors) -> Tensor:
    """The gradient of a row-wise result, (B, Sq, Hq, …), in the dtype of the computation, 0 in unused rows."""
    if t.cu_seqlens_q is not None:
        x = packing.pad(x, t.cu_seqlens_q, t.max_seqlen_q)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(dtype).masked_fill(~rows_used[:, :, None, None], 0)


def _sum_groups(gradient: Tensor, x: Tensor) -> Tensor:
    """(B, Sk, Hq, …) summed over the query heads of each of x's heads."""
    batch, keys, heads, *rest = gradient.shape
    return gradient.reshape(batch, keys, x.shape[-2], heads // x.shape[-2], *rest).sum(dim=3)


def _unpad(gradient: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The gradient in x's shape and dtype."""
    if cu_seqlens is not None:
        gradient = packing.unpad(gradient, cu_seqlens, x.shape[0])
    return gradient.to(x.dtype)
