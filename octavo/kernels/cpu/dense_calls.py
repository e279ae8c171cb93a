"""Which dense and packed calls the compiled kernels take, and how they are told where the sequences lie."""

import itertools
from collections.abc import Sequence as SequenceOf

import torch

from octavo.kernels.cpu.jit import cpu, lacks
from octavo.kernels.cpu.sequences import Index, Sequence
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor

ROWS, KEYS = 48, 64  # of a tile of scores
# scores of a call (Hq · Sq · Sk, summed over the sequences) from which on it is compiled for: 16 heads at S = 1024
WORTH_COMPILING = 1 << 24
TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def takes(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> bool:
    """Whether this is a large call whose options the compiled kernels have: windows, softcap, sinks."""
    options = (t.leftpad_k, t.qv, t.alibi_slopes, t.attn_bias)
    if q.dtype not in TYPES or spec.dropout_p or any(option is not None for option in options):
        return False
    if q.dtype == torch.float16 and lacks("f16c"):
        return False
    if q.shape[-1] % 32 or v.shape[-1] % 32 or max(q.shape[-1], v.shape[-1]) > 256:
        return False
    rows = q.shape[0] if t.cu_seqlens_q is not None else q.shape[0] * q.shape[1]
    keys = t.max_seqlen_k if t.cu_seqlens_k is not None else k.shape[1]
    return q.shape[-2] * rows * keys >= WORTH_COMPILING


def uses_pairs(dtype: torch.dtype) -> bool:
    """Whether products are taken of pairs of bf16 numbers: half as many instructions."""
    return dtype == torch.bfloat16 and "avx512bf16" in cpu()[1]


def addresses(x: Tensor, indices: SequenceOf[Index]) -> list[int]:
    """Where each sequence begins in x: at its batch row, if it has one, and at the first of its rows or columns."""
    where = []
    for index in indices:
        starts = [i if isinstance(i, int) else i.start or 0 for i in index]
        where.append(x.data_ptr() + sum(i * x.stride(axis) for axis, i in enumerate(starts)) * x.element_size())
    return where


def table(
    found: list[Sequence],
    jobs: list[int],
    rows: SequenceOf[Tensor],
    statistics: SequenceOf[Tensor],
    keys: SequenceOf[Tensor],
) -> Tensor:
    """A row of int64 for each sequence: number of its first job, rows, keys, then its address in each tensor."""
    columns = [
        [0, *itertools.accumulate(jobs)][:-1],
        [s.num_rows for s in found],
        [s.num_keys for s in found],
        *(addresses(x, [s.rows for s in found]) for x in rows),
        *(addresses(x, [s.lse for s in found]) for x in statistics),
        *(addresses(x, [s.keys for s in found]) for x in keys),
    ]
    return torch.tensor(columns, dtype=torch.int64).T.contiguous()
