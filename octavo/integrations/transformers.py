"""Octavo as an attention implementation of Hugging Face transformers, for training and generation.

    from octavo.integrations import transformers as octavo_transformers
    octavo_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="octavo")

It asks the model for the masks that transformers gives flash attention: none where every token is in use, else the
    padding mask
(B, keys). Causality, sliding windows, softcap, sinks and dropout go to the kernel, so no S × S mask is ever made.
"""

from typing import Any

import torch
from torch import Tensor

from octavo.ops import flash_attn_func, flash_attn_varlen_func
from octavo.ops.padding import pad_input, unpad_input

NAME = "octavo"


def register() -> None:
    """Make `attn_implementation="octavo"` known to transformers (5.0 or newer)."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call: query, key, value (B, H, S, D) → (B, S, H, Dv); it returns no weights.

    attention_mask: (B, keys), true for tokens in use, or None. Packed rows (several sequences in a batch of one) are
        known by
    cu_seq_lens or by position_ids that begin again.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options: dict[str, Any] = {
        "dropout_p": dropout,
        "softmax_scale": scaling,
        "causal": causal,
        "window_size": (-1, -1)
        if sliding_window is None
        else (sliding_window - 1, -1 if causal else sliding_window - 1),
        "softcap": softcap or 0.0,
        "learnable_sink": s_aux,
    }
    if attention_mask is not None:
        return _padded(q, k, v, attention_mask, options), None
    packing: dict[str, Any] = {
        "cu_seqlens_q": cu_seq_lens_q,
        "cu_seqlens_k": cu_seq_lens_k,
        "max_seqlen_q": max_length_q,
        "max_seqlen_k": max_length_k,
    }
    if cu_seq_lens_q is None and position_ids is not None and _is_packed(position_ids, q, k):
        packing = _packing(position_ids)
    if packing["cu_seqlens_q"] is not None:
        out = flash_attn_varlen_func(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), **packing, **options)
        return out.view(*q.shape[:3], -1), None  # type: ignore[union-attr]
    return flash_attn_func(q, k, v, **options), None  # type: ignore[return-value]


def _padded(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor, options: dict[str, Any]) -> Tensor:
    """Attention among the tokens in use; padding gives 0."""
    batch, seqlen = q.shape[:2]
    k, v = k[:, : attention_mask.shape[1]], v[:, : attention_mask.shape[1]]  # a static cache is longer than its mask
    if seqlen == k.shape[1]:
        q, indices, cu_seqlens, longest, _ = unpad_input(q, attention_mask)
        k, v = k.flatten(0, 1)[indices], v.flatten(0, 1)[indices]
        out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
        return pad_input(out, indices, batch, seqlen)  # type: ignore[arg-type]
    # new tokens after a padded past: the queries are all in use, the keys are not
    bias = torch.zeros(attention_mask.shape, dtype=torch.float32, device=q.device)
    bias = bias.masked_fill(~attention_mask.bool(), -torch.inf)
    return flash_attn_func(q, k, v, attn_bias=bias[:, None, None], **options)  # type: ignore[return-value]


def _is_packed(position_ids: Tensor, q: Tensor, k: Tensor) -> bool:
    """Whether one row holds several sequences: its positions begin again at 0."""
    if q.shape[0] != 1 or q.shape[1] != k.shape[1] or position_ids.dim() != 2:
        return False
    return bool((position_ids[0, 1:] == 0).any())


def _packing(position_ids: Tensor) -> dict[str, Any]:
    """The lengths of the sequences in positions (1, T) that begin again at 0."""
    starts = (position_ids[0] == 0).nonzero().flatten()
    cu_seqlens = torch.cat([starts, starts.new_tensor([position_ids.shape[1]])]).to(torch.int32)
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": longest, "max_seqlen_k": longest}
