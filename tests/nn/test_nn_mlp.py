"""Linear and the MLPs."""

import copy

import gguf
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from octavo.nn import MLP, GatedMLP, Linear
from octavo.ops.linear import QuantizedWeight


def test_gated_mlp_equals_llama() -> None:
    theirs = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48))
    ours = GatedMLP(32, 48)
    gate_up = torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight])
    ours.load_state_dict({"gate_up_proj.weight": gate_up, "down_proj.weight": theirs.down_proj.weight})
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    "mlp", [GatedMLP(4, 6, "gelu_pytorch_tanh", dtype=torch.float64), MLP(4, 6, dtype=torch.float64)]
)
def test_gradcheck(mlp: torch.nn.Module) -> None:
    names, weights = zip(*mlp.named_parameters(), strict=True)

    def call(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(mlp, dict(zip(names, weights, strict=True)), x)

    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *weights))


def test_unknown_activation_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of silu, gelu.*got 'swish9'"):
        GatedMLP(4, 6, "swish9")


@pytest.fixture
def quantized() -> tuple[QuantizedWeight, torch.Tensor]:
    """A Q8_0 weight (48, 64) and the fp32 numbers that it stands for."""
    raw = gguf.quants.quantize(torch.randn(48, 64).numpy(), gguf.GGMLQuantizationType.Q8_0)
    dense = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0))
    return QuantizedWeight.from_gguf(raw, "Q8_0", (48, 64)), dense


def test_linear_takes_a_quantised_weight(quantized: tuple[QuantizedWeight, torch.Tensor]) -> None:
    weight, dense = quantized
    linear = Linear(64, 48, bias=True)
    linear.set_quantized_weight(weight)
    assert [name for name, _ in linear.named_parameters()] == ["bias"]
    assert (linear.activation_dtype, linear.device.type) == (torch.float32, "cpu")
    x = torch.randn(5, 64)
    exact = torch.nn.functional.linear(x, dense, linear.bias)
    # activations are rounded to 16 bits per 32: half a step of 1/32512 on each of 64 products
    for module in (linear, copy.deepcopy(linear)):
        assert (module(x) - exact).abs().max() < 1e-4 * exact.abs().max()


def test_quantised_weight_of_another_shape_is_refused(quantized: tuple[QuantizedWeight, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"shape \(64, 48\), got \(48, 64\)"):
        Linear(48, 64).set_quantized_weight(quantized[0])
