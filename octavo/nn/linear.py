"""Linear: an `nn.Linear` whose weight may also be a quantised one, kept in its 4- or 8-bit form.

Training and full-precision inference go to `torch.nn.functional.linear`; a quantised weight goes to
`octavo.ops.linear`, which multiplies without unpacking the weight to memory first.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
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

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.weight, Tensor):
            return nn.functional.linear(x, self.weight, self.bias)
        from octavo.ops.linear import linear

        return linear(x, self.weight, self.bias)
