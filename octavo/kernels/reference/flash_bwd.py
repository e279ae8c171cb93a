"""Gradients of the reference forward, by torch's autograd through it."""

from dataclasses import replace

import torch

from octavo.kernels.reference.flash_fwd import flash_fwd
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
    names = ["qv", "learnable_sink", "attn_bias"]
    optional = {name: getattr(t, name) for name in names if getattr(t, name) is not None}
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v, *optional.values())]
        extras = dict(zip(optional, leaves[3:], strict=True))
        out, lse = flash_fwd(*leaves[:3], spec, replace(t, **extras))
        targets, seeds = [out], [dout]
        if dlse is not None:
            targets.append(lse)
            seeds.append(dlse.masked_fill(torch.isneginf(lse), 0))
        grads = torch.autograd.grad(targets, leaves, seeds, allow_unused=True, materialize_grads=True)
    by_name = dict(zip(optional, grads[3:], strict=True))
    return Gradients(*grads[:3], by_name.get("qv"), by_name.get("learnable_sink"), by_name.get("attn_bias"))
