"""Qwen3: Qwen2 without the biases and with an RMSNorm over each head of q and k, which keeps their products bounded."""

from collections.abc import Mapping
from typing import Any

from octavo.models.causal_lm import CausalLM
from octavo.models.config import ModelConfig, hf_common, hf_rope
from octavo.models.qwen2 import qwen_layer_windows


class Qwen3ForCausalLM(CausalLM):
    """The shared decoder with `config.qk_norm`; head_dim is its own setting, not hidden_size / num_heads."""

    @classmethod
    def read_hf_config(cls, hf: Mapping[str, Any]) -> ModelConfig:
        bias = hf.get("attention_bias", False)
        common = hf_common({"head_dim": 128, **hf}, cls.__name__)
        common["layer_windows"] = qwen_layer_windows(hf)
        return ModelConfig(**common, rope=hf_rope(hf), qk_norm=True, qkv_bias=bias, o_bias=bias)
