"""MLA's absorbed projections in plain torch: W_UK into the queries beside the cache write, W_UV onto the output."""

import torch

from octavo.kernels.reference.cache import store_latent_cache
from octavo.kernels.reference.norm import rms_norm
from octavo.kernels.reference.rotary_cache import rotate
from octavo.kernels.spec import Rotary, Tensor


def refuses_absorb_and_store(
    latent: Tensor, q: Tensor, up_k: Tensor, norm_weight: Tensor, eps: float, rotary: Rotary, kv_cache: Tensor,
    slot_mapping: Tensor,
) -> str | None:  # fmt: skip
    """The reference takes every call."""
    return None


def absorb_and_store(
    latent: Tensor, q: Tensor, up_k: Tensor, norm_weight: Tensor, eps: float, rotary: Rotary, kv_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:  # fmt: skip
    """latent (T, R + rope), q (T, H, nope + rope), up_k (H, nope, R) → absorbed queries (T, H, R + rope); the latent,
    normalised, and its rotary key, turned, are in the cache."""
    rank, nope = norm_weight.shape[0], up_k.shape[1]
    key = rotate(latent[:, None, rank:], *rotary)[:, 0]
    row = torch.cat((rms_norm(latent[:, :rank], norm_weight, eps, False), key), -1)
    store_latent_cache(row.detach(), kv_cache, slot_mapping)
    absorbed = torch.bmm(q[..., :nope].transpose(0, 1), up_k).transpose(0, 1)
    return torch.cat((absorbed, rotate(q[..., nope:], *rotary)), -1)


def refuses_project_values(x: Tensor, up_v: Tensor) -> str | None:
    """The reference takes every call."""
    return None


def project_values(x: Tensor, up_v: Tensor) -> Tensor:
    """x (T, H, R), up_v (H, v, R) → (T, H, v)."""
    return torch.bmm(x.transpose(0, 1), up_v.transpose(1, 2)).transpose(0, 1)
