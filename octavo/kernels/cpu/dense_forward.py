"""The forward of dense and packed attention, compiled: the online softmax over tiles of 48 rows × 64 keys.

A job is a block of rows of one sequence for one key/value head, with all query heads that read it: a tile of keys is
transposed once for all of them. Threads take jobs from a counter; what the mask hides is never computed. bf16 runs on
pair products where the CPU has them (`dense_tiles_code.py`), with P rounded to bf16; all else is computed in fp32.
"""

import functools
import math

import torch

from octavo.kernels.cpu.dense_calls import KEYS, ROWS, TYPES, table, uses_pairs
from octavo.kernels.cpu.jit import Kernel
from octavo.kernels.cpu.sequences import sequences
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor

ROW_FIELDS = 9  # of the table: first job, rows, keys, q, out, maxima, totals, K, V
BLOCK_TILES = 4  # tiles of rows, over the query heads of a group, that share a transposed tile of keys


class Layout:
    """Where things are in a thread's scratch, in bytes."""

    def __init__(self, head_dim: int, head_dim_v: int) -> None:
        self.head_dim, self.head_dim_v = head_dim, head_dim_v
        self.factors = 0
        self.k_transposed = 64
        self.v_rows = self.k_transposed + 4 * KEYS * head_dim
        self.raw = self.v_rows + 4 * KEYS * head_dim_v
        self.scores = self.raw + 4 * KEYS * max(head_dim, head_dim_v)
        self.weights = self.scores + 4 * ROWS * KEYS
        self.size = self.weights + 2 * ROWS * KEYS


def row_bytes(head_dim: int, head_dim_v: int) -> int:
    """Of a row of a job: q, output, 16 partial totals, maximum (one vector, for the alignment)."""
    return 4 * head_dim + 4 * head_dim_v + 128


def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> tuple[Tensor, Tensor]:
    """`(out, softmax_lse)` of a call that `dense_calls.takes` accepts."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    head_dim, head_dim_v, heads, kv_heads = q.shape[-1], v.shape[-1], q.shape[-2], k.shape[-2]
    out = q.new_zeros(*q.shape[:-1], head_dim_v)
    # of each row the highest score in base 2, and the sum of weights against it
    highest = q.new_full((*q.shape[:-3], heads, q.shape[-3]), -torch.inf, dtype=torch.float32)
    totals = torch.zeros_like(highest)
    found, threads, group = list(sequences(q, k, t)), torch.get_num_threads(), heads // kv_heads
    block = ROWS * max(1, BLOCK_TILES // group)
    jobs = [kv_heads * -(-s.num_rows // block) for s in found]
    where = table(found, jobs, (q, out), (highest, totals), (k, v))
    counter = torch.zeros(1, dtype=torch.int64)
    scratch = torch.empty(threads, Layout(head_dim, head_dim_v).size, dtype=torch.uint8)
    work = torch.empty(threads, group * block * row_bytes(head_dim, head_dim_v), dtype=torch.uint8)
    sink = None if t.learnable_sink is None else t.learnable_sink.float().contiguous()
    size = q.element_size()
    _kernel(head_dim, head_dim_v, q.dtype, spec.softcap > 0)(
        *(where.data_ptr(), len(found), counter.data_ptr(), sum(jobs), block, group, kv_heads),
        *(x.stride(axis) * size for x in (q, out, k, v) for axis in (-3, -2)),
        *(4 * highest.stride(-2), spec.window_left, spec.window_right, 0 if sink is None else sink.data_ptr()),
        *(scratch.data_ptr(), scratch.stride(0), work.data_ptr(), work.stride(0)),
        *(float(spec.softmax_scale), float(spec.softcap)),
        threads=threads,
    )
    return out, (highest + totals.log2()).mul_(math.log(2))


@functools.cache
def _kernel(head_dim: int, head_dim_v: int, dtype: torch.dtype, capped: bool) -> Kernel:
    def build():
        from octavo.kernels.cpu.dense_forward_code import make_kernel

        return make_kernel(head_dim, head_dim_v, TYPES[dtype], uses_pairs(dtype), capped)

    return Kernel(f"dense-forward-{head_dim}-{head_dim_v}-{TYPES[dtype]}{'-capped' if capped else ''}", build)
