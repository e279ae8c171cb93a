"""The backward of dense and packed attention, compiled: five products a tile of 48 rows × 64 keys, all in the caches.

A job is one key/value head of one sequence, with the query heads that read it, or some of them where there would be
fewer jobs than threads: dK and dV of a tile of keys grow in the scratch of one thread while the rows that see it pass
by, dQ grows in a buffer of the job. Threads take jobs from a counter and add nothing across, so gradients repeat bit
for bit. What the mask hides is never computed. Probabilities are recomputed from the LSE (Dao et al.,
"FlashAttention", 2022).

bf16 runs on pair products where the CPU has them (`dense_tiles_code.py`), with P and dS rounded to bf16 between the
products as on a GPU; all else is computed in fp32.
"""

import functools

import torch

from octavo.kernels.cpu.dense_calls import KEYS, ROWS, TYPES, table, uses_pairs
from octavo.kernels.cpu.jit import Kernel
from octavo.kernels.cpu.sequences import sequences
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor

ROW_FIELDS = 12  # of the table: first job, rows, keys, q, dO, dQ, LSE, δ, K, V, dK, dV


class Layout:
    """Where things are in a thread's scratch, in bytes."""

    def __init__(self, head_dim: int, head_dim_v: int) -> None:
        self.head_dim, self.head_dim_v = head_dim, head_dim_v
        both, wider = head_dim + head_dim_v, max(head_dim, head_dim_v)
        self.factors, self.bounds, self.statistics = 0, 64, 128
        at = 128 + 8 * ROWS
        self.k_transposed, self.v_transposed = at, at + 4 * KEYS * head_dim
        at += 4 * KEYS * both
        self.k_rows, self.raw = at, at + 4 * KEYS * head_dim
        at += 4 * KEYS * (head_dim + wider)
        self.dk, self.dv = at, at + 4 * KEYS * head_dim
        at += 4 * KEYS * both
        self.q, self.dout = at, at + 4 * ROWS * head_dim
        at += 4 * ROWS * both
        self.q_pairs, self.dout_pairs = at, at + 2 * ROWS * head_dim
        at += 2 * ROWS * both
        tile = 4 * ROWS * KEYS
        self.scores, self.dprobs = at, at + tile
        self.p_pairs, self.ds_pairs, self.ds_rows = (at + 2 * tile + i * tile // 2 for i in range(3))
        self.size = -(-(at + 4 * tile) // 64) * 64


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lse: Tensor, spec: AttentionSpec, t: AttentionTensors
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; lse and delta, which is rowsum(O ∘ dO) − dL, are fp32 (B, Hq, Sq) or (Hq, T)."""
    dout, q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (dout, q, k, v))
    # a row that saw nothing has −inf here: +inf makes all its probabilities 0
    lse, delta = lse.masked_fill(lse == -torch.inf, torch.inf).contiguous(), delta.contiguous()
    found, threads, kv_heads = list(sequences(q, k, t)), torch.get_num_threads(), k.shape[-2]
    parts = _parts_of_a_group(q.shape[-2] // kv_heads, len(found) * kv_heads, threads)
    group = q.shape[-2] // kv_heads // parts
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (x.new_zeros(*x.shape[:-2], kv_heads * parts, x.shape[-1]) for x in (k, v))
    jobs = [kv_heads * parts] * len(found)
    where = table(found, jobs, (q, dout, dq), (lse, delta), (k, v, dk, dv))
    counter = torch.zeros(1, dtype=torch.int64)
    scratch = torch.empty(threads, Layout(q.shape[-1], v.shape[-1]).size, dtype=torch.uint8)
    work = torch.empty(threads, group, max((s.num_rows for s in found), default=0) + ROWS, q.shape[-1])
    size = q.element_size()
    _kernel(q.shape[-1], v.shape[-1], q.dtype, spec.softcap > 0)(
        *(where.data_ptr(), len(found), counter.data_ptr(), sum(jobs), group, parts),
        *(x.stride(axis) * size for x in (q, dout, dq, k, v, dk, dv) for axis in (-3, -2)),
        *(4 * lse.stride(-2), spec.window_left, spec.window_right),
        *(scratch.data_ptr(), scratch.stride(0), work.data_ptr(), 4 * work.stride(0)),
        *(float(spec.softmax_scale), float(spec.softcap)),
        threads=threads,
    )
    if parts > 1:
        dk, dv = (x.unflatten(-2, (kv_heads, parts)).sum(dim=-2, dtype=torch.float32).to(x.dtype) for x in (dk, dv))
    return dq, dk, dv


def _parts_of_a_group(group: int, jobs: int, threads: int) -> int:
    """Into how many jobs the query heads of a key head are cut, so that no thread is without one."""
    return next((n for n in range(1, group) if group % n == 0 and jobs * n >= threads), group)


@functools.cache
def _kernel(head_dim: int, head_dim_v: int, dtype: torch.dtype, capped: bool) -> Kernel:
    def build():
        from octavo.kernels.cpu.dense_backward_code import make_kernel

        return make_kernel(head_dim, head_dim_v, TYPES[dtype], uses_pairs(dtype), capped)

    return Kernel(f"dense-backward-{head_dim}-{head_dim_v}-{TYPES[dtype]}{'-capped' if capped else ''}", build)
