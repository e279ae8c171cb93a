"""`flash_attn.flash_attn_interface`: the public functions, and the forward and backward halves that ring attention and
frameworks with their own autograd functions call (version 2.8's arguments).
"""

from typing import Any

import torch
from torch import Tensor

from octavo.ops import flash_attn_func as flash_attn_func
from octavo.ops import flash_attn_kvpacked_func as flash_attn_kvpacked_func
from octavo.ops import flash_attn_qkvpacked_func as flash_attn_qkvpacked_func
from octavo.ops import flash_attn_varlen_func as flash_attn_varlen_func
from octavo.ops import flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func
from octavo.ops import flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func
from octavo.ops import flash_attn_with_kvcache as flash_attn_with_kvcache
from octavo.ops.without_autograd import attention_backward, attention_forward


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, empty, rng_state) of dense q, k, v; rng_state (2,) int64 is for the backward's dropout."""
    options = _options(dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    return _forward(q, k, v, options, return_softmax)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_flash_attn_forward` of packed q, k, v, or of paged k and v. zero_tensors and num_splits change nothing."""
    if leftpad_k is not None:
        raise ValueError("leftpad_k: expected None here; use flash_attn_with_kvcache, which has cache_leftpad")
    options = _options(dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    options |= _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) | {"seqused_k": seqused_k}
    if block_table is None:
        return _forward(q, k, v, options, return_softmax)
    with torch.no_grad():
        out, softmax_lse = flash_attn_varlen_func(q, k, v, **options, block_table=block_table, return_lse=True)
    return out, softmax_lse, q.new_empty(0), torch.zeros(2, dtype=torch.int64)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Fills dq, dk and dv where given, and returns softmax_d (B, Hq, Sq) fp32, the sums of out · dout."""
    options = _options(dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    return _backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), options, rng_state)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """`_flash_attn_backward` of packed tensors; softmax_d is (Hq, Tq)."""
    options = _options(dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    options |= _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), options, rng_state)


_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


def _options(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    return {
        "dropout_p": dropout_p,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": (left, right),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }


def _packing(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> dict[str, Any]:
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
    }


def _forward(
    q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], return_softmax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if return_softmax and options["dropout_p"] > 0:
        raise ValueError(
            "return_softmax: expected False here; flash_attn_func(return_attn_probs=True) returns the weights"
        )
    seed = torch.randint(2**31 - 1, (), dtype=torch.int64)
    out, softmax_lse = attention_forward(q, k, v, **options, dropout_seed=seed)
    return out, softmax_lse, q.new_empty(0), torch.stack((seed, torch.zeros_like(seed)))


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    targets: tuple[Tensor | None, Tensor | None, Tensor | None],
    options: dict[str, Any],
    rng_state: Tensor | None,
) -> Tensor:
    seed = None if rng_state is None else rng_state[0]
    gradients = attention_backward(dout, q, k, v, out, softmax_lse, **options, dropout_seed=seed)
    for target, gradient in zip(targets, gradients, strict=True):
        if target is not None:
            target.copy_(gradient)
    return (out.float() * dout.float()).sum(dim=-1).transpose(-1, -2).contiguous()
