"""Exact attention in O(S) memory, with the names, argument order, shapes and defaults of flash-attn 2.

Dense calls take (B, S, H, D), packed ("varlen") calls (T, H, D) with prefix sums of the lengths. Keyword-only
arguments at the end are what flash-attn 3 and 4 add and what users of either ask for; all of them work together, on
any backend that does not refuse them by name.
"""

from dataclasses import replace
from typing import Any

import torch

from octavo.kernels.reference.flash_fwd import flash_fwd_with_probs
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor
from octavo.ops import custom_ops, dispatch
from octavo.ops.checks import (
    cast_for_autocast,
    check_broadcast,
    check_capacity,
    check_floating,
    check_heads,
    check_index,
    check_like,
    check_score_options,
    check_shape,
    make_spec,
)

WindowSize = tuple[int | None, int | None]
Result = Tensor | tuple[Tensor, ...]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    learnable_sink: Tensor | None = None,
    attn_bias: Tensor | None = None,
    qv: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    backend: str | None = None,
) -> Result:
    """softmax(mask(softcap(softmax_scale · q kᵀ) + ALiBi + bias)) v, with gradients.

    The causal mask is aligned to the bottom right corner. seqlen_q = 2, seqlen_k = 5, and the reverse (1 = seen):

        1 1 1 1 0        0 0
        1 1 1 1 1        0 0
                         0 0
                         1 0
                         1 1

    A row that sees no key gives output 0 and LSE −inf.

    q: (B, Sq, Hq, D). k: (B, Sk, Hkv, D), Hq a multiple of Hkv: query head h reads key head h // (Hq / Hkv).
    v: (B, Sk, Hkv, Dv). All of one dtype, fp16, bf16, fp32 or fp64, any strides; under autocast they are cast to its
        dtype.
    dropout_p: probability in [0, 1) of dropping an attention weight; 0.0 for evaluation.
    softmax_scale: factor of the scores, default 1/√D.
    window_size: (left, right): query i sees keys i + Sk − Sq − left … i + Sk − Sq + right; −1 or None is no bound.
    softcap: scores become softcap · tanh(score / softcap) where positive.
    alibi_slopes: (Hq,) or (B, Hq) fp32: adds −slope · |i + Sk − Sq − j|. No gradient.
    deterministic: the backward gives the same bits every time.
    return_attn_probs: also return the LSE and, with dropout, the weights (B, Hq, Sq, Sk), negative where dropped, for
        tests: O(Sq·Sk) memory. Without dropout that third value is empty.
    return_lse: also return softmax_lse (B, Hq, Sq), natural logarithm, fp32 (fp64 for fp64 inputs), differentiable.
    learnable_sink: (Hq,): adds exp(sink) to each row's denominator, and to its LSE. Has a gradient.
    attn_bias: broadcastable to (B, Hq, Sq, Sk), any float dtype; added to the scores; −inf masks. Has a gradient.
    qv: (B, Sq, Hq, Dv): adds softmax_scale · qv·v to the scores. Has a gradient.
    seqused_q, seqused_k: (B,) int32: rows and keys in use of each sequence; the rest may hold anything and gets zeros.
    backend: force one backend; see `octavo.use_backend`.

    Returns out (B, Sq, Hq, Dv); (out, softmax_lse) with return_lse; (out, softmax_lse, weights) with return_attn_probs.
    Raises `ValueError` for shapes, dtypes and options that do not fit. Source: Dao, "FlashAttention-2", 2023.
    """
    check_shape("q", q, ("B", "Sq", "Hq", "D"))
    check_shape("k", k, (q.shape[0], "Sk", "Hkv", q.shape[3]))
    check_shape("v", v, (*k.shape[:3], "Dv"))
    spec = make_spec(q.shape[-1], softmax_scale, causal, window_size, softcap, dropout_p, deterministic)
    tensors = AttentionTensors(
        max_seqlen_q=q.shape[1],
        max_seqlen_k=k.shape[1],
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        qv=qv,
        alibi_slopes=alibi_slopes,
        learnable_sink=learnable_sink,
        attn_bias=attn_bias,
    )
    return _attend(q, k, v, spec, tensors, return_attn_probs, return_lse, backend)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    return_lse: bool = False,
    learnable_sink: Tensor | None = None,
    attn_bias: Tensor | None = None,
    qv: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    backend: str | None = None,
) -> Result:
    """`flash_attn_func` over B sequences of any lengths, zero included, packed one after another.

    q: (Tq, Hq, D). k: (Tk, Hkv, D). v: (Tk, Hkv, Dv). Rows that belong to no sequence give 0 and get zero gradients.
    cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 prefix sums of the lengths, from 0.
    max_seqlen_q, max_seqlen_k: the longest of each, or more; int or a one-element tensor.
    block_table: (B, max_blocks) int32: k and v are then paged caches (num_blocks, page_size, Hkv, D or Dv), any page
        size, lengths still from cu_seqlens_k (or seqused_k); forward only.
    attn_bias: broadcastable to (B, Hq, max_seqlen_q, max_seqlen_k). qv: (Tq, Hq, Dv). The LSE is (Hq, Tq).
    Everything else as `flash_attn_func`.
    """
    max_seqlen_q, max_seqlen_k = int(max_seqlen_q), int(max_seqlen_k)
    batch = cu_seqlens_q.shape[0] - 1
    check_shape("q", q, ("Tq", "Hq", "D"))
    check_index("cu_seqlens_q", cu_seqlens_q, ("B + 1",), q.device)
    check_index("cu_seqlens_k", cu_seqlens_k, (batch + 1,), q.device)
    pages = () if block_table is None else ("num_blocks",)
    check_shape("k", k, (*pages, "Tk", "Hkv", q.shape[2]))
    check_shape("v", v, (*k.shape[:-1], "Dv"))
    spec = make_spec(q.shape[-1], softmax_scale, causal, window_size, softcap, dropout_p, deterministic)
    tensors = AttentionTensors(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k if block_table is None else None,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        qv=qv,
        alibi_slopes=alibi_slopes,
        learnable_sink=learnable_sink,
        attn_bias=attn_bias,
    )
    if block_table is None:
        return _attend(q, k, v, spec, tensors, return_attn_probs, return_lse, backend)
    if attn_bias is not None or dropout_p > 0:
        raise ValueError("block_table: attn_bias and dropout_p are not taken with a paged cache; leave them out")
    keys_used = cu_seqlens_k[1:] - cu_seqlens_k[:-1] if seqused_k is None else seqused_k
    check_index("block_table", block_table, (batch, "max_blocks"), q.device)
    check_capacity("cu_seqlens_k, seqused_k", keys_used, block_table.shape[1] * k.shape[1])
    tensors = replace(tensors, seqused_k=keys_used, block_table=block_table)
    _check_options(q, k, v, tensors)
    out, lse = custom_ops.paged_attention(q, k, v, spec, tensors, backend=backend)
    return _results(out, lse, q.new_empty(0) if return_attn_probs else None, return_lse)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **extras: Any,
) -> Result:
    """`flash_attn_func` of qkv (B, S, 3, H, D), whose gradient comes back in one tensor too.

    `extras` are the keyword-only arguments of `flash_attn_func`.
    """
    check_shape("qkv", qkv, ("B", "S", 3, "H", "D"))
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        **extras,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **extras: Any,
) -> Result:
    """`flash_attn_func` of q (B, Sq, Hq, D) and kv (B, Sk, 2, Hkv, D); `extras` are its keyword-only arguments."""
    check_shape("kv", kv, ("B", "Sk", 2, "Hkv", "D"))
    k, v = kv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        **extras,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **extras: Any,
) -> Result:
    """`flash_attn_varlen_func` of qkv (T, 3, H, D); `extras` are its keyword-only arguments."""
    check_shape("qkv", qkv, ("T", 3, "H", "D"))
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        **extras,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **extras: Any,
) -> Result:
    """`flash_attn_varlen_func` of q (Tq, Hq, D) and kv (Tk, 2, Hkv, D); `extras` are its keyword-only arguments."""
    check_shape("kv", kv, ("Tk", 2, "Hkv", "D"))
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        **extras,
    )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    t: AttentionTensors,
    return_attn_probs: bool,
    return_lse: bool,
    backend: str | None,
) -> Result:
    """A dense or packed call, from checked shapes to the results asked for."""
    q, k, v = (cast_for_autocast(x) for x in (q, k, v))
    t = t if t.qv is None else replace(t, qv=cast_for_autocast(t.qv))
    _check_options(q, k, v, t)
    if t.attn_bias is not None:
        t = replace(t, attn_bias=t.attn_bias.reshape((1,) * (4 - t.attn_bias.dim()) + t.attn_bias.shape))
    # a tensor, not a number: a compiled graph draws a new one on every run, and activation checkpointing replays it
    seed = torch.randint(2**31 - 1, ()) if spec.dropout_p > 0 else None
    out, lse = _attend_padded(q, k, v, spec, t, seed, backend)
    weights = _dropped_weights(q, k, v, spec, t, seed) if return_attn_probs else None
    return _results(out, lse, weights, return_lse)


