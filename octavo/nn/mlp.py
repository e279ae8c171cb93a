"""The feed-forward half of a block: gated (SwiGLU, GeGLU) with one merged gate_up_proj, or plain."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octavo.nn.linear import Linear

# Hugging Face's names; "gelu_pytorch_tanh" is Gemma's
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


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
        self.activation = _activation(activation)
        self.gate_up_proj = Linear(dim, 2 * hidden_dim, bias, device=device, dtype=dtype)
        self.down_proj = Linear(hidden_dim, dim, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(self.activation(gate) * up)
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
        self.activation = _activation(activation)
        self.up_proj = Linear(dim, hidden_dim, bias, device=device, dtype=dtype)
        self.down_proj = Linear(hidden_dim, dim, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.activation(self.up_proj(x)))
        return out
