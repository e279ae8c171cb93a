"""The feed-forward half of a block: gated (SwiGLU, GeGLU) with one merged gate_up_proj, or plain."""

import torch
from torch import Tensor, nn

from octavo.nn.linear import Linear
from octavo.nn.norm import RMSNorm
from octavo.ops.gated_activation import ACTIVATIONS, check_activation


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)): SwiGLU with "silu", GeGLU with "gelu"; x (…, dim).

    `gate_up_proj` holds gate's rows, then up's: one matrix product where a checkpoint has two.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: str = "silu",
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.activation_name, self.activation = activation, ACTIVATIONS[activation]
        self.gate_up_proj = Linear(dim, 2 * hidden_dim, bias, device=device, dtype=dtype)
        self.down_proj = Linear(hidden_dim, dim, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
        """norm: of x, first; residual: joins the result, and may be overwritten by it, as in `Linear`."""
        hidden = self.gate_up_proj(x, norm=norm, activation=self.activation_name)
        out: Tensor = self.down_proj(hidden, residual=residual)
        return out


class MLP(nn.Module):
    """down(act(up(x))), GPT-2's and BERT's form; x (…, dim)."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: str = "gelu",
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.activation = ACTIVATIONS[activation]
        self.up_proj = Linear(dim, hidden_dim, bias, device=device, dtype=dtype)
        self.down_proj = Linear(hidden_dim, dim, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.activation(self.up_proj(x)))
        return out
