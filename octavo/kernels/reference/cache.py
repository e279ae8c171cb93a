"""Writes of new keys, values and latents into a paged cache, in place."""

import torch

from octavo.kernels.spec import Tensor


def refuses_store_kv_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> str | None:
    """The reference takes every call."""
    return None


def store_kv_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """k (T, Hkv, D) and v (T, Hkv, Dv) to slot `block · block_size + offset` (T,) int64; a negative slot is skipped."""
    _store(k, k_cache, slot_mapping)
    _store(v, v_cache, slot_mapping)


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
