"""Absorbed latent attention on the CPU: one shared key/value head, gathered a sequence at a time."""

from octavo.kernels.cpu import paged_gather
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor


def refuses_mla_decode(
    q: Tensor, kv_cache: Tensor, head_dim_v: int, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> str | None:
    """The gathered form takes every call."""
    return None


def mla_decode(
    q: Tensor, kv_cache: Tensor, head_dim_v: int, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> tuple[Tensor, Tensor]:
    """q (T, Hq, R + rope), kv_cache (num_blocks, P, R + rope) → `(out (T, Hq, head_dim_v), LSE (Hq, T))`."""
    keys = kv_cache.unsqueeze(2)
    return paged_gather.paged_attention(q, keys, keys[..., :head_dim_v], spec, t, num_splits)
