"""Absorbed latent attention (MLA) over a paged cache for Hopper (sm_90), in Gluon: decode steps of up to 128+ heads.

All heads share one key, the latent (512) beside its rotary part (64), and the latent is the value: each block of 64
tokens is read once into shared memory and multiplied twice. One thread block takes 64 rows (query token × head) and
three warpgroups, each with one job, so that nothing is held twice:

    scores   keeps Q in registers; S(i) = Q·K(i)ᵀ, softmax, P(i) to shared memory; loads the rotary part of block i + 2
    left     O[:, :256] += P(i)·K(i)[:, :256]; loads the left half of block i + 3 where it has just finished with i
    right    the same for the right half

Work is dealt by blocks of tokens: part p of a fixed number takes an equal share of all sequences' blocks laid end to
end (computed on the device, so a CUDA graph replays it for other lengths). A sequence that falls into several parts
leaves pieces in fp32, which `combine_kernel` weighs by exp(LSE_piece − LSE).
"""

import math
from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.hopper.gluon_compat import launch_dependents, tma_load
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor
from octavo.kernels.triton.flash_fwd import num_processors
from octavo.kernels.triton.paged_decode import combine

LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
LAG = gl.constexpr(8.0)  # powers of two by which the row maximum may outgrow its reference
ROWS = gl.constexpr(64)  # query rows of one thread block: the M of wgmma
BLOCK = gl.constexpr(64)  # tokens of one block
HALF = gl.constexpr(256)  # columns of the latent that one warpgroup accumulates
ROPE = gl.constexpr(64)
STAGES = gl.constexpr(3)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _costs(b, batch, seqused, OVERHEAD: gl.constexpr):
    """Units of work of sequences `b`: their blocks, and what starting one costs."""
    keys = gl.load(seqused + b, mask=b < batch, other=0)
    return gl.where(b < batch, gl.maximum(gl.cdiv(keys, BLOCK) + OVERHEAD, 1), 0)