def _attend_padded(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors, seed: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """GPU kernels load 8 channels at a time: head_dims that are no multiple of it get zeros, which change no score."""
    head_dim_v = v.shape[-1]
    on_gpu = q.is_cuda or dispatch.forced_backend(backend) in ("triton", "hopper")
    if not on_gpu or (q.shape[-1] % 8 == 0 and head_dim_v % 8 == 0):
        return custom_ops.flash_attention(q, k, v, spec, t, seed, backend)
    q, k, v = (_pad_channels(x) for x in (q, k, v))
    t = t if t.qv is None else replace(t, qv=_pad_channels(t.qv))
    out, lse = custom_ops.flash_attention(q, k, v, spec, t, seed, backend)
    return out[..., :head_dim_v], lse


def _pad_channels(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 8))


@torch.no_grad()
def _dropped_weights(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors, seed: Tensor | None
) -> Tensor:
    """The attention weights, negative where dropped; empty without dropout, as flash-attn's."""
    if seed is None:
        return q.new_empty(0)
    return flash_fwd_with_probs(q, k, v, spec, replace(t, dropout_seed=int(seed)))[2].to(q.dtype)


def _results(out: Tensor, lse: Tensor, weights: Tensor | None, return_lse: bool) -> Result:
    if weights is not None:
        return out, lse, weights
    return (out, lse) if return_lse else out


def _check_options(q: Tensor, k: Tensor, v: Tensor, t: AttentionTensors) -> None:
    """Dtypes, devices and shapes of what the public functions have not checked."""
    check_floating("q", q)
    check_like("k", k, q)
    check_like("v", v, q)
    num_heads = q.shape[-2]
    check_heads(num_heads, k.shape[-2])
    batch = q.shape[0] if t.cu_seqlens_q is None else t.cu_seqlens_q.shape[0] - 1
    for name in ("seqused_q", "seqused_k"):
        seqused = getattr(t, name)
        if seqused is not None:
            check_index(name, seqused, (batch,), q.device)
    if t.qv is not None:
        check_shape("qv", t.qv, (*q.shape[:-1], v.shape[-1]))
        check_like("qv", t.qv, q)
    check_score_options(q, batch, t.alibi_slopes, t.learnable_sink)
    if t.attn_bias is not None:
        check_broadcast("attn_bias", t.attn_bias, (batch, num_heads, t.max_seqlen_q, t.max_seqlen_k))
