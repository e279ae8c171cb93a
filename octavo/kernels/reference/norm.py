"""RMSNorm in plain torch, alone and behind a residual sum; differentiable."""

import torch
from torch.nn.functional import rms_norm as torch_rms_norm

from octavo.kernels.spec import Tensor


def refuses_rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> str | None:
    """The reference takes every call."""
    return None


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    """x / √(mean(x²) + eps) · w, or · (1 + w) with `unit_offset`, over the last axis; in at least fp32, rounded
    once."""
    if unit_offset:
        # in fp32: near 1, bf16 would round 1 + w to steps of 1/128
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch_rms_norm(x.to(wide), weight.shape, 1.0 + weight.to(wide), eps).to(x.dtype)
    return torch_rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def refuses_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> str | None:
    """The reference takes every call."""
    return None


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    """`(norm(x + residual), x + residual)`, of the sum as it is rounded to x's dtype."""
    total = x + residual
    return rms_norm(total, weight, eps, unit_offset), total
