"""Attention on the CPU: torch's fused kernel where it fits the call."""

import torch

from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor


def refuses_flash_fwd(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> str | None:
    """Why this kernel cannot take the call, or None."""
    if spec.softcap or spec.dropout_p or t.alibi_slopes is not None or t.learnable_sink is not None or t.qv is not None:
        return "softcap, dropout, ALiBi, sinks and qv are the reference's for now"
    if q.dtype not in (torch.float32, torch.bfloat16) or k.shape[-1] != v.shape[-1]:
        return "it takes fp32 and bf16 with D = Dv"
    if t.cu_seqlens_q is not None and t.block_table is None:
        return "it takes dense calls"
    return None


def flash_fwd(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> tuple[Tensor, Tensor]:
    """`(out, softmax_lse)` of a dense call."""
    batch, sq, num_heads, head_dim = q.shape
    sk, num_kv_heads = k.shape[1:3]
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if sq == 1 and spec.window_left < 0:
        scores = q.reshape(batch, num_kv_heads, -1, head_dim) @ keys.transpose(2, 3)
        scores = scores.float() * spec.softmax_scale
        lse = torch.logsumexp(scores, -1, keepdim=True)
        out = torch.exp(scores - lse).to(q.dtype) @ values
        return out.reshape(batch, 1, num_heads, head_dim), lse.reshape(batch, num_heads, 1)
    mask = None
    if spec.window_left >= 0 or spec.window_right >= 0:
        diagonal = torch.arange(sk) - torch.arange(sq)[:, None] - (sk - sq)
        seen = torch.ones(sq, sk, dtype=torch.bool)
        if spec.window_left >= 0:
            seen &= diagonal >= -spec.window_left
        if spec.window_right >= 0:
            seen &= diagonal <= spec.window_right
        mask = torch.zeros(sq, sk, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
    group = num_heads // num_kv_heads
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2),
        keys.repeat_interleave(group, 1),
        values.repeat_interleave(group, 1),
        attn_mask=mask,
        scale=spec.softmax_scale,
    )
    return out.transpose(1, 2).nan_to_num_(0.0), lse
