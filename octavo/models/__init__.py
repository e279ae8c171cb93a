"""Decoder families, and the loaders that bring their weights, configs and tokenizers from safetensors and GGUF.

Names load on first use: who only needs a tokenizer, such as the server's process, does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "octavo.models.causal_lm": ["CausalLM"],
    "octavo.models.chat_template": ["ChatTemplate", "ChatTemplateError"],
    "octavo.models.config": ["ModelConfig"],
    "octavo.models.default_model": ["default_model_path"],
    "octavo.models.loader": ["LoadedModel", "load_dummy_model", "load_model", "read_config", "weight_bytes"],
    "octavo.models.registry": ["ARCHITECTURES", "build_model", "config_from_hf"],
    "octavo.models.tokenizer": ["SpecialTokens", "Tokenizer"],
    "octavo.models.tokenizer_files": ["read_tokenizer"],
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from octavo.models.causal_lm import CausalLM as CausalLM
    from octavo.models.chat_template import ChatTemplate as ChatTemplate
    from octavo.models.chat_template import ChatTemplateError as ChatTemplateError
    from octavo.models.config import ModelConfig as ModelConfig
    from octavo.models.default_model import default_model_path as default_model_path
    from octavo.models.loader import LoadedModel as LoadedModel
    from octavo.models.loader import load_dummy_model as load_dummy_model
    from octavo.models.loader import load_model as load_model
    from octavo.models.loader import read_config as read_config
    from octavo.models.loader import weight_bytes as weight_bytes
    from octavo.models.registry import ARCHITECTURES as ARCHITECTURES
    from octavo.models.registry import build_model as build_model
    from octavo.models.registry import config_from_hf as config_from_hf
    from octavo.models.tokenizer import SpecialTokens as SpecialTokens
    from octavo.models.tokenizer import Tokenizer as Tokenizer
    from octavo.models.tokenizer_files import read_tokenizer as read_tokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'octavo.models' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
