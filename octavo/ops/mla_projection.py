"""The projections around absorbed latent attention: of queries, with the cache's write beside it, and of the output."""

from typing import cast

from octavo.kernels.reference import mla_projection as reference
from octavo.kernels.spec import Rotary, Tensor
from octavo.ops import inference
from octavo.ops.checks import check_shape
from octavo.ops.rotary_cache import check_rotary


def absorb_and_store(
    latent: Tensor,
    q: Tensor,
    up_k: Tensor,
    norm_weight: Tensor,
    rotary: Rotary,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Queries over the latent, q_absorbed (T, H, R + rope) = [q_nope · up_k, turned q_rope].

    q (T, H, nope + rope), up_k (H, nope, R). latent (T, R + rope): its first R channels, normalised by norm_weight
    (R,), and the rest, turned, go into the slots of kv_cache (num_blocks, block_size, R + rope), without gradient;
    slot_mapping (T,) int64 as in `store_latent_cache`. rotary: cos, sin (T, rope / 2) fp32.
    Source: DeepSeek-AI, "DeepSeek-V2", 2024, §2.1.
    """
    check_shape("latent", latent, ("T", "R + rope"))
    check_shape("norm_weight", norm_weight, ("R",))
    tokens, width = latent.shape
    rank = norm_weight.shape[0]
    check_shape("up_k", up_k, ("H", "nope", rank))
    check_shape("q", q, (tokens, up_k.shape[0], up_k.shape[1] + width - rank))
    check_shape("kv_cache", kv_cache, ("num_blocks", "block_size", width))
    check_shape("slot_mapping", slot_mapping, (tokens,))
    check_rotary(rotary, tokens, width - rank)
    arguments = (latent, q, up_k, norm_weight, eps, rotary, kv_cache, slot_mapping)
    result = inference.run("absorb_and_store", reference.absorb_and_store, arguments, q, up_k, norm_weight)
    return cast(Tensor, result)


def project_values(x: Tensor, up_v: Tensor) -> Tensor:
    """x (T, H, R), Σ p · latent of each head, times up_v (H, v, R) transposed; returns (T, H, v). Differentiable."""
    check_shape("x", x, ("T", "H", "R"))
    check_shape("up_v", up_v, (x.shape[1], "v", x.shape[2]))
    return cast(Tensor, inference.run("project_values", reference.project_values, (x, up_v), up_v))
