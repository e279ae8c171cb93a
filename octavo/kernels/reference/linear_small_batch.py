"""A linear layer with what stands around it in a decoder, in plain torch; differentiable."""

import torch
from torch.nn.functional import linear

from octavo.kernels.reference.gated_activation import gated_activation
from octavo.kernels.reference.norm import rms_norm
from octavo.kernels.spec import InputNorm, Tensor


def refuses_linear_small_batch(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: InputNorm | None, activation: str | None,
    residual: Tensor | None, out_dtype: torch.dtype,
) -> str | None:  # fmt: skip
    """The reference takes every call."""
    return None


def linear_small_batch(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: InputNorm | None, activation: str | None,
    residual: Tensor | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x (M, K), weight (N, K) → norm, product, bias, gated activation, residual sum, as far as they are given."""
    if norm is not None:
        x = rms_norm(x, *norm)
    wide = out_dtype.itemsize > x.dtype.itemsize
    y = linear(x.to(out_dtype), weight.to(out_dtype), bias) if wide else linear(x, weight, bias)
    if activation is not None:
        y = gated_activation(y, activation)
    return (y if residual is None else residual + y).to(out_dtype)
