"""torch's own fused CPU attention, forward and backward, and which calls it computes.

Grouped heads are served without expanding keys and values: one call for each member of the groups.
"""

import torch

from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor


def takes_options(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> bool:
    """Whether torch's kernel knows all the options of this call; lengths are `takes_lengths`'s to judge."""
    options = (t.leftpad_k, t.qv, t.alibi_slopes, t.learnable_sink, t.attn_bias)
    plain = all(option is None for option in options) and spec.softcap == 0 and spec.dropout_p == 0
    return plain and q.shape[-1] == v.shape[-1] and q.dtype != torch.float16


def takes_lengths(spec: AttentionSpec, num_rows: int, num_keys: int) -> bool:
    """Whether the mask is one of torch's: none, or a causal one on a square (torch aligns it top-left)."""
    masked = spec.window_left >= 0 or spec.window_right >= 0
    return min(num_rows, num_keys) > 0 and (not masked or (spec.causal and num_rows == num_keys))


def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """q (B, Sq, Hq, D), k and v (B, Sk, Hkv, D) → `(out, softmax_lse)`."""
    group = q.shape[2] // k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    results = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, g::group].transpose(1, 2), k, v, 0.0, spec.causal, attn_mask=None, scale=spec.softmax_scale
        )
        for g in range(group)
    ]
    outs, lses = zip(*results, strict=True)
    return _interleave([out.transpose(1, 2) for out in outs], 2), _interleave(lses, 1)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `forward`; dk and dv are summed over the group in fp32."""
    group = q.shape[2] // k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    dqs, dks, dvs = [], [], []
    for g in range(group):
        dout_g, q_g, out_g = (x[:, :, g::group].transpose(1, 2) for x in (dout, q, out))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout_g, q_g, k, v, out_g, lse[:, g::group], 0.0, spec.causal, attn_mask=None, scale=spec.softmax_scale
        )
        dqs.append(dq.transpose(1, 2))
        dks.append(dk.transpose(1, 2))
        dvs.append(dv.transpose(1, 2))
    return _interleave(dqs, 2), _sum(dks), _sum(dvs)


def _interleave(parts: list[Tensor] | tuple[Tensor, ...], dim: int) -> Tensor:
    """Heads g, g + group, … of each part g, put back in order."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts), dim=dim + 1).flatten(dim, dim + 1)


def _sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)
