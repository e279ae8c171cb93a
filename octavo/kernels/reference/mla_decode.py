"""Absorbed latent attention the plain way: one shared head whose keys are the latents and whose values their first
part.
"""

from octavo.kernels.reference.paged_attention import paged_attention
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor


def refuses_mla_decode(
    q: Tensor, kv_cache: Tensor, head_dim_v: int, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> str | None:
    """The reference takes every call."""
    return None


def mla_decode(
    q: Tensor, kv_cache: Tensor, head_dim_v: int, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> tuple[Tensor, Tensor]:
    """q (T, Hq, R + rope), kv_cache (num_blocks, P, R + rope) → out (T, Hq, head_dim_v), LSE (Hq, T)."""
    keys = kv_cache[:, :, None, :]
    return paged_attention(q, keys, keys[..., :head_dim_v], spec, t, num_splits)
