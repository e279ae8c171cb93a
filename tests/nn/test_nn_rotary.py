"""RotaryEmbedding: the numbers of `transformers`, both styles, every scaling."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.llama import modeling_llama

from octavo.nn import PagedRows, RotaryEmbedding, apply_rotary

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn, betas": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
        "original_max_position_embeddings": 128,
    },
    "yarn, DeepSeek": {
        "rope_type": "yarn",
        "factor": 4.0,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 128,
    },
    "yarn, fixed factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "attention_factor": 1.5,
        "original_max_position_embeddings": 128,
    },
}


def llama_config(**rope_parameters: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default", **rope_parameters},
    )


@pytest.mark.parametrize("partial_rotary_factor", [1.0, 0.5])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(name: str, partial_rotary_factor: float) -> None:
    config = llama_config(partial_rotary_factor=partial_rotary_factor, **SCALINGS[name])
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[SCALINGS[name]["rope_type"]](config)
    rope = RotaryEmbedding.from_hf_config(config.to_dict())
    torch.testing.assert_close(rope.inv_freq(), inv_freq, rtol=5e-7, atol=0)
    assert rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def test_default_cos_and_sin_equal_llama() -> None:
    config = llama_config()
    positions = torch.arange(300)
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    rotation = RotaryEmbedding.from_hf_config(config.to_dict())(positions)
    torch.testing.assert_close(rotation.cos, cos[0, :, :32], rtol=0, atol=0)
    torch.testing.assert_close(rotation.sin, sin[0, :, :32], rtol=0, atol=0)


@pytest.mark.parametrize("seq_len", [100, 512, 513, 2000])
def test_dynamic_ntk_follows_the_sequence_length(seq_len: int) -> None:
    config = llama_config(**SCALINGS["dynamic"])
    rope = RotaryEmbedding.from_hf_config(config.to_dict())
    inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=seq_len)
    torch.testing.assert_close(rope.inv_freq(seq_len=seq_len), inv_freq, rtol=2e-6, atol=0)
    positions = torch.arange(seq_len)
    torch.testing.assert_close(rope(positions).cos, (positions[:, None] * inv_freq).cos(), rtol=0, atol=2e-3)


def test_dynamic_ntk_in_a_packed_batch_looks_at_each_sequence_alone() -> None:
    rope = RotaryEmbedding(16, scaling=SCALINGS["dynamic"], max_position_embeddings=8)
    step = PagedRows(2, 64).append([5, 20])
    together = rope(step.positions, step.metadata)
    torch.testing.assert_close(together.cos[:5], rope(torch.arange(5)).cos, rtol=0, atol=0)
    torch.testing.assert_close(together.cos[5:], rope(torch.arange(20)).cos, rtol=0, atol=0)


def test_half_split_style_equals_llama() -> None:
    config = llama_config()
    q, k = torch.randn(2, 1, 7, 4, 64)
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(q, torch.arange(7)[None])
    want_q, want_k = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    rope = RotaryEmbedding.from_hf_config(config.to_dict())
    rotation = rope(torch.arange(7))
    torch.testing.assert_close(rope.rotate(q, rotation), want_q)
    torch.testing.assert_close(rope.rotate(k, rotation), want_k)


def test_interleaved_style_equals_deepseek() -> None:
    q, k = torch.randn(2, 1, 4, 7, 16)
    rope = RotaryEmbedding(16, interleaved=True)
    angles = torch.arange(7)[:, None] * rope.inv_freq()
    want_q, want_k = modeling_deepseek_v2.apply_rotary_emb(q, k, torch.polar(torch.ones_like(angles), angles)[None])
    for x, want in ((q, want_q), (k, want_k)):
        torch.testing.assert_close(rope.rotate(x.transpose(1, 2), rope(torch.arange(7))).transpose(1, 2), want)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 500),
    st.integers(0, 500),
    st.integers(0, 3000),
    st.booleans(),
    st.sampled_from([None, *(n for n in SCALINGS if n != "dynamic")]),
)
def test_scores_depend_on_the_distance_only(i: int, j: int, shift: int, interleaved: bool, name: str | None) -> None:
    rope = RotaryEmbedding(
        16, scaling=SCALINGS[name] if name else None, max_position_embeddings=512, interleaved=interleaved
    )
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)

    def score(i: int, j: int) -> float:
        return float((rope.rotate(q, rope(torch.tensor([i]))) * rope.rotate(k, rope(torch.tensor([j])))).sum())

    # angles are fp32: near 3500 rad their spacing is 2.4e-4
    assert score(i, j) == pytest.approx(score(i + shift, j + shift), abs=2e-2)


def test_partial_rotation_leaves_the_rest() -> None:
    x = torch.randn(5, 2, 16)
    rope = RotaryEmbedding(8)
    rotation = rope(torch.arange(5))
    turned = rope.rotate(x, rotation)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    torch.testing.assert_close(turned[..., :8], apply_rotary(x[..., :8], rotation))


def test_low_precision_input_is_turned_in_fp32_and_rounded_once() -> None:
    x = torch.randn(5, 2, 16, dtype=torch.bfloat16)
    rope = RotaryEmbedding(16)
    rotation = rope(torch.arange(5))
    assert torch.equal(rope.rotate(x, rotation), rope.rotate(x.float(), rotation).bfloat16())


@pytest.mark.parametrize("scaling", [SCALINGS["yarn"], SCALINGS["llama3"]])
def test_config_forms_old_and_new_agree(scaling: dict[str, Any]) -> None:
    common = {"hidden_size": 128, "num_attention_heads": 2, "max_position_embeddings": 512}
    old_scaling = {k: v for k, v in scaling.items() if k != "rope_type"} | {"type": scaling["rope_type"]}
    old = RotaryEmbedding.from_hf_config({**common, "rope_theta": 5e5, "rope_scaling": old_scaling})
    new = RotaryEmbedding.from_hf_config({**common, "rope_parameters": {"rope_theta": 5e5, **scaling}})
    nested_config = {**common, "rope_parameters": {"full_attention": {"rope_theta": 5e5, **scaling}}}
    nested = RotaryEmbedding.from_hf_config(nested_config, layer_type="full_attention")
    assert old.base == new.base == nested.base == 5e5
    assert torch.equal(old.inv_freq(), new.inv_freq())
    assert torch.equal(old.inv_freq(), nested.inv_freq())


def test_yarn_factor_defaults_to_the_ratio_of_contexts() -> None:
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 128}
    rope = RotaryEmbedding(16, scaling=scaling, max_position_embeddings=512)
    assert torch.equal(rope.inv_freq(), RotaryEmbedding(16, scaling={**scaling, "factor": 4.0}).inv_freq())


def test_deepseek_scale_factor() -> None:
    assert RotaryEmbedding(16).softmax_scale_factor == 1.0
    assert RotaryEmbedding(16, scaling=SCALINGS["yarn"]).softmax_scale_factor == 1.0
    mscale = 0.1 * math.log(4.0) + 1.0
    assert RotaryEmbedding(16, scaling=SCALINGS["yarn, DeepSeek"]).softmax_scale_factor == pytest.approx(mscale**2)


def test_frequencies_survive_dtype_casts_and_the_meta_device() -> None:
    with torch.device("meta"):
        rope = RotaryEmbedding(16, scaling=SCALINGS["yarn"]).bfloat16()
        dynamic = RotaryEmbedding(16, scaling=SCALINGS["dynamic"], max_position_embeddings=8)
    assert torch.equal(rope.inv_freq(), RotaryEmbedding(16, scaling=SCALINGS["yarn"]).inv_freq())
    assert dynamic(torch.arange(9)).cos.isfinite().all()
    assert rope.state_dict() == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotary_dim": 7}, "rotary_dim must be even"),
        ({"rotary_dim": 8, "scaling": {"rope_type": "longrope"}}, "rope_type must be one of"),
        ({"rotary_dim": 8, "scaling": {"rope_type": "linear"}}, "factor must be a number"),
        ({"rotary_dim": 8, "scaling": {"rope_type": "dynamic", "factor": 2.0}}, "max_position_embeddings"),
        ({"rotary_dim": 8, "scaling": {"rope_type": "yarn", "factor": "much"}}, "factor must be a number"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(**arguments)
