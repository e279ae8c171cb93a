"""flash-attn 3's top-level module `flash_attn_interface`, served by Octavo on any device: its names and arguments.

Hints of its kernels (num_splits, pack_gqa, sm_margin, scheduler_metadata) change no result; those that we have no use
for are ignored. Descales of fp8 tensors and attention_chunk are refused by name.
"""

from typing import Any

import torch
from torch import Tensor

from octavo import ops
from octavo.ops import merge_attention_states

WindowSize = tuple[int | None, int | None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """out (B, Sq, Hq, Dv), with return_attn_probs also softmax_lse (B, Hq, Sq); see `octavo.flash_attn_func`."""
    _refuse(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk)
    return ops.flash_attn_func(
        q, k, v, 0.0, softmax_scale, causal, window_size, softcap,
        deterministic=deterministic, qv=qv, return_lse=return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of qkv (B, S, 3, H, D), or (B, S, Hq + 2·Hkv, D) with num_heads_q."""
    if qkv.dim() == 5:
        q, k, v = qkv.unbind(2)
    elif num_heads_q is not None:
        num_heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = torch.split(qkv, [num_heads_q, num_heads_k, num_heads_k], dim=2)
    else:
        raise ValueError("num_heads_q: expected the number of query heads with a 4-dimensional qkv, got None")
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
        deterministic=deterministic, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """out (Tq, Hq, Dv), with return_attn_probs also softmax_lse (Hq, Tq); see `octavo.flash_attn_varlen_func`."""
    _refuse(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk)
    return ops.flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal, window_size,
        softcap, deterministic=deterministic, qv=qv, seqused_q=seqused_q, seqused_k=seqused_k,
        return_lse=return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """`octavo.flash_attn_with_kvcache`; with cu_seqlens_q and max_seqlen_q, q is packed (Tq, Hq, D) over a page_table
    and the cache holds the new keys already. cu_seqlens_k_new and rotary_seqlens are refused.
    """
    _refuse(
        q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk,
        cu_seqlens_k_new=cu_seqlens_k_new, rotary_seqlens=rotary_seqlens,
    )  # fmt: skip
    if cu_seqlens_q is None:
        return ops.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
            page_table, softmax_scale, causal, window_size, softcap, rotary_interleaved,
            num_splits=num_splits, return_softmax_lse=return_softmax_lse, qv=qv,
        )  # fmt: skip
    _refuse(k=k, v=v, rotary_cos=rotary_cos, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad)
    if page_table is None or max_seqlen_q is None or not isinstance(cache_seqlens, Tensor):
        raise ValueError("cu_seqlens_q: expected page_table, max_seqlen_q and cache_seqlens (B,) int32 beside it")
    return ops.flash_attn_varlen_func(
        q, k_cache, v_cache, cu_seqlens_q, cu_seqlens_q, max_seqlen_q, page_table.shape[1] * k_cache.shape[1],
        0.0, softmax_scale, causal, window_size, softcap,
        block_table=page_table, seqused_k=cache_seqlens, qv=qv, return_lse=return_softmax_lse,
    )  # fmt: skip


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """out (B, S, H, D) and softmax_lse (B, S, H) of out_partial (N, B, S, H, D) and lse_partial (N, B, S, H)."""
    merged, lse = merge_attention_states(out_partial.unbind(0), lse_partial.transpose(-1, -2).unbind(0))
    merged = merged.to(out_dtype or out_partial.dtype)
    return (merged if out is None else out.copy_(merged)), lse.transpose(-1, -2)


def get_scheduler_metadata(*args: Any, **kwargs: Any) -> None:
    """None: our kernels plan inside their launch, whatever the batch."""


def _refuse(**options: Any) -> None:
    for name, value in options.items():
        if value is not None and value is not False and not (isinstance(value, int) and value == 0):
            raise ValueError(f"{name}: not served by octavo's flash_attn_interface; leave it out")
