"""Llama (1 to 3.3) and those that copied it, SmolLM2 among them: plain pre-norm decoder, grouped queries, SwiGLU."""

from collections.abc import Mapping
from typing import Any

from octavo.models.causal_lm import CausalLM
from octavo.models.config import ModelConfig, hf_common, hf_rope


class LlamaForCausalLM(CausalLM):
    """RMSNorm, rotary attention, SwiGLU: the shared decoder as it is."""

    @classmethod
    def read_hf_config(cls, hf: Mapping[str, Any]) -> ModelConfig:
        bias = hf.get("attention_bias", False)
        return ModelConfig(
            **hf_common(hf, cls.__name__),
            rope=hf_rope(hf),
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=hf.get("mlp_bias", False),
        )
