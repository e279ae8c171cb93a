"""Forward and backward as two plain calls, for callers with an autograd function of their own: ring attention, context
parallelism, frameworks. Nothing here is recorded by autograd.
"""

from dataclasses import replace
from typing import Any, cast

import torch

from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor
from octavo.ops import custom_ops
from octavo.ops.checks import (
    check_floating,
    check_heads,
    check_index,
    check_like,
    check_score_options,
    check_shape,
    make_spec,
)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`(out, softmax_lse)` of dense q (B, Sq, Hq, D), k and v, or of packed ones where cu_seqlens_q is given.

    options: cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k (packed calls), seqused_q, seqused_k, softmax_scale,
    causal, window_size, softcap, alibi_slopes, dropout_p, and dropout_seed, an int64 tensor of one number, which a call
    with dropout needs and its backward must get again. All as in `flash_attn_func` and `flash_attn_varlen_func`.
    """
    spec, t, seed = _call(q, k, v, **options)
    with torch.no_grad():
        return custom_ops.flash_attention(q, k, v, spec, t, seed)


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dq, dk, dv)` of `attention_forward` with the same options.

    out and softmax_lse need not be that call's: with those of the attention over more keys, merged from parts, this is
    the part that k and v contribute, which is what ring attention sums up.
    """
    spec, t, seed = _call(q, k, v, **options)
    check_shape("dout", dout, (*q.shape[:-1], v.shape[-1]))
    check_shape("out", out, tuple(dout.shape))
    check_shape("softmax_lse", softmax_lse, (*q.shape[:-3], q.shape[-2], q.shape[-3]))
    with torch.no_grad():
        gradients = custom_ops.flash_attention_backward(dout, q, k, v, out, softmax_lse, spec, t, seed)
    return cast(tuple[Tensor, Tensor, Tensor], gradients[:3])


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[AttentionSpec, AttentionTensors, Tensor | None]:
    packed = cu_seqlens_q is not None
    if packed != (cu_seqlens_k is not None) or (packed and (max_seqlen_q is None or max_seqlen_k is None)):
        raise ValueError(
            "cu_seqlens_q, cu_seqlens_k: expected both, with max_seqlen_q and max_seqlen_k, or neither (dense tensors)"
        )
    rows, keys = (("Tq",), ("Tk",)) if packed else (("B", "Sq"), (q.shape[0], "Sk"))
    check_shape("q", q, (*rows, "Hq", "D"))
    check_shape("k", k, (*keys, "Hkv", q.shape[-1]))
    check_shape("v", v, (*k.shape[:-1], "Dv"))
    check_floating("q", q)
    check_like("k", k, q)
    check_like("v", v, q)
    check_heads(q.shape[-2], k.shape[-2])
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    sizes = {"cu_seqlens_q": batch + 1, "cu_seqlens_k": batch + 1, "seqused_q": batch, "seqused_k": batch}
    lengths = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "seqused_q": seqused_q,
        "seqused_k": seqused_k,
    }
    for name, x in lengths.items():
        if x is not None:
            check_index(name, x, (sizes[name],), q.device)
    check_score_options(q, batch, alibi_slopes, None)
    if dropout_p > 0 and dropout_seed is None:
        raise ValueError("dropout_seed: expected an int64 tensor with dropout_p > 0, got None")
    spec = make_spec(q.shape[-1], softmax_scale, causal, window_size, softcap, dropout_p)
    t = AttentionTensors(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        max_seqlen_q=int(max_seqlen_q) if packed and max_seqlen_q is not None else q.shape[1],
        max_seqlen_k=int(max_seqlen_k) if packed and max_seqlen_k is not None else k.shape[1],
        alibi_slopes=alibi_slopes,
    )
    return replace(spec, wants_dbias=False), t, dropout_seed if dropout_p > 0 else None
