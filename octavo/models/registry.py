"""The known architectures, and the config of a model that one of them can read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.models.causal_lm import CausalLM
from octavo.models.config import ModelConfig, read_json
from octavo.models.deepseek_v2 import DeepseekV2ForCausalLM
from octavo.models.deepseek_v3 import DeepseekV3ForCausalLM
from octavo.models.gemma3 import Gemma3ForCausalLM
from octavo.models.llama import LlamaForCausalLM
from octavo.models.mistral import MistralForCausalLM
from octavo.models.qwen2 import Qwen2ForCausalLM
from octavo.models.qwen3 import Qwen3ForCausalLM
from octavo.models.qwen3_moe import Qwen3MoeForCausalLM

ARCHITECTURES: dict[str, type[CausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
    "DeepseekV2ForCausalLM": DeepseekV2ForCausalLM,
    "DeepseekV3ForCausalLM": DeepseekV3ForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Gemma3ForCausalLM": Gemma3ForCausalLM,
    "Gemma3ForConditionalGeneration": Gemma3ForCausalLM,  # its text decoder
}
_ARCHITECTURE_OF_MODEL_TYPE = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}


def config_from_hf(source: Path | Mapping[str, Any]) -> ModelConfig:
    """The config of a Hugging Face directory, or of a config.json's content.

    Raises `ValueError` for an architecture that is not in `ARCHITECTURES`, for a field that is missing or makes no
    sense.
    """
    hf = source if isinstance(source, Mapping) else read_json(source / "config.json")
    names = hf.get("architectures") or [_ARCHITECTURE_OF_MODEL_TYPE.get(hf.get("model_type", ""), hf.get("model_type"))]
    name = names[0] if isinstance(names, list) and isinstance(names[0], str) else None
    if name not in ARCHITECTURES:
        raise ValueError(f"architectures of the model config is {names!r}; known: {', '.join(ARCHITECTURES)}")
    text = hf.get("text_config") or hf
    if not isinstance(text, Mapping):
        raise ValueError(f"text_config of the model config must be an object, got {type(text).__name__}")  # noqa: TRY004
    try:
        return ARCHITECTURES[name].read_hf_config({"eos_token_id": hf.get("eos_token_id"), **text})
    except KeyError as missing:
        raise ValueError(f"the model config of {name} lacks {missing}") from None
    except (TypeError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"the model config of {name} holds a value that makes no sense: {error}") from None


def build_model(config: ModelConfig, **factory: Any) -> CausalLM:
    """The model of `config.architecture`; `factory` is device and dtype of its parameters."""
    if config.architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {config.architecture!r} is not known; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[config.architecture](config, **factory)
