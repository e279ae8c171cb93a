"""Paged attention on the CPU by gathering one sequence at a time and attending to it with the dense CPU forward.

Serves what the in-place kernel (`paged_attention.py`) does not take. Only one sequence's keys are ever copied, and no
loop runs over tokens.
"""

import itertools

import torch

from octavo.kernels.cpu.flash_fwd import flash_fwd, refuses_flash_fwd
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor


def refuses_paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> str | None:
    """Why the gathered form cannot take this call, or None."""
    if t.k_scale is not None:
        return "it takes no quantised cache"
    return refuses_flash_fwd(q, k_cache, v_cache, spec, t)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> tuple[Tensor, Tensor]:
    """q (T, Hq, D) packed by `cu_seqlens_q` → `(out (T, Hq, Dv), softmax_lse (Hq, T))`."""
    assert t.cu_seqlens_q is not None
    assert t.seqused_k is not None
    assert t.block_table is not None
    out = q.new_zeros(*q.shape[:2], v_cache.shape[-1])
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=lse_dtype)
    block_size = k_cache.shape[1]
    ends = t.cu_seqlens_q.tolist()
    used_q = [end - start for start, end in itertools.pairwise(ends)]
    used_q = used_q if t.seqused_q is None else t.seqused_q.tolist()
    leftpads = [0] * len(used_q) if t.leftpad_k is None else t.leftpad_k.tolist()
    for b, (start, rows, keys, leftpad) in enumerate(zip(ends, used_q, t.seqused_k.tolist(), leftpads, strict=False)):
        if rows == 0:
            continue
        blocks = t.block_table[b, : -(-keys // block_size)].to(torch.int64)
        k, v = (cache[blocks].flatten(0, 1)[leftpad:keys].unsqueeze(0).to(q.dtype) for cache in (k_cache, v_cache))
        window = slice(start, start + rows)
        one = AttentionTensors(
            max_seqlen_q=rows,
            max_seqlen_k=k.shape[1],
            qv=None if t.qv is None else t.qv[window].unsqueeze(0),
            alibi_slopes=t.alibi_slopes if t.alibi_slopes is None or t.alibi_slopes.dim() == 1 else t.alibi_slopes[b],
            learnable_sink=t.learnable_sink,
        )
        out_b, lse_b = flash_fwd(q[window].unsqueeze(0), k, v, spec, one)
        out[window], lse[:, window] = out_b[0], lse_b[0]
    return out, lse
