"""act(gate) · up in plain torch; differentiable."""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from octavo.kernels.spec import Tensor

# Hugging Face's names; "gelu_pytorch_tanh" is Gemma's
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def refuses_gated_activation(gate_up: Tensor, activation: str) -> str | None:
    """The reference takes every call."""
    return None


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) · up, of gate_up (…, 2·H) = [gate, up]."""
    gate, up = torch.chunk(gate_up, 2, dim=-1)
    return ACTIVATIONS[activation](gate) * up
