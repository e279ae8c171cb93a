"""RMSNorm, alone or fused with the residual sum before it (Zhang, Sennrich, 2019)."""

from typing import cast

from octavo.kernels.reference import norm as reference
from octavo.kernels.spec import Tensor
from octavo.ops import inference
from octavo.ops.checks import check_shape


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False) -> Tensor:
    """x / √(mean(x²) + eps) · w over the last axis, or · (1 + w) with `unit_offset` (Gemma).

    x (…, D) of any float dtype, weight (D,). Computed in at least fp32, rounded once to x's dtype. Differentiable.
    """
    check_shape("weight", weight, (x.shape[-1],))
    return cast(Tensor, inference.run("rms_norm", reference.rms_norm, (x, weight, eps, unit_offset), weight))


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)`: a branch joins the stream and the next branch's input is made.

    x, residual (…, D) of one shape and dtype, weight (D,). Neither input is changed. Differentiable.
    """
    check_shape("weight", weight, (x.shape[-1],))
    check_shape("residual", residual, tuple(x.shape))
    arguments = (x, residual, weight, eps, unit_offset)
    result = inference.run("add_rms_norm", reference.add_rms_norm, arguments, residual, weight)
    return cast(tuple[Tensor, Tensor], result)
