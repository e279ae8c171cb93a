"""Mistral: Llama's decoder where every layer sees a sliding window of tokens (or none, in the later releases)."""

from collections.abc import Mapping
from typing import Any

from octavo.models.causal_lm import CausalLM
from octavo.models.config import ModelConfig, hf_common, hf_rope


class MistralForCausalLM(CausalLM):
    """The shared decoder with one window in all of `config.layer_windows`."""

    @classmethod
    def read_hf_config(cls, hf: Mapping[str, Any]) -> ModelConfig:
        common = hf_common(hf, cls.__name__)
        windows = (hf.get("sliding_window") or 0,) * common["num_layers"]
        return ModelConfig(**common | {"layer_windows": windows}, rope=hf_rope(hf))
