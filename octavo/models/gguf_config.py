"""`ModelConfig` from GGUF metadata, which names everything by its architecture: `llama.block_count`, …"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from octavo.models.config import ModelConfig

_GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",  # Mistral too: its GGUF files carry no window
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
# Tokens that end an assistant's turn in one chat format or another: a file's single eos is often only the document's
# end.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")


def config_from_gguf(metadata: Mapping[str, Any], tensor_shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """Read `GGUFFile.metadata`; the tensors' shapes tell what the metadata leaves out (ties, biases)."""
    arch = metadata.get("general.architecture")
    if arch not in _GGUF_ARCHITECTURES:
        known = ", ".join(sorted(_GGUF_ARCHITECTURES))
        raise ValueError(f"general.architecture of the GGUF file is {arch!r}, which is not known; known: {known}")
    if metadata.get(f"{arch}.expert_count"):
        raise ValueError(
            f"the GGUF file holds a mixture of {metadata[f'{arch}.expert_count']} experts, which is not supported"
        )

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        if value is None:
            raise ValueError(f"the GGUF metadata lacks {arch}.{key}")
        if not isinstance(value, int | float | str):
            raise ValueError(f"{arch}.{key} of the GGUF metadata must be one value, got {type(value).__name__}")  # noqa: TRY004
        return value

    embedding = tensor_shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise ValueError(f"the GGUF file has no two-dimensional token_embd.weight (got shape {embedding})")
    layers, heads, hidden = get("block_count"), get("attention.head_count"), get("embedding_length")
    if not (
        isinstance(heads, int)
        and heads > 0
        and isinstance(hidden, int)
        and isinstance(layers, int)
        and 0 < layers < 1 << 16
    ):
        raise ValueError(
            f"the GGUF metadata has {layers!r} layers, {heads!r} heads and width {hidden!r}, expected positive integers"
        )
    window = get("attention.sliding_window", 0)
    rope = _gguf_rope(get, metadata, arch)
    gemma = arch == "gemma3"
    return ModelConfig(
        architecture=_GGUF_ARCHITECTURES[arch],
        vocab_size=embedding[0],
        hidden_size=hidden,
        intermediate_size=get("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length", hidden // heads),
        max_position_embeddings=get("context_length"),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope=rope,
        local_rope=MappingProxyType({"rope_type": "default", "rope_theta": 10000.0}) if gemma else None,
        layer_windows=tuple(0 if gemma and not (i + 1) % 6 else window for i in range(layers)),
        hidden_act="gelu_pytorch_tanh" if gemma else "silu",
        qkv_bias="blk.0.attn_q.bias" in tensor_shapes,
        o_bias="blk.0.attn_output.bias" in tensor_shapes,
        mlp_bias="blk.0.ffn_up.bias" in tensor_shapes,
        qk_norm="blk.0.attn_q_norm.weight" in tensor_shapes,
        # the one Gemma 3 whose query scale is not head_dim is the 27B: hidden_size / num_heads (llama.cpp knows it by
        # its depth)
        softmax_scale=(hidden / heads) ** -0.5 if gemma and layers == 62 else None,
        final_logit_softcap=float(get("final_logit_softcapping", 0.0)),
        tie_word_embeddings="output.weight" not in tensor_shapes,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=gguf_eos_ids(metadata),
    )


def _gguf_rope(get: Callable[..., Any], metadata: Mapping[str, Any], arch: str) -> Mapping[str, Any]:
    theta = float(get("rope.freq_base", 1e6 if arch == "gemma3" else 10000.0))
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return MappingProxyType({"rope_type": "default", "rope_theta": theta})
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{arch}.rope.scaling.type is {kind!r}; none, linear and yarn are known")
    rope = {"rope_type": kind, "rope_theta": theta, "factor": float(get("rope.scaling.factor"))}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
    return MappingProxyType(rope)


def gguf_eos_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    tokens, kinds = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(kinds, np.ndarray) and len(kinds) == len(tokens):
        control = {tokens[i]: int(i) for i in np.flatnonzero(kinds == 3)}
        ids += [control.get(text) for text in _TURN_ENDS]
    return tuple(dict.fromkeys(i for i in ids if i is not None))
