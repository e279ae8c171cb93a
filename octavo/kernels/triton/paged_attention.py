"""Attention over a paged cache, one query a sequence or whole prompts: the forward kernel, heads packed, keys split."""

from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor
from octavo.kernels.triton.flash_fwd import launch_forward, refuses_flash_fwd


def refuses_paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> str | None:
    """Why this backend cannot take the call, or None."""
    if t.k_scale is not None:
        return "it takes no quantised cache"
    return refuses_flash_fwd(q, k_cache, v_cache, spec, t)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> tuple[Tensor, Tensor]:
    """q (T, Hq, D) packed by `cu_seqlens_q` or (B, Sq, Hq, D) over caches (num_blocks, block_size, Hkv, D or Dv).

    `num_splits` cuts each sequence's keys into that many parts; 0 divides all keys of the batch evenly over the GPU.
    """
    assert t.block_table is not None
    assert t.seqused_k is not None
    return launch_forward(q, k_cache, v_cache, spec, t, num_splits)
