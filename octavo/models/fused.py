"""Whether a model's layers can run as one `DecoderStack`: the plain decoder with quantised weights on the CPU."""

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from octavo.nn import GatedMLP, Linear, MultiHeadAttention, RMSNorm
from octavo.ops.decoder import DecoderStack, LayerWeights
from octavo.ops.linear import QuantizedWeight

if TYPE_CHECKING:
    from octavo.models.causal_lm import CausalLM, DecoderLayer


def fuse(model: "CausalLM") -> DecoderStack | None:
    """The model's layers and last norm as one stack; None when something in them does not fit."""
    from octavo.models.causal_lm import DecoderLayer

    layers = [layer for layer in model.layers if type(layer) is DecoderLayer and _fits(layer)]
    if not layers or len(layers) != len(model.layers):
        return None
    if model.local_rope is not model.rope or model.norm.unit_offset or model.dtype != torch.float32:
        return None
    weights = [_weights(layer) for layer in layers]
    kinds = {(w.down.bits, w.down.zero_point, w.down.mins is None, w.down.scales.dtype) for w in weights}
    if len(kinds) != 1 or any(w.refuses() for w in weights):
        return None
    attn = layers[0].attn
    assert isinstance(attn, MultiHeadAttention)
    return DecoderStack(
        num_heads=attn.num_heads,
        num_kv_heads=attn.num_kv_heads,
        head_dim=attn.head_dim,
        rms_norm_eps=model.norm.eps,
        softmax_scale=attn.softmax_scale,
        layers=weights,
        final_norm=model.norm.weight,
    )


def _fits(layer: "DecoderLayer") -> bool:
    attn, mlp = layer.attn, layer.mlp
    if not isinstance(attn, MultiHeadAttention) or not isinstance(mlp, GatedMLP):
        return False
    norms = (layer.attn_norm, layer.mlp_norm, attn.q_norm, attn.k_norm)
    rope, linears = attn.rope, (attn.qkv_proj, attn.o_proj, mlp.gate_up_proj, mlp.down_proj)
    return (
        all(isinstance(linear.weight, QuantizedWeight) for linear in linears)
        and rope is not None
        and not rope.interleaved
        and rope.rotary_dim % 32 == 0
        and attn.head_dim % 32 == 0
        and attn.head_dim <= 256
        and attn.causal
        and not attn.softcap
        and attn.sinks is None
        and attn.backend is None
        and mlp.activation is F.silu
        and all(isinstance(norm, RMSNorm) and not norm.unit_offset for norm in norms if norm is not None)
    )


def _weights(layer: "DecoderLayer") -> LayerWeights:
    attn, mlp = layer.attn, layer.mlp
    assert isinstance(attn, MultiHeadAttention)
    assert isinstance(mlp, GatedMLP)
    return LayerWeights(
        attn_norm=layer.attn_norm.weight,
        mlp_norm=layer.mlp_norm.weight,
        q_norm=attn.q_norm.weight if isinstance(attn.q_norm, RMSNorm) else None,
        k_norm=attn.k_norm.weight if isinstance(attn.k_norm, RMSNorm) else None,
        qkv=_quantized(attn.qkv_proj),
        qkv_bias=attn.qkv_proj.bias,
        o=_quantized(attn.o_proj),
        o_bias=attn.o_proj.bias,
        gate_up=_quantized(mlp.gate_up_proj),
        gate_up_bias=mlp.gate_up_proj.bias,
        down=_quantized(mlp.down_proj),
        down_bias=mlp.down_proj.bias,
        window_left=attn.window_size[0],
    )


def _quantized(linear: Linear) -> QuantizedWeight:
    assert isinstance(linear.weight, QuantizedWeight)
    return linear.weight
