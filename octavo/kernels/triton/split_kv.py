"""How one step's keys are divided among programs when there are fewer queries than processors, and put together again.

Every sequence is cut into splits of about equal length, as many in all as fill the GPU a few times. Each program
computes the plan from the lengths on the device, so the grid depends on shapes only and a CUDA graph can replay it for
other lengths. Each split leaves an output and an LSE; `combine_kernel` weighs them by exp(LSE_split − LSE). This is
split-KV (Dao et al., "Flash-Decoding", 2023) with work dealt by bytes instead of a fixed count per sequence.
"""

import triton
import triton.language as tl

from octavo.kernels.triton.scores import sequence


@triton.jit
def _count_splits(keys, tiles_per_split, num_splits, max_keys, BLOCK_N: tl.constexpr):
    tiles = tl.cdiv(tl.minimum(keys, max_keys), BLOCK_N)
    if num_splits is None:
        count = tl.cdiv(tiles, tiles_per_split)
    else:
        count = tl.minimum(tiles, num_splits)
    return tl.maximum(count, 1)


@triton.jit
def split_of_slot(slot, batch, seqused, target, num_splits, max_keys, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr):
    """(sequence, first slot of that sequence, its number of splits); sequence == batch when the slot has no work.

    `target` slots share the tiles of all sequences evenly, or each sequence has `num_splits`. At most `max_keys` keys
    count (a sliding window reads no more).
    """
    tiles = tl.zeros((), tl.int32)
    for b0 in range(0, batch, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        keys = tl.load(seqused + b, mask=b < batch, other=0)
        tiles += tl.sum(tl.cdiv(tl.minimum(keys, max_keys), BLOCK_N))
    tiles_per_split = tl.maximum(tl.cdiv(tiles, target), 1)
    found = tl.zeros((), tl.int32)
    first = tl.zeros((), tl.int32)
    before = tl.zeros((), tl.int32)
    for b0 in range(0, batch, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        keys = tl.load(seqused + b, mask=b < batch, other=0)
        count = tl.where(b < batch, _count_splits(keys, tiles_per_split, num_splits, max_keys, BLOCK_N), 0)
        passed = (before + tl.cumsum(count, 0) <= slot) & (b < batch)
        found += tl.sum(passed.to(tl.int32))
        first += tl.sum(tl.where(passed, count, 0))
        before += tl.sum(count)
    keys = tl.load(seqused + tl.minimum(found, batch - 1))
    return found, first, _count_splits(keys, tiles_per_split, num_splits, max_keys, BLOCK_N)


@triton.jit(do_not_specialize=["seqlen_q", "rows", "stride_lb", "stride_lh"])
def combine_kernel(
    partial_out,
    partial_lse,
    split_ranges,
    out,
    lse,
    cu_seqlens_q,
    seqused_q,
    seqlen_q,
    num_tiles_heads,
    rows,
    stride_ob,
    stride_os,
    stride_oh,
    stride_lb,
    stride_lh,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One row of packed queries: Σ exp(LSE_s − LSE) · out_s over its sequence's splits; with one split it is done."""
    pid = tl.program_id(0)
    r = pid % rows
    head = (pid // rows) % num_tiles_heads
    b = pid // (rows * num_tiles_heads)
    first = tl.load(split_ranges + 2 * b)
    splits = tl.load(split_ranges + 2 * b + 1)
    start_q, length_q = sequence(b, cu_seqlens_q, seqused_q, seqlen_q)
    i = r // GROUP_ROWS
    if (splits > 1) & (i < length_q):
        d = tl.arange(0, BLOCK_DV)
        m = tl.full((), float("-inf"), tl.float32)
        l = tl.zeros((), tl.float32)
        acc = tl.zeros((BLOCK_DV,), tl.float32)
        for s0 in range(0, splits, BLOCK_SPLITS):
            s = s0 + tl.arange(0, BLOCK_SPLITS)
            index = ((first + s).to(tl.int64) * num_tiles_heads + head) * rows + r
            part = tl.load(partial_lse + index, mask=s < splits, other=float("-inf"))
            m_new = tl.maximum(m, tl.max(part, 0))
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            weight = tl.exp(part - m_safe)
            mask = (weight > 0)[:, None] & (d < HEAD_DIM_V)[None, :]
            values = tl.load(partial_out + index[:, None] * HEAD_DIM_V + d[None, :], mask=mask, other=0.0)
            alpha = tl.exp(m - m_safe)
            l = l * alpha + tl.sum(weight, 0)
            acc = acc * alpha + tl.sum(weight[:, None] * values, 0)
            m = m_new
        h = head * GROUP_ROWS + r % GROUP_ROWS
        row = start_q + i
        l = tl.where(l == 0.0, 1.0, l)
        result = acc / l
        pointers = out + b.to(tl.int64) * stride_ob + row * stride_os + h * stride_oh + d
        tl.store(pointers, result.to(out.dtype.element_ty), mask=d < HEAD_DIM_V)
        tl.store(lse + b.to(tl.int64) * stride_lb + h.to(tl.int64) * stride_lh + row, m + tl.log(l))
