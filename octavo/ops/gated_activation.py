"""The middle of a gated MLP: act(gate) · up, from the merged projection (Shazeer, "GLU Variants", 2020)."""

from typing import cast

from octavo.kernels.reference.gated_activation import ACTIVATIONS as ACTIVATIONS
from octavo.kernels.reference.gated_activation import gated_activation as reference
from octavo.kernels.spec import Tensor
from octavo.ops import inference


def gated_activation(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) · up of gate_up (…, 2·H), gate's H columns, then up's; returns (…, H). Differentiable.

    activation: one of `ACTIVATIONS`, by Hugging Face's names: silu, gelu, gelu_pytorch_tanh, gelu_new, relu.
    """
    check_activation(activation)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected an even number of columns (gate's, then up's), got {tuple(gate_up.shape)}")
    return cast(Tensor, inference.run("gated_activation", reference, (gate_up, activation)))


def check_activation(activation: str) -> None:
    """Raise `ValueError` unless it is one of `ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
