"""Attention computed in parts over disjoint keys, put together: what split-KV, ring and cascade attention need."""

from collections.abc import Sequence
from typing import cast

import torch

from octavo.kernels.spec import Tensor
from octavo.ops import dispatch
from octavo.ops.checks import check_shape


def merge_attention_states(outs: Sequence[Tensor], softmax_lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over the union of the parts' keys, from each part's output and LSE.

    outs: N tensors (B, S, H, Dv), or packed (T, H, Dv). softmax_lses: N tensors (B, H, S), or (H, T), natural
        logarithm.
    Returns `(out, softmax_lse)` of one part's shapes; a part that saw nothing (−inf) weighs nothing, whatever its
    output. Differentiable. Source: Ye et al., "FlashInfer", 2025, §2.2.
    """
    if len(outs) == 0 or len(outs) != len(softmax_lses):
        raise ValueError(
            f"outs, softmax_lses: expected as many of one as of the other, got {len(outs)} and {len(softmax_lses)}"
        )
    *batch, rows, heads, _ = outs[0].shape
    for i, (out, lse) in enumerate(zip(outs, softmax_lses, strict=True)):
        check_shape(f"outs[{i}]", out, tuple(outs[0].shape))
        check_shape(f"softmax_lses[{i}]", lse, (*batch, heads, rows))
    # the reference is differentiable
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (*outs, *softmax_lses))
    backend = dispatch.forced_backend() or ("reference" if wants_grad else None)
    arguments = (outs, softmax_lses)
    return cast(tuple[Tensor, Tensor], dispatch.run("merge_attention_states", outs[0].device, arguments, backend))
