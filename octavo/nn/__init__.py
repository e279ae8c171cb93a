"""Modules to write models with: attention, residual wirings, rotary embedding, norms, MLPs.

Importing this package brings torch, but neither the engine nor Triton.
"""

from octavo.nn.attention import MultiHeadAttention
from octavo.nn.block import TransformerBlock
from octavo.nn.cache import LayerCache, LayerKVCache, LayerLatentCache, PagedRows, make_caches
from octavo.nn.linear import Linear
from octavo.nn.mla import MultiHeadLatentAttention
from octavo.nn.mlp import MLP, GatedMLP
from octavo.nn.moe import ExpertLinear, Experts, MixtureOfExperts, Router
from octavo.nn.norm import LayerNorm, RMSNorm
from octavo.nn.residual import BranchNorm, PostNorm, PreNorm, Residual, ScaledResidual, wire
from octavo.nn.rotary import RotaryEmbedding, Rotation, apply_rotary

__all__ = [
    "MLP",
    "BranchNorm",
    "ExpertLinear",
    "Experts",
    "GatedMLP",
    "LayerCache",
    "LayerKVCache",
    "LayerLatentCache",
    "LayerNorm",
    "Linear",
    "MixtureOfExperts",
    "MultiHeadAttention",
    "MultiHeadLatentAttention",
    "PagedRows",
    "PostNorm",
    "PreNorm",
    "RMSNorm",
    "Residual",
    "RotaryEmbedding",
    "Rotation",
    "Router",
    "ScaledResidual",
    "TransformerBlock",
    "apply_rotary",
    "make_caches",
    "wire",
]
