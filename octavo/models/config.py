"""What a decoder is made of, in one frozen type, and what Hugging Face's `config.json` files of all families share.

The families differ in a few switches only (biases, q/k norm, windows, scales), so one dataclass holds them all; each
family's own reading of its `config.json` stands beside its model, that of GGUF metadata in gguf_config.py. Nothing here
imports torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

MAX_LAYERS = 4096
_SIZES = {  # the most that is believed: a lie in a config must not cost memory before the weights contradict it
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_layers": MAX_LAYERS,
    "num_heads": 1 << 16,
    "num_kv_heads": 1 << 16,
    "head_dim": 1 << 16,
    "max_position_embeddings": 1 << 31,
}


class _DType(Protocol):
    @property
    def itemsize(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention: what `MultiHeadLatentAttention` is built with."""

    q_rank: int | None  # None: queries are not compressed
    kv_rank: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in self.__slots__}
        _check_sizes({**given, "q_rank": 1 if self.q_rank is None else self.q_rank}, 1 << 20)

    @property
    def cached_per_token(self) -> int:
        """Numbers that one token takes in one layer's cache."""
        return self.kv_rank + self.rope_head_dim

    def num_parameters(self, dim: int, heads: int, bias: bool) -> int:
        q_rows = heads * (self.nope_head_dim + self.rope_head_dim)
        q = dim * q_rows if self.q_rank is None else self.q_rank * (dim + 1 + q_rows + bias)
        kv = (dim + bias) * self.cached_per_token + self.kv_rank
        up = self.kv_rank * heads * (self.nope_head_dim + self.v_head_dim)
        return q + kv + up + heads * self.v_head_dim * dim + bias * dim


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Mixture of experts: which layers, how large, and how `Router` picks."""

    layers: tuple[bool, ...]  # of each layer: experts, or a dense MLP
    num_experts: int
    top_k: int
    expert_dim: int  # width of one expert
    shared_dim: int = 0  # width of the MLP that sees every token; 0 is none
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    correction_bias: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        sizes = ("num_experts", "top_k", "expert_dim", "num_groups", "topk_groups")
        _check_sizes({**{name: getattr(self, name) for name in sizes}, "shared_dim": self.shared_dim + 1}, 1 << 20)
        _check_sizes({"num_experts": self.num_experts}, 1 << 14)
        factor = self.routed_scaling_factor
        if not isinstance(factor, int | float) or not 0 < factor < float("inf"):
            raise ValueError(f"routed_scaling_factor of the model config must be a positive number, got {factor!r:.80}")

    def num_parameters(self, dim: int) -> int:
        """Of one layer with experts."""
        router = self.num_experts * (dim + self.correction_bias)
        return router + 3 * dim * (self.num_experts * self.expert_dim + self.shared_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder-only model. Complete at construction; sizes in elements, windows in tokens."""

    architecture: str  # the registry's key: "LlamaForCausalLM", …
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Mapping[str, Any]  # Hugging Face's rope parameters: rope_type, rope_theta, factor, …
    local_rope: Mapping[str, Any] | None = None  # of the sliding-window layers, where it differs (Gemma 3)
    rope_interleaved: bool = False  # pairs of neighbours turn, not of halves
    rope_freq_factors: tuple[float, ...] | None = None  # divide the frequencies one by one (GGUF's rope_freqs.weight)
    layer_windows: tuple[int, ...]  # per layer: a token sees itself and window − 1 before it; 0 is no window
    hidden_act: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    softmax_scale: float | None = None  # None is 1/√head_dim
    mla: MLAConfig | None = None
    moe: MoEConfig | None = None
    final_logit_softcap: float = 0.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype_name: str = "float32"  # of the checkpoint

    def __post_init__(self) -> None:
        for name, most in _SIZES.items():
            _check_sizes({name: getattr(self, name)}, most)
        numbers = {"rms_norm_eps": self.rms_norm_eps, "rope_theta": self.rope.get("rope_theta")}
        for name, value in {**numbers, "softmax_scale": self.softmax_scale or 1.0}.items():
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} of the model config must be a positive number, got {value!r:.80}")
        part = self.rope.get("partial_rotary_factor", 1.0)
        if not isinstance(part, int | float) or not 0 < part <= 1:
            raise ValueError(f"partial_rotary_factor of the model config must be in (0, 1], got {part!r:.80}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if len(self.layer_windows) != self.num_layers:
            raise ValueError(f"{self.num_layers} layers, but {len(self.layer_windows)} layer types in the model config")
        for window in self.layer_windows:
            if not isinstance(window, int) or window < 0:
                raise ValueError(f"sliding_window of the model config must be a positive integer, got {window!r:.80}")

    def kv_bytes_per_token(self, dtype: _DType) -> int:
        """Bytes that one token takes in the cache, all layers, in `dtype` (anything with `itemsize`).

        Keys and values, or of MLA the latent and its rotary key.
        """
        if self.mla is not None:
            return self.num_layers * self.mla.cached_per_token * dtype.itemsize
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize

    def mha_kv_bytes_per_token(self, dtype: _DType) -> int:
        """The same if every query head had a key and a value of its own in the cache."""
        value_dim = self.head_dim if self.mla is None else self.mla.v_head_dim
        return self.num_layers * self.num_heads * (self.head_dim + value_dim) * dtype.itemsize

    @property
    def num_parameters(self) -> int:
        """Parameters, tied embeddings counted once, biases and norms included."""
        d, q, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = d * (q + 2 * kv) + q * d + self.qkv_bias * (q + 2 * kv) + self.o_bias * d
        if self.mla is not None:
            attention = self.mla.num_parameters(d, self.num_heads, self.o_bias)
        mlp = 3 * d * self.intermediate_size + self.mlp_bias * (2 * self.intermediate_size + d)
        norms = (4 if self.architecture == "Gemma3ForCausalLM" else 2) * d + self.qk_norm * 2 * self.head_dim
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        sparse = 0 if self.moe is None else sum(self.moe.layers)
        mlps = (self.num_layers - sparse) * mlp + (0 if self.moe is None else sparse * self.moe.num_parameters(d))
        return self.num_layers * (attention + norms) + mlps + embeddings + d


def _check_sizes(sizes: Mapping[str, Any], most: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ValueError(f"{name} of the model config must be an integer from 1 to {most}, got {value!r:.80}")


def read_json(path: Path) -> Mapping[str, Any]:
    """The JSON object in `path`. Raises `ValueError` when it is missing or is none."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: expected a directory with Hugging Face's files, or a .gguf file")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")  # noqa: TRY004
    return content


def hf_rope(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 writes `rope_parameters`, older ones `rope_theta` and `rope_scaling`; both give the first form."""
    given = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"rope_parameters of the model config must be an object, got {given!r:.80}")  # noqa: TRY004
    rope = dict(given)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", hf.get("rope_theta", 10000.0))
    if "partial_rotary_factor" in hf:
        rope.setdefault("partial_rotary_factor", hf["partial_rotary_factor"])
    if rope["rope_type"] in ("llama3", "yarn", "dynamic"):
        original = hf.get("original_max_position_embeddings", hf["max_position_embeddings"])
        rope.setdefault("original_max_position_embeddings", original)
    return MappingProxyType(rope)


def eos_ids(value: Any) -> tuple[int, ...]:
    """Token ids from an `eos_token_id`, which may be missing, one number or a list."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def end_ids(generation: Mapping[str, Any], of_config: tuple[int, ...]) -> tuple[int, ...]:
    """The ids that end a text: generation_config.json's, then those of config.json."""
    return tuple(dict.fromkeys([*eos_ids(generation.get("eos_token_id")), *of_config]))


def hf_common(hf: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The `ModelConfig` fields that every family names alike in its config.json."""
    heads = hf["num_attention_heads"]
    if hf["num_hidden_layers"] > MAX_LAYERS:
        raise ValueError(f"num_hidden_layers is {hf['num_hidden_layers']}, at most {MAX_LAYERS} are read")
    return {
        "architecture": architecture,
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "max_position_embeddings": hf["max_position_embeddings"],
        "rms_norm_eps": hf.get("rms_norm_eps", 1e-6),
        "hidden_act": hf.get("hidden_act", "silu"),
        "tie_word_embeddings": hf.get("tie_word_embeddings", False),
        "bos_token_id": hf.get("bos_token_id"),
        "eos_token_ids": eos_ids(hf.get("eos_token_id")),
        "dtype_name": hf.get("dtype") or hf.get("torch_dtype") or "float32",
        "layer_windows": (0,) * hf["num_hidden_layers"],
    }


def hf_layer_windows(hf: Mapping[str, Any], default_types: list[str]) -> tuple[int, ...]:
    """Each layer's window from `layer_types` (or the family's default ones) and `sliding_window`."""
    window = hf.get("sliding_window") or 0
    types = hf.get("layer_types") or default_types
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown:
        raise ValueError(
            f"layer_types of the model config holds {unknown}; sliding_attention and full_attention are known"
        )
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)
