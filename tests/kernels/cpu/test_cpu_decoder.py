"""A stack of layers in one kernel call: as near to exact as the layers one by one, in all that an engine does."""

from collections.abc import Iterator
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.models import CausalLM, ModelConfig, build_model
from octavo.nn import Linear
from octavo.nn.cache import make_caches
from octavo.ops.dispatch import use_backend
from octavo.ops.linear import QuantizedWeight

TINY = {
    "architecture": "LlamaForCausalLM",
    "vocab_size": 50,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_layers": 2,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope": {"rope_type": "default", "rope_theta": 1e4},
    "layer_windows": (0, 0),
}
FAMILIES = {
    "llama": {},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "mistral": {"architecture": "MistralForCausalLM", "layer_windows": (0, 7)},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "qk_norm": True},
    "half of each head turns": {
        "head_dim": 64,
        "rope": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
}


def make_model(options: dict[str, object], qtype: str = "Q4_1") -> CausalLM:
    """Random quantised layers."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(**{**TINY, **options}))  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rng = np.random.default_rng(0)
    for layer in model.layers:
        for linear in (m for m in layer.modules() if isinstance(m, Linear)):
            shape = (linear.out_features, linear.in_features)
            size = {"Q4_1": 20, "Q4_0": 18}[qtype]
            raw = rng.integers(0, 256, (shape[0], shape[1] // 32, size), dtype=np.uint8)
            raw[..., :2].view(np.float16)[:] = 0.02 * rng.standard_normal((*raw.shape[:2], 1))
            if qtype == "Q4_1":
                raw[..., 2:4].view(np.float16)[:] = 0.1 * rng.standard_normal((*raw.shape[:2], 1))
            linear.set_quantized_weight(QuantizedWeight.from_gguf(raw, qtype, shape))
    return model


def dense(model: CausalLM) -> CausalLM:
    """The same in fp64, without quantised weights."""
    exact = deepcopy(model)
    for linear in (m for m in exact.layers.modules() if isinstance(m, Linear)):
        weight = linear.weight
        assert isinstance(weight, QuantizedWeight)
        del linear.weight
        linear.weight = torch.nn.Parameter(weight.dequantize())
    return exact.double()


@torch.no_grad()
def run(model: CausalLM, backend: str | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Hidden states of prompts in one step, a chunk behind them, then single tokens."""
    rng = torch.Generator().manual_seed(1)
    rows, caches = make_caches(model, 3, 64, dtype=dtype)
    outputs = []
    with use_backend(backend):
        for new in ([9, 1, 20], [5, 30, 1], [1, 1, 1], [1, 1, 1]):
            step = rows.append(new)
            ids = torch.randint(50, (sum(new),), generator=rng)
            outputs.append(model(ids, step.positions, caches, step.metadata))
    return torch.cat(outputs)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("qtype", ["Q4_1", "Q4_0"])
def test_the_stack_is_as_near_to_exact_as_its_layers_one_by_one(family: str, qtype: str, threads: int) -> None:
    """Both round activations; sums in another order make other values fall on the other side of a half."""
    model = make_model(FAMILIES[family], qtype)
    exact = run(dense(model), "reference", torch.float64)
    modular, fused = run(model, "reference"), run(model, None)
    assert model.stack is not None
    assert not torch.equal(fused, modular)  # or the stack was not used
    error, usual = (fused - exact).norm(), (modular - exact).norm()
    assert error < 1.2 * usual
    assert (fused - modular).norm() < usual


def test_keys_and_values_in_fp16_cost_what_their_rounding_costs() -> None:
    model = make_model({})
    assert model.cache_dtype == torch.float16
    exact = run(dense(model), "reference", torch.float64)
    modular, fused, full = (run(model, *how) for how in (("reference", torch.float16), (None, torch.float16), (None,)))
    error, usual = (fused - exact).norm(), (modular - exact).norm()
    assert (full - exact).norm() < error < 1.2 * usual


def test_a_single_token_through_one_layer_differs_in_the_last_bits_only() -> None:
    model = make_model({"num_layers": 1, "layer_windows": (0,)})
    with torch.no_grad():
        hidden = []
        for backend in ("reference", None):
            rows, caches = make_caches(model, 1, 16)
            step = rows.append(1)
            with use_backend(backend):
                hidden.append(model(torch.tensor([7]), step.positions, caches, step.metadata))
    assert (hidden[0] - hidden[1]).abs().max() < 1e-5 * hidden[0].abs().max()  # a code of one input may differ


def test_a_copy_of_the_model_has_a_stack_of_its_own() -> None:
    model = make_model({})
    expected = run(model, None)
    other = deepcopy(model)
    del model
    assert torch.equal(run(other, None), expected)


@pytest.mark.parametrize(
    "options", [{"hidden_act": "gelu"}, {"head_dim": 48}, {"intermediate_size": 96}], ids=["gelu", "odd head", "fits"]
)
def test_what_does_not_fit_runs_layer_by_layer(options: dict[str, object]) -> None:
    assert (make_model(options).stack is None) == ("intermediate_size" not in options)


def test_layers_of_several_types_run_layer_by_layer() -> None:
    model, other = make_model({}), make_model({}, "Q4_0")
    model.layers[1] = other.layers[1]
    assert model.stack is None
