"""Linear: an `nn.Linear` whose weight may also be a quantised one, kept in its 4- or 8-bit form.

Training and full-precision inference go to `torch.nn.functional.linear`; a quantised weight goes to
`octavo.ops.linear`, which multiplies without unpacking the weight to memory first.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.ops.linear_small_batch import MOST_ROWS, InputNorm

if TYPE_CHECKING:
    from octavo.nn.norm import RMSNorm
    from octavo.ops.linear import QuantizedWeight


class Linear(nn.Linear):
    """y = x·Wᵀ + b; x (…, in_features), W (out_features, in_features) a Parameter or a quantised weight."""

    weight: "Tensor | QuantizedWeight"  # type: ignore[assignment]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)

    @property
    def device(self) -> torch.device:
        return self.weight.device if isinstance(self.weight, Tensor) else self.weight.codes.device

    @property
    def activation_dtype(self) -> torch.dtype:
        """The dtype of y: the weight's, or fp32 beside a quantised weight."""
        return self.weight.dtype if isinstance(self.weight, Tensor) else torch.float32

    def set_quantized_weight(self, weight: "QuantizedWeight") -> None:
        """Replace the Parameter by a `QuantizedWeight` of the same shape; from then on it is no parameter."""
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"weight must have shape {(self.out_features, self.in_features)}, got {tuple(weight.shape)}"
            )
        del self.weight
        self.weight = weight

    def forward(
        self,
        x: Tensor,
        *,
        norm: "RMSNorm | None" = None,
        activation: str | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """act(norm(x)·Wᵀ + b) + residual, each part if given: what stands around a linear layer in a decoder.

        activation: act(first half) · second half, see `ops.gated_activation`. out_dtype: of the result, default x's.
        Where `ops.fuses` says so (inference on a GPU) the parts are fused as far as kernels allow, and the result may
        be written over `residual`.
        """
        if isinstance(self.weight, Tensor) and ops.fuses(x, self.weight, self.bias, residual):
            return self._fused(x, self.weight, norm, activation, residual, out_dtype)
        y = self._multiply(x if norm is None else norm(x))
        if activation is not None:
            y = ops.gated_activation(y, activation)
        if residual is not None:
            y = residual + y
        return y if out_dtype is None else y.to(out_dtype)

    def _multiply(self, x: Tensor) -> Tensor:
        if isinstance(self.weight, Tensor):
            return nn.functional.linear(x, self.weight, self.bias)
        from octavo.ops.linear import linear

        return linear(x, self.weight, self.bias)

    def _fused(
        self,
        x: Tensor,
        weight: Tensor,
        norm: "RMSNorm | None",
        activation: str | None,
        residual: Tensor | None,
        out_dtype: torch.dtype | None,
    ) -> Tensor:
        rows = x.flatten(0, -2)
        flat_residual = None if residual is None else residual.flatten(0, -2)
        # the kernel's matrix instructions would lose precision in other dtypes
        most_rows = MOST_ROWS if rows.dtype == torch.bfloat16 else 1
        if rows.shape[0] <= most_rows:
            input_norm = None if norm is None else InputNorm(norm.weight, norm.eps, norm.unit_offset)
            y = ops.linear_small_batch(
                rows,
                weight,
                self.bias,
                norm=input_norm,
                activation=activation,
                residual=flat_residual,
                out_dtype=out_dtype,
            )
        else:
            y = self._matrix_product(rows if norm is None else norm(rows), weight, activation, flat_residual, out_dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _matrix_product(
        self,
        rows: Tensor,
        weight: Tensor,
        activation: str | None,
        residual: Tensor | None,
        out_dtype: torch.dtype | None,
    ) -> Tensor:
        bias: Tensor | None = self.bias
        if bias is None and activation is None and rows.dtype == weight.dtype:
            if residual is not None:  # the library adds into it
                return residual.addmm_(rows, weight.t())
            if out_dtype == torch.float32 and rows.dtype in (torch.float16, torch.bfloat16):  # never rounded to those
                return torch.mm(rows, weight.t(), out_dtype=torch.float32)
        y = nn.functional.linear(rows, weight, bias)
        if activation is not None:
            y = ops.gated_activation(y, activation)
        if residual is not None:
            y += residual
        return y if out_dtype is None else y.to(out_dtype)
