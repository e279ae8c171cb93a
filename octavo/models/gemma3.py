"""Gemma 3 (text): five sliding-window layers to one global, norms before and after each half, scaled embeddings.

    x ← x + norm(attn(norm(x)));   x ← x + norm(mlp(norm(x)))

Its norms multiply by 1 + w, its local layers have their own rotary base, its logits come from the embedding table.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from octavo.models.causal_lm import CausalLM, DecoderLayer
from octavo.models.config import ModelConfig, hf_common, hf_layer_windows, hf_rope
from octavo.nn import LayerCache, RMSNorm, Rotation
from octavo.ops.metadata import AttentionMetadata


class SandwichLayer(DecoderLayer):
    """A residual layer with a norm on either side of attention and MLP."""

    def __init__(self, layer: DecoderLayer, attn_out_norm: RMSNorm, mlp_out_norm: RMSNorm) -> None:
        super().__init__(layer.attn, layer.mlp, layer.attn_norm, layer.mlp_norm)
        self.attn_out_norm, self.mlp_out_norm = attn_out_norm, mlp_out_norm

    def forward(
        self, x: Tensor, rotation: Rotation, kv_cache: LayerCache | None, metadata: AttentionMetadata | None
    ) -> Tensor:
        x = x + self.attn_out_norm(self.attn(self.attn_norm(x), None, kv_cache, metadata, rotation=rotation))
        out: Tensor = x + self.mlp_out_norm(self.mlp(self.mlp_norm(x)))
        return out


class Gemma3ForCausalLM(CausalLM):
    """Gemma 3's text decoder; a checkpoint's vision tower is left out."""

    def make_norm(self, dim: int) -> RMSNorm:
        return RMSNorm(dim, self.config.rms_norm_eps, unit_offset=True, device=self._device, dtype=self._dtype)

    def make_layer(self, index: int) -> DecoderLayer:
        d = self.config.hidden_size
        return SandwichLayer(super().make_layer(index), self.make_norm(d), self.make_norm(d))

    def embed(self, token_ids: Tensor) -> Tensor:
        # the scale is rounded to the activations' dtype first, as in training
        x = super().embed(token_ids)
        return x * float(torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype))

    @classmethod
    def read_hf_config(cls, hf: Mapping[str, Any]) -> ModelConfig:
        for refused in ("use_bidirectional_attention", "attn_logit_softcapping"):
            if hf.get(refused):
                raise ValueError(f"{refused}={hf[refused]!r} of the model config is not supported for Gemma 3 text")
        hf = {"head_dim": 256, "max_position_embeddings": 131072, "rope_theta": 1e6, "sliding_window": 4096, **hf}
        common = hf_common(hf, cls.__name__)
        pattern = hf.get("sliding_window_pattern", 6)
        kinds = [
            "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(common["num_layers"])
        ]
        common |= {
            "layer_windows": hf_layer_windows(hf, kinds),
            "hidden_act": hf.get("hidden_activation", "gelu_pytorch_tanh"),
            "tie_word_embeddings": hf.get("tie_word_embeddings", True),
        }
        rope, local_rope = _ropes(hf)
        bias = hf.get("attention_bias", False)
        return ModelConfig(
            **common,
            rope=rope,
            local_rope=local_rope,
            qk_norm=True,
            qkv_bias=bias,
            o_bias=bias,
            softmax_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
            final_logit_softcap=hf.get("final_logit_softcapping") or 0.0,
        )


def _ropes(hf: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Rotary parameters of the global and the local layers; the local ones were never scaled in the older form."""
    nested = hf.get("rope_parameters") or {}
    if "full_attention" in nested:
        full, sliding = ({**hf, "rope_parameters": nested[kind]} for kind in ("full_attention", "sliding_attention"))
        return hf_rope(full), hf_rope(sliding)
    local = {"rope_type": "default", "rope_theta": hf.get("rope_local_base_freq", 10000.0)}
    return hf_rope(hf), MappingProxyType(local)
