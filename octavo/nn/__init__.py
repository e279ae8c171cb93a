"""Modules to write models with: attention, residual wirings, rotary embedding, norms, MLPs.

Importing this package brings torch, but neither the engine nor Triton.
"""

from octavo.nn.attention import MultiHeadAttention
from octavo.nn.cache import LayerCache, LayerKVCache, LayerLatentCache, PagedRows, make_caches
from octavo.nn.linear import Linear
from octavo.nn.mlp import MLP, GatedMLP
from octavo.nn.norm import LayerNorm, RMSNorm
from octavo.nn.rotary import RotaryEmbedding, Rotation, apply_rotary

__all__ = [
    "MLP",
    "GatedMLP",
    "LayerCache",
    "LayerKVCache",
    "LayerLatentCache",
    "LayerNorm",
    "Linear",
    "MultiHeadAttention",
    "PagedRows",
    "RMSNorm",
    "RotaryEmbedding",
    "Rotation",
    "apply_rotary",
    "make_caches",
]
