"""Rotary position embedding (RoPE), in both styles and with the scalings that checkpoints ask for.

Positions turn pairs of channels by position · inv_freq, so that q·k depends only on the distance. The scalings stretch
the frequencies for contexts longer than the training's: linear (Chen et al. 2023), dynamic NTK, Llama 3's, YaRN (Peng
et al. 2023). Frequencies equal those of `transformers`' ROPE_INIT_FUNCTIONS.

Frequencies are never a buffer: `module.bfloat16()` would round them and `to_empty` would lose them. They are computed
from plain numbers, once per device. A model calls `rope(positions)` once per step and hands the result to its layers.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo.ops.metadata import AttentionMetadata
from octavo.ops.rotary import rotate


class Rotation(NamedTuple):
    """Cosine and sine of every angle, (…, rotary_dim / 2) fp32, times YaRN's attention factor."""

    cos: Tensor
    sin: Tensor


class RotaryEmbedding(nn.Module):
    """Turns the first `rotary_dim` channels of each head.

    base: RoPE's theta. scaling: the `rope_scaling` / `rope_parameters` of a Hugging Face config (rope_type default,
    linear, dynamic, llama3 or yarn, and its numbers). max_position_embeddings: the context the model was trained for;
    dynamic needs it. interleaved: pairs are (0, 1), (2, 3), … (GPT-J, DeepSeek) instead of (0, D/2), (1, D/2 + 1), …
    (GPT-NeoX, Llama).
    """

    def __init__(
        self,
        rotary_dim: int,
        base: float = 10000.0,
        *,
        scaling: Mapping[str, Any] | None = None,
        max_position_embeddings: int | None = None,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        if rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even and positive, got {rotary_dim}")
        self.rotary_dim = rotary_dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scaling = dict(scaling or {})
        self.rope_type = str(self.scaling.get("rope_type") or self.scaling.get("type") or "default")
        if self.rope_type not in _SCALINGS:
            raise ValueError(f"rope_type must be one of {', '.join(_SCALINGS)}, got {self.rope_type!r}")
        if max_position_embeddings is not None:
            self.scaling.setdefault("max_position_embeddings", max_position_embeddings)
        # computed here too, so that a missing number is an error of the constructor
        self.attention_factor = _SCALINGS[self.rope_type](rotary_dim, self.base, self.scaling)[1]
        self._inv_freq: dict[torch.device, Tensor] = {}

    @classmethod
    def from_hf_config(
        cls,
        config: Mapping[str, Any],
        *,
        layer_type: str | None = None,
        head_dim: int | None = None,
        interleaved: bool = False,
    ) -> "RotaryEmbedding":
        """From a config.json, with `rope_parameters` (by layer type, if so nested) or rope_theta and `rope_scaling`.

        head_dim: the channels that may turn (MLA's qk_rope_head_dim); default the config's.
        """
        scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        if layer_type is not None and layer_type in scaling:
            scaling = dict(scaling[layer_type])
        if config.get("original_max_position_embeddings"):
            scaling["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        if head_dim is None:
            head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        part = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        return cls(
            int(head_dim * part),
            scaling.get("rope_theta") or config.get("rope_theta") or 10000.0,
            scaling=scaling,
            max_position_embeddings=config.get("max_position_embeddings"),
            interleaved=interleaved,
        )

    @property
    def softmax_scale_factor(self) -> float:
        """DeepSeek's YaRN correction of the softmax scale, mscale²; 1 without `mscale_all_dim`."""
        mscale_all_dim = self.scaling.get("mscale_all_dim") or 0.0
        if self.rope_type != "yarn" or not mscale_all_dim:
            return 1.0
        return _yarn_mscale(_yarn_factor(self.scaling), mscale_all_dim) ** 2

    def inv_freq(self, device: torch.device | str = "cpu", seq_len: int | Tensor | None = None) -> Tensor:
        """Angles per position, (rotary_dim / 2,) fp32.

        seq_len matters to dynamic NTK alone (default max_position_embeddings); a tensor of shape (…, 1) gives one set
        of frequencies per entry.
        """
        if self.rope_type == "dynamic" and seq_len is not None:
            lengths = torch.as_tensor(seq_len, device=device).to(torch.float32)
            return _dynamic_inv_freq(self.rotary_dim, self.base, self.scaling, lengths)
        device = torch.device(device)
        if device not in self._inv_freq:
            self._inv_freq[device] = _SCALINGS[self.rope_type](self.rotary_dim, self.base, self.scaling)[0].to(device)
        return self._inv_freq[device]

    def forward(self, positions: Tensor, metadata: AttentionMetadata | None = None) -> Rotation:
        """The rotation of positions (…,) int64. Dynamic NTK looks at the length of each sequence, which is its last
        position, or its row of `metadata` when the batch is packed."""
        seq_len = self._seq_len(positions, metadata) if self.rope_type == "dynamic" else None
        angles = positions.unsqueeze(-1).to(torch.float32) * self.inv_freq(positions.device, seq_len)
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return Rotation(cos, sin)

    def _seq_len(self, positions: Tensor, metadata: AttentionMetadata | None) -> Tensor:
        if metadata is None:
            return positions.amax(-1, keepdim=True).unsqueeze(-1) + 1
        counts = metadata.cu_seqlens_q.diff()
        return metadata.cache_seqlens.repeat_interleave(counts, output_size=positions.shape[0]).unsqueeze(-1)

    def rotate(self, x: Tensor, rotation: Rotation) -> Tensor:
        """x (…, H, D) turned by `rotation` (…, rotary_dim / 2), which broadcasts over the heads."""
        return apply_rotary(x, rotation, interleaved=self.interleaved)

    def extra_repr(self) -> str:
        return f"{self.rotary_dim}, base={self.base:g}, rope_type={self.rope_type}, interleaved={self.interleaved}"


def apply_rotary(x: Tensor, rotation: Rotation, *, interleaved: bool = False) -> Tensor:
    """x (…, H, D) with its first 2 · rotation.cos.shape[-1] channels turned, in at least fp32, rounded once."""
    return rotate(x, rotation.cos, rotation.sin, interleaved)


def _number(scaling: Mapping[str, Any], name: str) -> float:
    try:
        return float(scaling[name])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"rope scaling: {name} must be a number, got {scaling.get(name)!r} in {scaling}") from error


def _exponents(rotary_dim: int, device: torch.device | str = "cpu") -> Tensor:
    # in fp32 like every training run; the device is explicit so that a `with torch.device("meta")` does not reach it
    return torch.arange(0, rotary_dim, 2, dtype=torch.int64, device=device).to(torch.float32) / rotary_dim


def _default(rotary_dim: int, base: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    return 1.0 / base ** _exponents(rotary_dim), 1.0


def _linear(rotary_dim: int, base: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    return _default(rotary_dim, base, scaling)[0] / _number(scaling, "factor"), 1.0


def _dynamic(rotary_dim: int, base: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    trained = torch.tensor(_number(scaling, "max_position_embeddings"), device="cpu")
    return _dynamic_inv_freq(rotary_dim, base, scaling, trained), 1.0


def _dynamic_inv_freq(rotary_dim: int, base: float, scaling: Mapping[str, Any], seq_len: Tensor) -> Tensor:
    factor, trained = _number(scaling, "factor"), _number(scaling, "max_position_embeddings")
    stretch = factor * seq_len.clamp(min=trained) / trained - (factor - 1)
    return 1.0 / (base * stretch ** (rotary_dim / (rotary_dim - 2))) ** _exponents(rotary_dim, seq_len.device)


def _llama3(rotary_dim: int, base: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    inv_freq, _ = _default(rotary_dim, base, scaling)
    factor, low, high = (_number(scaling, name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = _original_length(scaling) * inv_freq / (2 * math.pi)  # full turns within the trained context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: below low, stretched; 1: above high, as trained
    return inv_freq * (keep + (1 - keep) / factor), 1.0


def _yarn(rotary_dim: int, base: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    factor, trained = _yarn_factor(scaling), _original_length(scaling)

    def channel(turns: float) -> float:  # the channel that makes so many turns within the trained context
        return rotary_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = channel(scaling.get("beta_fast") or 32), channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(rotary_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    inv_freq, _ = _default(rotary_dim, base, scaling)
    return inv_freq * (stretched / factor + (1 - stretched)), _yarn_attention_factor(scaling, factor)


def _yarn_factor(scaling: Mapping[str, Any]) -> float:
    if scaling.get("factor") is not None:
        return _number(scaling, "factor")
    return _number(scaling, "max_position_embeddings") / _original_length(scaling)


def _yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return _number(scaling, "attention_factor")
    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
    return _yarn_mscale(factor)


def _original_length(scaling: Mapping[str, Any]) -> float:
    name = "original_max_position_embeddings"
    return _number(scaling, name if scaling.get(name) is not None else "max_position_embeddings")


_SCALINGS: dict[str, Callable[[int, float, Mapping[str, Any]], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
