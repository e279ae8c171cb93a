"""Paged attention the plain way: gather every sequence's pages side by side, then the reference forward."""

from dataclasses import replace

import torch

from octavo.kernels.reference import packing
from octavo.kernels.reference.cache import dequantise
from octavo.kernels.reference.flash_fwd import flash_fwd
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor


def refuses_paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> str | None:
    """The reference takes every call."""
    return None


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> tuple[Tensor, Tensor]:
    """q (T, Hq, D) packed by `cu_seqlens_q`, keys by `block_table` and `seqused_k`; `num_splits` changes nothing here.

    A quantised cache is turned back into fp32 before anything else.
    """
    assert t.block_table is not None
    assert t.seqused_k is not None
    if t.k_scale is not None and t.v_scale is not None:
        k_cache = dequantise(k_cache, t.k_scale, torch.float32)
        v_cache = dequantise(v_cache, t.v_scale, torch.float32)
        plain = replace(t, k_scale=None, v_scale=None)
        out, lse = paged_attention(q.float(), k_cache, v_cache, spec, plain, num_splits)
        return out.to(q.dtype), lse
    k, v = (packing.gather_pages(cache, t.block_table, t.seqused_k).to(q.dtype) for cache in (k_cache, v_cache))
    return flash_fwd(q, k, v, spec, replace(t, block_table=None, max_seqlen_k=k.shape[1]))
