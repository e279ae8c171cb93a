"""Attention as its equation says, with every option of `kernels/spec.py`, in fp32 (fp64 for fp64 inputs).

The oracle that every other backend is tested against; O(Sq·Sk) memory. All of it is differentiable torch, twice too:

    S = score(Q Kᵀ)    P = softmax(S)    O = dropout(P) V    LSE = log Σ exp S
"""

import torch

from octavo.kernels.reference import packing
from octavo.kernels.reference.scores import padded_call, softmax
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
    call = padded_call(q, k, v, spec, t)
    probs, lse = softmax(call.scores, call.seen, call.rows_used, t.learnable_sink)
    probs = probs[..., : call.k.shape[1]]
    dropped = probs if call.keep is None else probs * call.keep / (1 - spec.dropout_p)
    out = torch.einsum("bhij,bjhd->bihd", dropped, call.v).to(q.dtype)
    if t.cu_seqlens_q is not None:
        out = packing.unpad(out, t.cu_seqlens_q, q.shape[0])
        lse = packing.unpad(lse.transpose(1, 2), t.cu_seqlens_q, q.shape[0], outside=-torch.inf).transpose(0, 1)
    return out, lse.contiguous(), probs if call.keep is None else torch.where(call.keep, probs, -probs)
