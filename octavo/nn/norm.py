"""Norms: RMSNorm (with Gemma's 1 + w form) and LayerNorm.

Both accumulate in at least fp32 and round once, to the input's dtype.
"""

import torch
from torch import Tensor, nn
from torch.nn import LayerNorm as LayerNorm

from octavo import ops


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · w over the last axis, or · (1 + w) with `unit_offset` (Gemma's form; w starts at 0).

    x (…, dim) of any float dtype; the result has x's dtype.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        unit_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """`(norm(x + residual), x + residual)`, on a GPU in one pass."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps, unit_offset=self.unit_offset)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}" + (", unit_offset=True" if self.unit_offset else "")
