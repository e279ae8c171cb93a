"""Multi-head latent attention over a paged latent cache: the absorbed form, which reads only the latents.

With the up-projections of keys and values absorbed into the query and the output, all heads share one key per token, the
latent beside its rotary part, and its first R numbers are the value (DeepSeek-AI, "DeepSeek-V2", 2024, §2.1).
"""

from octavo.kernels.spec import Tensor
from octavo.ops import custom_ops
from octavo.ops.checks import check_like, check_shape, make_spec
from octavo.ops.metadata import AttentionMetadata
from octavo.ops.paged import paged_tensors


def mla_attention(
    q: Tensor,
    kv_cache: Tensor,
    head_dim_v: int,
    metadata: AttentionMetadata,
    softmax_scale: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """Causal absorbed attention, decode steps and prefill chunks mixed.

    q (T, Hq, R + rope) packed by `metadata.cu_seqlens_q`, kv_cache (num_blocks, block_size, R + rope) already holding the
    new tokens, `head_dim_v` = R. `softmax_scale` has no default: it is 1/√(nope + rope) of the unabsorbed heads, not of
    this q's width. Returns (T, Hq, head_dim_v).
    """
    check_shape("q", q, ("T", "Hq", "R + rope"))
    check_shape("kv_cache", kv_cache, ("num_blocks", "block_size", q.shape[2]))
    check_like("kv_cache", kv_cache, q)
    if not 0 < head_dim_v <= q.shape[2]:
        raise ValueError(f"head_dim_v: expected 1 to {q.shape[2]} (the latent's width), got {head_dim_v}")
    spec = make_spec(q.shape[2], softmax_scale, True, (-1, -1), 0.0)
    return custom_ops.mla_decode(q, kv_cache, head_dim_v, spec, paged_tensors(q, metadata), backend=backend)[0]
