"""Configs are read in all their spellings, and what makes no sense is refused by name."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.models import ARCHITECTURES, config_from_hf, read_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SCALINGS = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("rope_type", SCALINGS)
@pytest.mark.parametrize("type_key", ["rope_type", "type"])
def test_old_and_new_rope_spellings_mean_the_same(rope_type, type_key):
    numbers = SCALINGS[rope_type]
    old = config_from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": {type_key: rope_type, **numbers}})
    new = config_from_hf({**LLAMA, "rope_parameters": {"rope_type": rope_type, "rope_theta": 5e5, **numbers}})
    assert old == new
    assert old.rope["rope_theta"] == 5e5
    written = transformers.LlamaConfig(**LLAMA, rope_theta=5e5, rope_scaling={"rope_type": rope_type, **numbers})
    assert dict(config_from_hf(written.to_dict()).rope) == dict(old.rope) | dict(written.rope_parameters)


def test_defaults_of_an_old_llama():
    config = config_from_hf({key: value for key, value in LLAMA.items() if key != "num_key_value_heads"})
    assert config.num_kv_heads == config.num_heads == 4
    assert config.head_dim == 12
    assert dict(config.rope) == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.layer_windows == (0, 0, 0)
    assert config.eos_token_ids == ()


@pytest.mark.parametrize(("eos", "expected"), [(None, ()), (2, (2,)), ([2, 5], (2, 5))])
def test_end_of_sequence_ids(eos, expected):
    assert config_from_hf({**LLAMA, "eos_token_id": eos}).eos_token_ids == expected


def test_old_gemma3_spelling():
    old = {
        **LLAMA,
        "architectures": ["Gemma3ForCausalLM"],
        "num_hidden_layers": 7,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 5,
        "sliding_window_pattern": 3,
    }
    config = config_from_hf(old)
    assert config.layer_windows == (5, 5, 0, 5, 5, 0, 5)
    assert config.rope == {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    assert config.local_rope == {"rope_type": "default", "rope_theta": 1e4}
    assert config.tie_word_embeddings
    assert config.softmax_scale == 256**-0.5


def test_the_text_part_of_a_vision_model():
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106]}
    config = config_from_hf({**nested, "text_config": {**LLAMA, "model_type": "gemma3_text"}})
    assert config.architecture == "Gemma3ForCausalLM"
    assert config.hidden_size == 48
    assert config.eos_token_ids == (1, 106)


def test_qwen_windows_begin_where_the_config_says():
    qwen = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 7, "max_window_layers": 2}
    assert config_from_hf(qwen).layer_windows == (0, 0, 0)
    assert config_from_hf({**qwen, "use_sliding_window": True}).layer_windows == (0, 0, 7)


def test_cache_bytes_and_parameters():
    config = config_from_hf(LLAMA)
    assert config.kv_bytes_per_token(torch.bfloat16) == 2 * 3 * 2 * 12 * 2  # K and V, layers, heads, head_dim, bytes
    assert config.num_parameters == transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).num_parameters()


def test_an_unknown_architecture_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"\['MambaForCausalLM'\]; known: LlamaForCausalLM, Qwen2ForCausalLM"):
        config_from_hf({**LLAMA, "architectures": ["MambaForCausalLM"]})
    with pytest.raises(ValueError, match="known: "):
        config_from_hf({"model_type": "mamba"})
    assert config_from_hf({**LLAMA, "architectures": None, "model_type": "qwen2"}).architecture == "Qwen2ForCausalLM"


REFUSED = {
    "num_hidden_layers": [0, -1, 10**9, "three", 2.5, None],
    "hidden_size": [0, 1 << 40, "48"],
    "vocab_size": [0, True, [97]],
    "num_key_value_heads": [3],
    "rms_norm_eps": [0, -1.0, float("nan"), "small"],
    "rope_theta": [0, float("inf"), "large"],
    "partial_rotary_factor": [0, 1.5, "half"],
    "rope_scaling": ["linear", 7],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_values_that_make_no_sense(name, value):
    with pytest.raises(ValueError, match=r"config|layers|num_kv_heads"):
        config_from_hf({**LLAMA, name: value})


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_missing_field_is_named(name):
    with pytest.raises(ValueError, match=f"lacks '{name}'"):
        config_from_hf({key: value for key, value in LLAMA.items() if key != name})


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "full_attention"]), st.integers(), max_size=2),
)
OPTIONAL = ["rope_theta", "rope_scaling", "rope_parameters", "head_dim", "eos_token_id", "text_config", "layer_types"]
WINDOWS = ["sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern"]
EXPERTS = {
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "moe_intermediate_size": 13,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "num_experts": 8,
}
ROUTING = ["first_k_dense_replace", "n_shared_experts", "n_group", "topk_group", "topk_method", "mlp_only_layers"]
KEYS = [*(key for key in LLAMA if key != "architectures"), *OPTIONAL, *WINDOWS, "query_pre_attn_scalar"]
KEYS += [*EXPERTS, *ROUTING, "decoder_sparse_step", "q_lora_rank", "routed_scaling_factor"]


@given(st.sampled_from(sorted(ARCHITECTURES)), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
@settings(max_examples=500, deadline=None)
def test_any_json_gives_a_config_or_a_value_error(architecture, changes):
    try:
        config = config_from_hf({**LLAMA, **EXPERTS, "architectures": [architecture], **changes})
    except ValueError:
        return
    assert config == replace(config)


def test_directories(tmp_path):
    with pytest.raises(ValueError, match="missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{nonsense")
    with pytest.raises(ValueError, match="not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7], "temperature": 0.6}))
    assert read_config(tmp_path).eos_token_ids == (9, 7)
    with pytest.raises(ValueError, match="does not exist"):
        read_config(tmp_path / "nowhere")
