"""A linear layer for a few rows, at the speed of reading its weight, with the norm before it and the activation or the
residual sum behind it in one launch on a GPU."""

from typing import cast

import torch

from octavo.kernels.reference.linear_small_batch import linear_small_batch as reference
from octavo.kernels.spec import InputNorm as InputNorm
from octavo.kernels.spec import Tensor
from octavo.ops import inference
from octavo.ops.checks import check_shape
from octavo.ops.gated_activation import check_activation

MOST_ROWS = 16  # of x on a GPU; a library's matrix product is as fast beyond


def linear_small_batch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: InputNorm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """norm(x)·weightᵀ + bias, then act(first half) · second half, then + residual; each if given. Differentiable.

    x (M, K), weight (N, K), bias (N,), residual (M, N), or (M, N / 2) with an activation (see `gated_activation`).
    Between the steps the GPU kernel rounds nothing. out_dtype: default x's. At most `MOST_ROWS` rows on a GPU.
    """
    check_shape("x", x, ("M", "K"))
    check_shape("weight", weight, ("N", x.shape[1]))
    if activation is not None:
        check_activation(activation)
    columns = weight.shape[0] if activation is None else weight.shape[0] // 2
    if residual is not None:
        check_shape("residual", residual, (x.shape[0], columns))
    arguments = (x, weight, bias, norm, activation, residual, out_dtype or x.dtype)
    leaves = (weight, bias, residual, None if norm is None else norm.weight)
    return cast(Tensor, inference.run("linear_small_batch", reference, arguments, *leaves))
