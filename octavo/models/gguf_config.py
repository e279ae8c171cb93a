"""`ModelConfig` from GGUF metadata, which names everything by its architecture: `llama.block_count`, …"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from octavo.models.config import MAX_LAYERS, ModelConfig

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",  # Mistral too: its GGUF files carry no window
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_CONTROL = 3  # a value of tokenizer.ggml.token_type
# Tokens that end an assistant's turn in one chat format or another: a file's one eos is often only the document's end.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
_GEMMA3_PATTERN = 6  # every sixth layer sees everything


@dataclass(frozen=True, slots=True)
class _Section:
    """The keys of one architecture, read by type. A missing key without a default is an error."""

    metadata: Mapping[str, Any]
    architecture: str

    def _get(self, key: str, kind: type | tuple[type, ...], expected: str, default: Any) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ValueError(f"the GGUF metadata lacks {self.architecture}.{key}")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{self.architecture}.{key} of the GGUF metadata must be {expected}, got {value!r:.80}")  # noqa: TRY004
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._get(key, int, "an integer", default))

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._get(key, (int, float), "a number", default))

    def text(self, key: str, default: str | None = None) -> str:
        return str(self._get(key, str, "a string", default))


def config_from_gguf(metadata: Mapping[str, Any], tensor_shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """Read `GGUFFile.metadata`; the tensors' shapes tell what the metadata leaves out (ties, biases)."""
    name = metadata.get("general.architecture")
    if name not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ValueError(f"general.architecture of the GGUF file is {name!r:.80}, which is not known; known: {known}")
    section, gemma = _Section(metadata, name), name == "gemma3"
    if section.integer("expert_count", 0):
        raise ValueError(f"{name}.expert_count of the GGUF file is not 0: mixtures of experts are not supported")
    embedding = tensor_shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise ValueError(f"the GGUF file has no two-dimensional token_embd.weight (got shape {embedding})")
    layers, heads, hidden = (
        section.integer(key) for key in ("block_count", "attention.head_count", "embedding_length")
    )
    if heads < 1 or not 1 <= layers <= MAX_LAYERS:
        raise ValueError(f"the GGUF file claims {layers} layers (1 to {MAX_LAYERS} are read) with {heads} heads")
    head_dim = section.integer("attention.key_length", hidden // heads)
    if section.integer("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{name}.attention.value_length of the GGUF file differs from key_length, {head_dim}")
    window = section.integer("attention.sliding_window", 0)
    return ModelConfig(
        architecture=_ARCHITECTURES[name],
        vocab_size=embedding[0],
        hidden_size=hidden,
        intermediate_size=section.integer("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=section.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=section.integer("context_length"),
        rms_norm_eps=section.number("attention.layer_norm_rms_epsilon"),
        rope=_rope(section, head_dim, 1e6 if gemma else 1e4),
        local_rope=MappingProxyType({"rope_type": "default", "rope_theta": 1e4}) if gemma else None,
        layer_windows=tuple(0 if gemma and (i + 1) % _GEMMA3_PATTERN == 0 else window for i in range(layers)),
        hidden_act="gelu_pytorch_tanh" if gemma else "silu",
        qkv_bias="blk.0.attn_q.bias" in tensor_shapes,
        o_bias="blk.0.attn_output.bias" in tensor_shapes,
        mlp_bias="blk.0.ffn_up.bias" in tensor_shapes,
        qk_norm="blk.0.attn_q_norm.weight" in tensor_shapes,
        # one Gemma 3, the 27B, scales queries by another width than head_dim; llama.cpp too knows it by its depth
        softmax_scale=(hidden / heads) ** -0.5 if gemma and layers == 62 else None,
        final_logit_softcap=section.number("final_logit_softcapping", 0.0),
        tie_word_embeddings="output.weight" not in tensor_shapes,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=gguf_eos_ids(metadata),
    )


def _rope(section: _Section, head_dim: int, default_theta: float) -> Mapping[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": section.number("rope.freq_base", default_theta)}
    rotary_dim = section.integer("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        rope["partial_rotary_factor"] = rotary_dim / head_dim
    kind = section.text("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"rope.scaling.type of the GGUF file is {kind!r:.80}; none, linear and yarn are known")
    if kind != "none":
        rope |= {"rope_type": kind, "factor": section.number("rope.scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = section.integer("rope.scaling.original_context_length")
    return MappingProxyType(rope)


def gguf_eos_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer: the file's eos and eot, and control tokens that end a turn in a known chat format."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    tokens, kinds = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(kinds, np.ndarray) and len(kinds) == len(tokens):
        control = {tokens[i]: int(i) for i in np.flatnonzero(kinds == _CONTROL)}
        ids += [control.get(text) for text in _TURN_ENDS]
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))
