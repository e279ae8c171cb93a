"""Writes of new keys, values and latents into a paged cache on the CPU: one indexed copy per cache."""

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
    """Why the indexed copy cannot take this call, or None."""
    if k_scale is not None or v_scale is not None:
        return "it does not quantise"
    return _refuses(k_cache) or _refuses(v_cache)


def store_kv_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """k (T, Hkv, D) and v (T, Hkv, Dv) to slots (T,) int64; a negative slot is skipped."""
    kept = slot_mapping >= 0
    if not kept.all():
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    _slots(k_cache).index_copy_(0, slot_mapping, k.to(k_cache.dtype))
    _slots(v_cache).index_copy_(0, slot_mapping, v.to(v_cache.dtype))


def refuses_store_latent_cache(latent: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> str | None:
    """Why the indexed copy cannot take this call, or None."""
    return _refuses(kv_cache)


def store_latent_cache(latent: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """latent (T, R + rope) to slots (T,) int64; a negative slot is skipped."""
    kept = slot_mapping >= 0
    if not kept.all():
        latent, slot_mapping = latent[kept], slot_mapping[kept]
    _slots(kv_cache).index_copy_(0, slot_mapping, latent.to(kv_cache.dtype))


def _slots(cache: Tensor) -> Tensor:
    """(num_blocks · block_size, …), a view."""
    return cache.view(-1, *cache.shape[2:])


def _refuses(cache: Tensor) -> str | None:
    in_line = cache.stride(0) == cache.shape[1] * cache.stride(1)
    return None if in_line else "the blocks of the cache do not follow one another in memory"
