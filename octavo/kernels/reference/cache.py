"""Writes of new keys, values and latents into a paged cache, in place."""

import torch

from octavo.kernels.spec import Tensor


def refuses_store_kv_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> str | None:
    """The reference takes every call."""
    return None


def store_kv_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """k (T, Hkv, D) and v (T, Hkv, Dv) to slot `block · block_size + offset` (T,) int64; a negative slot is skipped.

    With scales (Hkv,) the caches are fp8 or int8 and hold `quantise(k, k_scale)`.
    """
    _store(k if k_scale is None else quantise(k, k_scale, k_cache.dtype), k_cache, slot_mapping)
    _store(v if v_scale is None else quantise(v, v_scale, v_cache.dtype), v_cache, slot_mapping)


def quantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x (…, H, D) / scale (H,) in float8_e4m3fn or int8, to the nearest; what lies outside goes to the range's end."""
    x = x.float() / scale[:, None]
    if dtype == torch.int8:
        return torch.floor(x + 0.5).clamp(-127, 127).to(dtype)
    return x.clamp(-448, 448).to(dtype)


def dequantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantise` was given, up to rounding, in `dtype`."""
    return (x.float() * scale[:, None]).to(dtype)


def refuses_store_latent_cache(latent: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> str | None:
    """The reference takes every call."""
    return None


def store_latent_cache(latent: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """latent (T, R + rope) into kv_cache (num_blocks, block_size, R + rope)."""
    _store(latent, kv_cache, slot_mapping)


def _store(x: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    stored = slot_mapping >= 0
    slots = slot_mapping[stored]
    block = torch.div(slots, cache.shape[1], rounding_mode="floor")
    cache[block, slots % cache.shape[1]] = x[stored].to(cache.dtype)
