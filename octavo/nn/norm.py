"""Norms: RMSNorm (with Gemma's 1 + w form) and LayerNorm.

Both accumulate in at least fp32 and round once, to the input's dtype.
"""

import torch
from torch import Tensor, nn
from torch.nn import LayerNorm as LayerNorm


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
        if self.unit_offset:
            # in fp32: near 1, bf16 would round 1 + w to steps of 1/128
            wide = torch.promote_types(x.dtype, torch.float32)
            return nn.functional.rms_norm(x.to(wide), self.weight.shape, 1.0 + self.weight.to(wide), self.eps).to(
                x.dtype
            )
        return nn.functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}" + (", unit_offset=True" if self.unit_offset else "")
