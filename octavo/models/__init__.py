"""Decoder families, and the loaders that bring their weights, configs and tokenizers from safetensors and GGUF."""

from octavo.models.causal_lm import CausalLM
from octavo.models.chat_template import ChatTemplate, ChatTemplateError
from octavo.models.config import ModelConfig
from octavo.models.default_model import default_model_path
from octavo.models.loader import LoadedModel, load_dummy_model, load_model, read_config, read_tokenizer, weight_bytes
from octavo.models.registry import ARCHITECTURES, build_model, config_from_hf
from octavo.models.tokenizer import SpecialTokens, Tokenizer

__all__ = [
    "ARCHITECTURES",
    "CausalLM",
    "ChatTemplate",
    "ChatTemplateError",
    "LoadedModel",
    "ModelConfig",
    "SpecialTokens",
    "Tokenizer",
    "build_model",
    "config_from_hf",
    "default_model_path",
    "load_dummy_model",
    "load_model",
    "read_config",
    "read_tokenizer",
    "weight_bytes",
]
