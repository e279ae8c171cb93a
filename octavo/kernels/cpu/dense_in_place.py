"""Dense and packed calls served by the compiled paged kernel: a dense row is one long page, a packed key a page of one.

It never computes what the mask hides, so it beats torch's fused kernel on masked calls (1.3 times at S = 1024,
causal, fp32, D = 64, one Zen 4 core) and is level with it elsewhere. Compiling takes some 15 s, once per head_dim and
dtype and kept on disk, so only calls that are large enough to make up for it come here.
"""

from dataclasses import replace

import torch

from octavo.kernels.cpu.paged_attention import paged_attention, refuses_paged_attention
from octavo.kernels.cpu.sequences import checked_prefix_sums
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor

# scores of a call (Hq · Sq · Sk, summed over the sequences) from which on it is compiled for: 16 heads at S = 1024
WORTH_COMPILING = 1 << 24


def takes(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> bool:
    """Whether this call is masked or capped, large, and one that the paged kernel takes."""
    special = spec.window_left >= 0 or spec.window_right >= 0 or spec.softcap > 0 or t.learnable_sink is not None
    rows = q.shape[0] if t.cu_seqlens_q is not None else q.shape[0] * q.shape[1]
    large = q.shape[-2] * rows * t.max_seqlen_k >= WORTH_COMPILING
    return special and large and refuses_paged_attention(q.flatten(0, -3), k, v, spec, t) is None


def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> tuple[Tensor, Tensor]:
    """`(out, softmax_lse)` of a call that `takes` accepts."""
    if t.cu_seqlens_k is None:
        pages = torch.arange(k.shape[0], dtype=torch.int32)[:, None]
        lengths = torch.full((k.shape[0],), k.shape[1], dtype=torch.int32)
    else:
        checked_prefix_sums(t.cu_seqlens_k, k.shape[0])
        lengths = t.cu_seqlens_k[1:] - t.cu_seqlens_k[:-1]
        pages = t.cu_seqlens_k[:-1, None] + torch.arange(int(lengths.max()), dtype=torch.int32)
        k, v = k.unsqueeze(1), v.unsqueeze(1)
    if t.seqused_k is not None:
        lengths = torch.minimum(lengths, t.seqused_k)
    if t.cu_seqlens_q is None:
        starts = q.shape[1] * torch.arange(q.shape[0] + 1, dtype=torch.int32)
    else:
        checked_prefix_sums(t.cu_seqlens_q, q.shape[0])
        starts = t.cu_seqlens_q
    paged = replace(t, cu_seqlens_q=starts, cu_seqlens_k=None, seqused_k=lengths, block_table=pages)
    out, lse = paged_attention(q.flatten(0, -3), k, v, spec, paged)
    if q.dim() == 4:
        out = out.unflatten(0, q.shape[:2])
        lse = lse.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()
    return out, lse
