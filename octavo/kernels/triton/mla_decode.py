"""Absorbed latent attention (MLA): all heads share one key, the latent; its first part is the value: read once."""

from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor
from octavo.kernels.triton.flash_fwd import launch_forward, refuses_flash_fwd
from octavo.kernels.triton.tiles import split_head_dim


def refuses_mla_decode(
    q: Tensor, kv_cache: Tensor, head_dim_v: int, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> str | None:
    """Why this backend cannot take the call, or None."""
    return refuses_flash_fwd(q, kv_cache, kv_cache[..., :head_dim_v], spec, t)


def mla_decode(
    q: Tensor, kv_cache: Tensor, head_dim_v: int, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> tuple[Tensor, Tensor]:
    """q (T, Hq, R + rope) or (B, Sq, …), kv_cache (num_blocks, block_size, R + rope) → out (…, Hq, head_dim_v), LSE."""
    assert t.block_table is not None
    assert t.seqused_k is not None
    keys = kv_cache[:, :, None, :]
    # one load serves both when the value's width is a power of two, and so is the rest's
    main, tail = head_dim_v, q.shape[-1] - head_dim_v
    shared = main >= 16 and main & (main - 1) == 0 and (tail == 0 or split_head_dim(q.shape[-1]) == (main, tail))
    return launch_forward(q, keys, keys[..., :head_dim_v], spec, t, num_splits, v_is_k=shared)
