"""Qwen2 and Qwen2.5: Llama's decoder with biases on q, k and v, and an optional window on the upper layers."""

from collections.abc import Mapping
from typing import Any

from octavo.models.causal_lm import CausalLM
from octavo.models.config import ModelConfig, hf_common, hf_layer_windows, hf_rope


class Qwen2ForCausalLM(CausalLM):
    """The shared decoder with `config.qkv_bias`."""

    @classmethod
    def read_hf_config(cls, hf: Mapping[str, Any]) -> ModelConfig:
        common = hf_common(hf, cls.__name__)
        common["layer_windows"] = qwen_layer_windows(hf)
        return ModelConfig(**common, rope=hf_rope(hf), qkv_bias=True)


def qwen_layer_windows(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers from `max_window_layers` on have the window, and only when `use_sliding_window` says so."""
    layers, first = int(hf["num_hidden_layers"]), hf.get("max_window_layers", 28)
    if not hf.get("use_sliding_window", False):
        return (0,) * layers
    kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    return hf_layer_windows(hf, kinds)
