"""Attention over parts of the keys, merged: outputs weighted by exp(LSE_part − LSE), where LSE sums the parts'
weights.
"""

from collections.abc import Sequence

import torch

from octavo.kernels.spec import Tensor


def refuses_merge_attention_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> str | None:
    """The reference takes every call."""
    return None


def merge_attention_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Outs (…, S, H, D) with LSEs (…, H, S) → `(out, softmax_lse)`; parts that saw nothing (−inf) weigh 0."""
    stacked = torch.stack(list(lses))
    dead = torch.isneginf(stacked).all(dim=0)
    # a dead row would be −inf − (−inf) = NaN, in the derivatives too: weigh it on zeros, then mask
    safe = stacked.masked_fill(dead, 0)
    lse = torch.logsumexp(safe, dim=0)
    weights = torch.exp(safe - lse).masked_fill(dead, 0).transpose(-1, -2).unsqueeze(-1)
    values = torch.stack([o.to(stacked.dtype) for o in outs])
    # a part that saw nothing may hold garbage, and 0 · NaN is NaN
    out = (values.masked_fill(weights == 0, 0) * weights).sum(dim=0)
    return out.to(outs[0].dtype), lse.masked_fill(dead, -torch.inf)