@gluon.jit
def share_of_part(part, parts, batch, seqused, OVERHEAD: gl.constexpr, BLOCK_B: gl.constexpr):
    """(first unit of this part, one past its last, units a part, the sequence it begins in, that one's first unit)."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    total = 0
    longest = 1
    for b0 in range(0, batch, BLOCK_B):
        cost = _costs(b0 + gl.arange(0, BLOCK_B, layout), batch, seqused, OVERHEAD)
        total += gl.sum(cost, axis=0)
        longest = gl.maximum(longest, gl.max(cost, axis=0))
    share = gl.cdiv(total, parts)
    # sequences of one length: cut at their ends or into equal pieces, where that costs less than a sixteenth
    even = gl.cdiv(share, longest) * longest if share >= longest else gl.cdiv(longest, longest // share)
    share = gl.where(even <= share + share // 16, even, share)
    begin = part * share
    b = 0
    start = 0
    before = 0
    for b0 in range(0, batch, BLOCK_B):
        index = b0 + gl.arange(0, BLOCK_B, layout)
        cost = _costs(index, batch, seqused, OVERHEAD)
        passed = (before + gl.associative_scan(cost, 0, _add) <= begin) & (index < batch)
        b += gl.sum(passed.to(gl.int32), axis=0)
        start += gl.sum(gl.where(passed, cost, 0), axis=0)
        before += gl.sum(cost, axis=0)
    return begin, gl.minimum(begin + share, total), share, b, start


@gluon.jit
def piece(unit, unit_end, start, length, OVERHEAD: gl.constexpr):
    """Of the sequence that begins at unit `start`: (its last unit + 1, blocks [lo, hi) of it in this part)."""
    blocks = gl.cdiv(length, BLOCK)
    end = start + gl.maximum(blocks + OVERHEAD, 1)
    lo = gl.maximum(unit - start - OVERHEAD, 0)
    hi = gl.maximum(gl.minimum(gl.minimum(unit_end, end) - start - OVERHEAD, blocks), lo)
    return end, lo, hi


@gluon.jit
def load_columns(row, valid, desc, column, full, smem, g: gl.constexpr, GROUP: gl.constexpr):
    """Load GROUP rows of one page, the g-th of a block, into their place in smem (1, BLOCK, width)."""
    if GROUP == BLOCK:
        tma_load(desc, [row + valid, BLOCK - valid, column], full, smem)
    else:
        chunks: gl.constexpr = smem.shape[2] // 64
        tiles = smem._reinterpret(smem.dtype, [BLOCK // GROUP * chunks, 1, GROUP, 64], desc.layout)
        for c in gl.static_range(chunks):
            at = [row + valid, GROUP - valid, column + c * 64]
            tma_load(desc, at, full, tiles.index(c * (BLOCK // GROUP) + g))


@gluon.jit
def load_block(
    n, stage, length, table, page_rows, desc, smem, full,
    COLUMN: gl.constexpr, PAGE: gl.constexpr, GROUP: gl.constexpr, ENDS: gl.constexpr,
):  # fmt: skip
    """Load the columns from COLUMN of block n into a stage of smem; where the sequence ENDS in it, zeros follow.

    The descriptor's axes are (row, row, column) over the cache moved back by GROUP rows, and the second axis ends at
    GROUP: starting it at GROUP - valid makes the hardware cut there.
    """
    mbarrier.expect(full.index(stage), 2 * BLOCK * smem.shape[3])
    for g in gl.static_range(BLOCK // GROUP):
        valid = GROUP
        if ENDS:
            valid = gl.minimum(gl.maximum(length - n * BLOCK - g * GROUP, 0), GROUP)
        if PAGE <= BLOCK:
            row = gl.load(table + n * (BLOCK // GROUP) + g, mask=valid > 0, other=0) * page_rows
        else:
            row = gl.load(table + n // (PAGE // BLOCK)) * page_rows + n % (PAGE // BLOCK) * BLOCK
        load_columns(row, valid, desc, COLUMN, full.index(stage), smem.index(stage), g, GROUP)


@gluon.jit
def sum_within_threads(p):
    """Row sums of p (rows, n) as far as one thread holds a row: (rows, 4), a quarter for each thread of a quad."""
    p = gl.reshape(p, [p.shape[0], p.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(p, axis=3), axis=1)


@gluon.jit
def rows_as(x, like):
    """x (rows,) as a column in the layout of `like`."""
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def softmax_block(s, top, l, scale, n, last, MASK: gl.constexpr):
    """(P in fp32 relative to 2^top, top, sums, factor for what came before); top follows the maximum with a lag."""
    if MASK:
        col = n * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, s.type.layout))
        s = gl.where(col[None, :] <= last[:, None], s, float("-inf"))
    highest = gl.max(s, axis=1) * scale
    top_new = gl.where(highest > top + LAG, highest, top)
    shift = top_new
    if MASK:
        shift = gl.where(top_new == float("-inf"), 0.0, top_new)
    p = gl.exp2(s * scale - shift[:, None])
    alpha = gl.exp2(top - shift)
    sums = sum_within_threads(p)
    return p, top_new, l * rows_as(alpha, sums) + sums, alpha


@gluon.jit
def score_blocks(
    n, stop, first, index, sent, q, top, l, scale, last, smem, bars, LATE: gl.constexpr, MASK: gl.constexpr
):
    """Blocks n, n - 1, …, stop: P, in the place of the rotary part, and its factor to the other warpgroups."""
    q_left, q_right0, q_right1, q_right2, q_rest = q
    left_smem, right_smem, rope_smem, factor_smem = smem
    left_full, right_full, rope_full, p_full, p_empty = bars
    right = right_smem._reinterpret(right_smem.dtype, [4 * STAGES, BLOCK, 64], q_rest.layout)
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    while n >= stop:
        stage = index % STAGES
        phase = (index // STAGES) & 1
        slot = sent % 2
        zero = gl.full([ROWS, BLOCK], 0.0, gl.float32, S_LAYOUT)
        mbarrier.wait(left_full.index(stage), phase)
        k = left_smem.index(stage).reshape([BLOCK, HALF]).permute((1, 0))
        s = warpgroup_mma(q_left, k, zero, use_acc=False, is_async=True)
        mbarrier.wait(right_full.index(stage), phase)
        s = warpgroup_mma(q_right0, right.index(4 * stage).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma(q_right1, right.index(4 * stage + 1).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma(q_right2, right.index(4 * stage + 2).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma(q_rest.index(0), right.index(4 * stage + 3).permute((1, 0)), s, is_async=True)
        pair = index % 2
        mbarrier.wait(rope_full.index(pair), (index // 2) & 1)
        k = rope_smem.index(pair).reshape([BLOCK, ROPE]).permute((1, 0))
        s = warpgroup_mma(q_rest.index(1), k, s, is_async=True)
        if LATE == 1:
            mbarrier.arrive(p_full.index(slot ^ 1), count=1, pred=n < first)
        s = warpgroup_mma_wait(0, [s])
        if LATE == 2:
            mbarrier.arrive(p_full.index(slot ^ 1), count=1, pred=n < first)
        gl.thread_barrier()
        p, top, l, alpha = softmax_block(s, top, l, scale, n, last, MASK)
        mbarrier.wait(p_empty.index(slot), ((sent // 2) & 1) ^ 1)
        rope_smem.index(pair).reshape([ROWS, BLOCK]).store(p.to(rope_smem.dtype))
        factor_smem.index(slot).store(alpha)
        fence_async_shared()
        if LATE == 0:
            mbarrier.arrive(p_full.index(slot), count=1)
        index += 1
        sent += 1
        n -= 1
    return n, index, sent, top, l


@gluon.jit
def scores(
    q_ptr, tensors, q_smem, top_smem, smem, bars, unit, unit_end, b, start, heads, scale, m_tile,
    LATE: gl.constexpr, OVERHEAD: gl.constexpr,
):  # fmt: skip
    """The first warpgroup: scores and softmax."""
    seqused, cu_q, block_table = tensors
    left_smem, right_smem, rope_smem, factor_smem = smem
    left_full, right_full, rope_full, p_full, p_empty = bars
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
    index = 0
    sent = 0
    while unit < unit_end:
        length = gl.load(seqused + b)
        end, lo, hi = piece(unit, unit_end, start, length, OVERHEAD)
        start_q = gl.load(cu_q + b)
        len_q = gl.load(cu_q + b + 1) - start_q
        q_row = m_tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, Q_LAYOUT))
        q_rows = q_ptr + (start_q.to(gl.int64) * heads + q_row) * (2 * HALF + ROPE)
        used = (q_row < len_q * heads)[:, None]
        column = gl.arange(0, HALF, gl.SliceLayout(0, Q_LAYOUT))[None, :]
        q_left = gl.load(q_rows[:, None] + column, mask=used, other=0.0)
        column = HALF + gl.arange(0, 64, gl.SliceLayout(0, Q_LAYOUT))[None, :]
        q_right0 = gl.load(q_rows[:, None] + column, mask=used, other=0.0)
        q_right1 = gl.load(q_rows[:, None] + column + 64, mask=used, other=0.0)
        q_right2 = gl.load(q_rows[:, None] + column + 128, mask=used, other=0.0)
        tail: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        q_row = m_tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, tail))
        q_rows = q_ptr + (start_q.to(gl.int64) * heads + q_row) * (2 * HALF + ROPE) + 2 * HALF - 64
        column = gl.arange(0, 64, gl.SliceLayout(0, tail))[None, :]
        for k in gl.static_range(2):
            used = (q_row < len_q * heads)[:, None]
            q_smem.index(k).store(gl.load(q_rows[:, None] + column + 64 * k, mask=used, other=0.0))
        fence_async_shared()
        gl.thread_barrier()
        row = m_tile * ROWS + gl.arange(0, ROWS, ROW)
        last = length - len_q + row // heads
        clear = gl.minimum(gl.maximum((length - len_q + 1 + m_tile * ROWS // heads) // BLOCK, lo), hi)
        top = gl.full([ROWS], float("-inf"), gl.float32, ROW)
        l = sum_within_threads(gl.full([ROWS, BLOCK], 0.0, gl.float32, S_LAYOUT))
        n = hi - 1
        for MASK in gl.static_range(1, -1, -1):
            n, index, sent, top, l = score_blocks(
                n, clear if MASK else lo, hi - 1, index, sent, (q_left, q_right0, q_right1, q_right2, q_smem), top, l, scale, last, smem, bars,
                LATE, MASK == 1,
            )  # fmt: skip
        if LATE != 0:
            mbarrier.arrive(p_full.index((sent + 1) % 2), count=1, pred=lo < hi)
        slot = sent % 2
        mbarrier.wait(p_empty.index(slot), ((sent // 2) & 1) ^ 1)
        factor_smem.index(slot).store(gl.convert_layout(gl.sum(l, axis=1), ROW))
        top_smem.index(slot).store(top)
        mbarrier.arrive(p_full.index(slot), count=1)
        sent += 1
        unit = gl.minimum(end, unit_end)
        start = end
        b += 1


@gluon.jit
def write_piece(o, total, top, at, b, outputs, cu_q, sizes, m_tile, SIDE: gl.constexpr):
    """Write the columns of one side, and the LSE with the left one: as they are, or as piece `at` (-1: it is whole)."""
    out_ptr, lse_ptr, partial_out, partial_lse, meta = outputs
    heads, table_stride, page_rows, lse_stride, num_rows = sizes
    start_q = gl.load(cu_q + b)
    len_q = gl.load(cu_q + b + 1) - start_q
    row = m_tile * ROWS + gl.arange(0, ROWS, total.type.layout)
    in_use = row < len_q * heads
    o = o * gl.where(total > 0, 1.0 / total, 0.0)[:, None]
    lse = gl.where(total > 0, (top + gl.log2(total)) * LN2, float("-inf"))
    column = SIDE * HALF + gl.arange(0, HALF, gl.SliceLayout(0, o.type.layout))[None, :]
    if at < 0:
        if SIDE == 0:
            gl.store(lse_ptr + (row % heads).to(gl.int64) * lse_stride + start_q + row // heads, lse, mask=in_use)
        rows = (out_ptr + (start_q.to(gl.int64) * heads + row) * (2 * HALF))[:, None]
        gl.store(rows + column, o.to(out_ptr.dtype.element_ty), mask=in_use[:, None])
    else:
        place = at.to(gl.int64) * num_rows + row
        if SIDE == 0:
            gl.store(partial_lse + place, lse, mask=in_use)
        gl.store((partial_out + place * (2 * HALF))[:, None] + column, o, mask=in_use[:, None])


@gluon.jit
def accumulate(
    outputs, tensors, descs, kv_smem, full, rope_smem, rope_full, factor_smem, top_smem, bars, work, sizes, m_tile,
    SIDE: gl.constexpr, PAGE: gl.constexpr, GROUP: gl.constexpr, OVERHEAD: gl.constexpr,
):  # fmt: skip
    """The second and third warpgroup: one half of the output's columns."""
    seqused, cu_q, block_table = tensors
    unit, unit_end, share, b, start, part = work
    heads, table_stride, page_rows, lse_stride, num_rows = sizes
    latent_desc, rope_desc = descs
    p_full, p_empty = bars
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    index = 0
    sent = 0
    while unit < unit_end:
        length = gl.load(seqused + b)
        end, lo, hi = piece(unit, unit_end, start, length, OVERHEAD)
        table = block_table + b.to(gl.int64) * table_stride
        for k in gl.static_range(STAGES):
            if hi - 1 - k >= lo:
                if SIDE == 1 and k < 2:
                    load_block(
                        hi - 1 - k, (index + k) % 2, length, table, page_rows, rope_desc, rope_smem, rope_full,
                        2 * HALF, PAGE, GROUP, k == 0,
                    )  # fmt: skip
                load_block(
                    hi - 1 - k, (index + k) % STAGES, length, table, page_rows, latent_desc, kv_smem, full,
                    SIDE * HALF, PAGE, GROUP, k == 0,
                )  # fmt: skip
        o = gl.full([ROWS, HALF], 0.0, gl.float32, O_LAYOUT)
        n = hi - 1
        while n >= lo:
            slot = sent % 2
            stage = index % STAGES
            mbarrier.wait(p_full.index(slot), (sent // 2) & 1)
            o = o * factor_smem.index(slot).load(ROW)[:, None]
            mbarrier.wait(full.index(stage), (index // STAGES) & 1)
            p = rope_smem.index(index % 2).reshape([ROWS, BLOCK])
            o = warpgroup_mma(p, kv_smem.index(stage).reshape([BLOCK, HALF]), o, is_async=True)
            o = warpgroup_mma_wait(0, [o])
            gl.thread_barrier()
            mbarrier.arrive(p_empty.index(slot), count=1)
            if SIDE == 1 and n - 2 >= lo:  # P lies where the rotary part goes
                mbarrier.wait(p_empty.index(slot), (sent // 2) & 1)
                load_block(
                    n - 2, index % 2, length, table, page_rows, rope_desc, rope_smem, rope_full,
                    2 * HALF, PAGE, GROUP, False,
                )  # fmt: skip
            if n - STAGES >= lo:
                load_block(
                    n - STAGES, stage, length, table, page_rows, latent_desc, kv_smem, full,
                    SIDE * HALF, PAGE, GROUP, False,
                )  # fmt: skip
            index += 1
            sent += 1
            n -= 1
        slot = sent % 2
        mbarrier.wait(p_full.index(slot), (sent // 2) & 1)
        total = factor_smem.index(slot).load(ROW)
        top = top_smem.index(slot).load(ROW)
        mbarrier.arrive(p_empty.index(slot), count=1)
        sent += 1
        at = 2 * part + (unit != part * share).to(gl.int32)
        if unit == start:  # where the pieces of this sequence are
            if SIDE == 0:
                gl.store(outputs[4] + 2 * b, at)
                gl.store(outputs[4] + 2 * b + 1, (end - 1) // share - part + 1)
            at = gl.where(unit_end >= end, -1, at)
        write_piece(o, total, top, at, b, outputs, cu_q, sizes, m_tile, SIDE)
        unit = gl.minimum(end, unit_end)
        start = end
        b += 1


@gluon.jit
def barriers(N: gl.constexpr, COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit(do_not_specialize=["batch", "parts", "m_tiles", "table_stride", "lse_stride", "num_rows"])
def mla_decode_kernel(
    latent_desc, rope_desc, q_ptr, out_ptr, lse_ptr, partial_out, partial_lse, meta, seqused, cu_q, block_table,
    batch, parts, m_tiles, heads, table_stride, page_rows, lse_stride, num_rows, scale,
    PAGE: gl.constexpr, GROUP: gl.constexpr, LATE: gl.constexpr, OVERHEAD: gl.constexpr, BLOCK_B: gl.constexpr,
    REGS_L: gl.constexpr, REGS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = latent_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    left_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK, HALF], layout)
    right_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK, HALF], layout)
    rope_smem = gl.allocate_shared_memory(dtype, [2, 1, BLOCK, ROPE], layout)  # and P, once multiplied
    q_smem = gl.allocate_shared_memory(dtype, [2, ROWS, 64], flat)  # the last 64 columns and the rotary part
    factor_smem = gl.allocate_shared_memory(gl.float32, [2, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    left_full = barriers(STAGES, 1)
    right_full = barriers(STAGES, 1)
    rope_full = barriers(2, 1)
    p_full = barriers(2, 1)
    p_empty = barriers(2, 2)
    part = gl.program_id(0) // m_tiles
    m_tile = gl.program_id(0) % m_tiles
    begin, unit_end, share, b, start = share_of_part(part, parts, batch, seqused, OVERHEAD, BLOCK_B)
    top_smem = gl.allocate_shared_memory(gl.float32, [2, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    outputs = (out_ptr, lse_ptr, partial_out, partial_lse, meta)
    launch_dependents(part)
    work = (begin, unit_end, share, b, start, part)
    sizes = (heads, table_stride, page_rows, lse_stride, num_rows)
    tensors = (seqused, cu_q, block_table)
    smem = (left_smem, right_smem, rope_smem, factor_smem)
    bars = (left_full, right_full, rope_full, p_full, p_empty)
    descs = (latent_desc, rope_desc)
    gl.warp_specialize(
        [
            (scores, (q_ptr, tensors, q_smem, top_smem, smem, bars, begin, unit_end, b, start, heads, scale, m_tile,
                      LATE, OVERHEAD)),
            (accumulate, (outputs, tensors, descs, left_smem, left_full, rope_smem, rope_full, factor_smem, top_smem,
                          (p_full, p_empty), work, sizes, m_tile, 0, PAGE, GROUP, OVERHEAD)),
            (accumulate, (outputs, tensors, descs, right_smem, right_full, rope_smem, rope_full, factor_smem, top_smem,
                          (p_full, p_empty), work, sizes, m_tile, 1, PAGE, GROUP, OVERHEAD)),
        ],
        [4, 4],
        [REGS_L, REGS],
    )  # fmt: skip


MAX_ROWS = 1024  # query rows (tokens × heads) of a sequence; above it a kernel for prefill serves better
_DTYPES = (torch.float16, torch.bfloat16)


def refuses_mla_decode_(
    q: Tensor, kv_cache: Tensor, head_dim_v: int, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> str | None:
    """Why this backend cannot take the call, or None."""
    if q.dtype not in _DTYPES:
        return f"it takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if (q.shape[-1], head_dim_v) != (2 * HALF.value + ROPE.value, 2 * HALF.value):
        return f"it takes a latent of 512 beside a rotary part of 64, not {head_dim_v} in {q.shape[-1]}"
    page = kv_cache.shape[1]
    if page not in (16, 32) and page % BLOCK.value:
        return f"it takes pages of 16, 32 and multiples of 64 tokens, not {page}"
    if kv_cache.stride(2) != 1 or kv_cache.stride(1) % 8 or kv_cache.stride(0) % kv_cache.stride(1):
        return "it takes caches whose tokens are a whole number of 16-byte rows apart"
    if kv_cache.data_ptr() % 16:
        return "it takes caches that begin on 16 bytes"
    rows = t.max_seqlen_q * q.shape[-2]
    if t.cu_seqlens_q is None or rows > MAX_ROWS:
        return f"it takes packed queries of up to {MAX_ROWS} rows (tokens × heads) a sequence, not {rows}"
    if not spec.causal or spec.softcap or spec.softmax_scale <= 0 or num_splits:
        return "it takes causal masks without softcap, a positive scale and no num_splits"
    given = [name for name in ("seqused_q", "leftpad_k", "learnable_sink", "alibi_slopes") if getattr(t, name) is not None]
    return f"it does not take {', '.join(given)}" if given else None


class _Rows(NamedTuple):
    """Address and dtype of a tensor some bytes earlier, in the shape that Triton's descriptors ask for."""

    tensor: Tensor
    offset: int

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def data_ptr(self) -> int:
        return self.tensor.data_ptr() - self.offset


_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)


def _descriptor(cache: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Boxes (1, rows, columns) over axes (row, row, column), as `load_block` addresses them."""
    stride = cache.stride(1)
    descriptor = TensorDescriptor.__new__(TensorDescriptor)  # its own checks cost 25 µs
    descriptor.base = _Rows(cache, rows * stride * cache.element_size())
    descriptor.shape = [(cache.shape[0] - 1) * (cache.stride(0) // stride) + cache.shape[1] + 1, rows, cache.shape[2]]
    descriptor.strides = [stride, stride, 1]
    descriptor.block_shape, descriptor.layout, descriptor.padding = [1, rows, columns], _LAYOUT, "zero"
    return descriptor


def mla_decode(
    q: Tensor, kv_cache: Tensor, head_dim_v: int, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0,
    late: int = 0, overhead: int = 0, parts: int = 0, pdl: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (T, Hq, R + rope) packed, kv_cache (num_blocks, block_size, R + rope) → out (T, Hq, R), LSE (Hq, T)."""
    assert t.cu_seqlens_q is not None
    assert t.seqused_k is not None
    assert t.block_table is not None
    q = q.contiguous()
    tokens, heads, _ = q.shape
    batch, page = t.block_table.shape[0], kv_cache.shape[1]
    out = q.new_empty(tokens, heads, head_dim_v)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    if out.numel() == 0 or batch == 0:
        return out.zero_(), lse.fill_(-math.inf)
    m_tiles = triton.cdiv(t.max_seqlen_q * heads, ROWS.value)
    parts = parts or max(1, num_processors(q.device) // m_tiles)
    num_rows = m_tiles * ROWS.value
    partial_out = torch.empty(2 * parts * num_rows * head_dim_v, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(2 * parts * num_rows, dtype=torch.float32, device=q.device)
    pieces = torch.empty(2 * batch, dtype=torch.int32, device=q.device)
    group = min(page, BLOCK.value)
    mla_decode_kernel[(parts * m_tiles,)](
        _descriptor(kv_cache, group, HALF.value if group == BLOCK.value else 64),
        _descriptor(kv_cache, group, 64),
        q, out, lse, partial_out, partial_lse, pieces, t.seqused_k, t.cu_seqlens_q, t.block_table,
        batch, parts, m_tiles, heads, t.block_table.stride(0), kv_cache.stride(0) // kv_cache.stride(1), lse.stride(0),
        num_rows, spec.softmax_scale * LOG2E.value,
        PAGE=page, GROUP=group, LATE=late, OVERHEAD=overhead,
        BLOCK_B=min(max(32, triton.next_power_of_2(batch)), 1024), REGS_L=160, REGS=160,
        num_warps=4, maxnreg=168,
    )  # fmt: skip
    sizes = (batch, 1, t.max_seqlen_q, num_rows)
    combine(out, lse, (partial_out, partial_lse, pieces), t, pdl, sizes, (0, lse.stride(0)))
    return out, lse
