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
from functools import lru_cache
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

from octavo.kernels.hopper.descriptors import WRAP, ragged_descriptor
from octavo.kernels.hopper.gluon_compat import (
    reinterpret,
    scale_unless_one,
    tma_load,
    wait_for_earlier_kernel,
    warps_sync,
)
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor
from octavo.kernels.triton.decode_launch import Launch, combine_launch, scratch_of
from octavo.kernels.triton.early_launch import early_launch_options
from octavo.kernels.triton.flash_fwd import num_processors
from octavo.kernels.triton.launch import integer_key

LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
LAG = gl.constexpr(8.0)  # powers of two by which the row maximum may outgrow its reference
ROWS = gl.constexpr(64)  # query rows of one thread block: the M of wgmma
BLOCK = gl.constexpr(64)  # tokens of one block
HALF = gl.constexpr(256)  # columns of the latent that one warpgroup accumulates
ROPE = gl.constexpr(64)
WIDTH = gl.constexpr(576)  # of a latent with its rotary part
STAGES = gl.constexpr(3)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _costs(b, batch, capacity, seqused):
    """Units of work of sequences `b`: their blocks, and one for an empty sequence, so that each is visited."""
    keys = gl.minimum(gl.load(seqused + b, mask=b < batch, other=0), capacity)
    return gl.where(b < batch, gl.maximum(gl.cdiv(keys, BLOCK), 1), 0)


@gluon.jit
def share_of_part(part, parts, batch, capacity, seqused, BLOCK_B: gl.constexpr):
    """(first unit of this part, one past its last, units a part, the sequence it begins in, that one's first unit)."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    total = 0
    longest = 1
    for b0 in range(0, batch, BLOCK_B):
        cost = _costs(b0 + gl.arange(0, BLOCK_B, layout), batch, capacity, seqused)
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
        cost = _costs(index, batch, capacity, seqused)
        passed = (before + gl.associative_scan(cost, 0, _add) <= begin) & (index < batch)
        b += gl.sum(passed.to(gl.int32), axis=0)
        start += gl.sum(gl.where(passed, cost, 0), axis=0)
        before += gl.sum(cost, axis=0)
    return begin, gl.minimum(begin + share, total), share, b, start


@gluon.jit
def piece(unit, unit_end, start, length):
    """Of the sequence that begins at unit `start`: (its last unit + 1, blocks [lo, hi) of it in this part)."""
    blocks = gl.cdiv(length, BLOCK)
    end = start + gl.maximum(blocks, 1)
    return end, unit - start, gl.minimum(gl.minimum(unit_end, end) - start, blocks)


@gluon.jit
def load_columns(row, left, desc, column, full, smem, g: gl.constexpr, GROUP: gl.constexpr):
    """Load GROUP rows of one page, the g-th of a block, into their place in smem; those from the `left`-th on as zeros.

    The descriptor is a `ragged_descriptor`.
    """
    if GROUP == BLOCK:
        tma_load(desc, [WRAP, row + left, WRAP - left, column], full, smem)
    else:
        chunks: gl.constexpr = smem.shape[-1] // 64
        tiles = reinterpret(smem, [BLOCK // GROUP * chunks, 1, 1, GROUP, 64], desc.layout)
        for c in gl.static_range(chunks):
            at = [WRAP, row + left, WRAP - left, column + c * 64]
            tma_load(desc, at, full, tiles.index(c * (BLOCK // GROUP) + g))


@gluon.jit
def load_block(
    n, stage, length, table, page_rows, desc, smem, full,
    COLUMN: gl.constexpr, PAGE: gl.constexpr, GROUP: gl.constexpr, ENDS: gl.constexpr,
):  # fmt: skip
    """Load the columns from COLUMN of block n into a stage of smem; where the sequence ENDS in it, zeros follow."""
    mbarrier.expect(full.index(stage), 2 * BLOCK * smem.shape[-1])
    for g in gl.static_range(BLOCK // GROUP):
        left = GROUP
        if ENDS:
            left = length - n * BLOCK - g * GROUP
        if PAGE <= BLOCK:
            row = gl.load(table + n * (BLOCK // GROUP) + g, mask=left > 0, other=0) * page_rows
        else:
            row = gl.load(table + n // (PAGE // BLOCK)) * page_rows + n % (PAGE // BLOCK) * BLOCK
        load_columns(row, left, desc, COLUMN, full.index(stage), smem.index(stage), g, GROUP)


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
    n, stop, index, sent, q, top, l, scale, last, kv_smem, factor_smem, bars,
    MASK: gl.constexpr,
):  # fmt: skip
    """Blocks n, n - 1, …, stop: P, in the place of the rotary part, and its factor to the other warpgroups."""
    q_left, q_right0, q_right1, q_right2, q_rest = q
    left_smem, right_smem, rope_smem = kv_smem
    left_full, right_full, rope_full, p_full, p_empty = bars
    right = reinterpret(right_smem, [4 * STAGES, BLOCK, 64], q_rest.layout)
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
        s = warpgroup_mma_wait(0, [s])
        warps_sync()
        p, top, l, alpha = softmax_block(s, top, l, scale, n, last, MASK)
        mbarrier.wait(p_empty.index(slot), ((sent // 2) & 1) ^ 1)
        rope_smem.index(pair).reshape([ROWS, BLOCK]).store(p.to(rope_smem.dtype))
        factor_smem.index(slot).store(alpha)
        fence_async_shared()
        mbarrier.arrive(p_full.index(slot), count=1)
        index += 1
        sent += 1
        n -= 1
    return n, index, sent, top, l


@gluon.jit
def load_queries(first_row, m_tile, num_rows, q_smem, LAYOUT: gl.constexpr):
    """Q of one tile: columns 0–255, 256–319, 320–383 and 384–447 in registers, the other 128 in shared memory."""
    row = m_tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    rows = (first_row + row.to(gl.int64) * WIDTH)[:, None]
    used = (row < num_rows)[:, None]
    left = gl.load(rows + gl.arange(0, HALF, gl.SliceLayout(0, LAYOUT))[None, :], mask=used, other=0.0)
    column = HALF + gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))[None, :]
    right0 = gl.load(rows + column, mask=used, other=0.0)
    right1 = gl.load(rows + column + 64, mask=used, other=0.0)
    right2 = gl.load(rows + column + 128, mask=used, other=0.0)
    coalesced: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = m_tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, coalesced))
    rows = (first_row + row.to(gl.int64) * WIDTH)[:, None]
    used = (row < num_rows)[:, None]
    column = WIDTH - 128 + gl.arange(0, 64, gl.SliceLayout(0, coalesced))[None, :]
    for k in gl.static_range(2):
        q_smem.index(k).store(gl.load(rows + column + 64 * k, mask=used, other=0.0))
    fence_async_shared()
    warps_sync()
    return left, right0, right1, right2, q_smem


@gluon.jit
def scores(
    q_ptr,
    seqused,
    capacity,
    cu_q,
    q_smem,
    top_smem,
    factor_smem,
    kv_smem,
    bars,
    unit,
    unit_end,
    b,
    start,
    heads,
    scale,
    m_tile,
):
    """The first warpgroup: scores and softmax; at the end of a piece the rows' sums and reference exponents."""
    p_full, p_empty = bars[3], bars[4]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
    index = 0
    sent = 0
    while unit < unit_end:
        length = gl.minimum(gl.load(seqused + b), capacity)
        end, lo, hi = piece(unit, unit_end, start, length)
        start_q = gl.load(cu_q + b)
        len_q = gl.load(cu_q + b + 1) - start_q
        first_row = q_ptr + start_q.to(gl.int64) * heads * WIDTH
        q = load_queries(first_row, m_tile, len_q * heads, q_smem, Q_LAYOUT)
        row = m_tile * ROWS + gl.arange(0, ROWS, ROW)
        last = length - len_q + row // heads
        clear = gl.minimum(gl.maximum((length - len_q + 1 + m_tile * ROWS // heads) // BLOCK, lo), hi)
        top = gl.full([ROWS], float("-inf"), gl.float32, ROW)
        l = sum_within_threads(gl.full([ROWS, BLOCK], 0.0, gl.float32, S_LAYOUT))
        n = hi - 1
        for MASK in gl.static_range(1, -1, -1):
            n, index, sent, top, l = score_blocks(
                n, clear if MASK else lo, index, sent, q, top, l, scale, last, kv_smem, factor_smem, bars,
                MASK == 1,
            )  # fmt: skip
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
def note_pieces(notes, part, b, at, count, BY_SEQUENCE: gl.constexpr):
    """As `decode_launch.note_pieces`."""
    entry = notes + 4 * (b if BY_SEQUENCE else part)
    gl.store(entry, at)
    gl.store(entry + 1, count)
    gl.store(entry + 2, b)


@gluon.jit
def write_piece(o, total, top, at, b, outputs, cu_q, sizes, m_tile, SIDE: gl.constexpr):
    """Write the columns of one side, and the LSE with the left one: as they are, or as piece `at` (-1: it is whole)."""
    out_ptr, lse_ptr, partial_out, partial_lse = outputs
    heads, lse_stride, num_rows = sizes
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
def accumulate(  # noqa: PLR0915 (one loop of one warpgroup)
    outputs, notes, seqused, capacity, cu_q, cache, kv_smem, full, rope_smem, rope_full, factor_smem, top_smem, bars,
    unit, unit_end, b, start, share, part, sizes, m_tile,
    SIDE: gl.constexpr, PAGE: gl.constexpr, GROUP: gl.constexpr, BY_SEQUENCE: gl.constexpr,
):  # fmt: skip
    """The second and third warpgroup: one half of the output's columns."""
    latent_desc, rope_desc, block_table, table_stride, page_rows = cache
    p_full, p_empty = bars
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    index = 0
    sent = 0
    while unit < unit_end:
        length = gl.minimum(gl.load(seqused + b), capacity)
        end, lo, hi = piece(unit, unit_end, start, length)
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
            o = scale_unless_one(o, factor_smem.index(slot).load(ROW)[:, None])
            mbarrier.wait(full.index(stage), (index // STAGES) & 1)
            p = rope_smem.index(index % 2).reshape([ROWS, BLOCK])
            o = warpgroup_mma(p, kv_smem.index(stage).reshape([BLOCK, HALF]), o, is_async=True)
            o = warpgroup_mma_wait(0, [o])
            warps_sync()
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
        if unit == start:
            if (SIDE == 0) & (BY_SEQUENCE or unit_end < end):
                note_pieces(notes, part, b, at, (end - 1) // share - part + 1, BY_SEQUENCE)
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


@gluon.jit(
    do_not_specialize=["batch", "parts", "m_tiles", "table_stride", "lse_stride", "num_rows", "capacity"],
    do_not_specialize_on_alignment=["seqused", "cu_q", "block_table"],
)
def mla_decode_kernel(
    latent_desc, rope_desc, q_ptr, out_ptr, lse_ptr, scratch, seqused, cu_q, block_table,
    batch, parts, m_tiles, heads, table_stride, page_rows, lse_stride, num_rows, capacity, at_lse, at_out, scale,
    PAGE: gl.constexpr, GROUP: gl.constexpr, BY_SEQUENCE: gl.constexpr, BLOCK_B: gl.constexpr, REGS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = latent_desc.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    column: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    left_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK, HALF], latent_desc.layout)
    right_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK, HALF], latent_desc.layout)
    rope_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK, ROPE], latent_desc.layout)  # and P, once multiplied
    q_smem = gl.allocate_shared_memory(dtype, [2, ROWS, 64], flat)
    factor_smem = gl.allocate_shared_memory(gl.float32, [2, ROWS], column)
    top_smem = gl.allocate_shared_memory(gl.float32, [2, ROWS], column)
    left_full = barriers(STAGES, 1)
    right_full = barriers(STAGES, 1)
    rope_full = barriers(2, 1)
    p_full = barriers(2, 1)
    p_empty = barriers(2, 2)
    if PDL:
        wait_for_earlier_kernel(batch)
    part = gl.program_id(0) // m_tiles
    m_tile = gl.program_id(0) % m_tiles
    notes = scratch.to(gl.pointer_type(gl.int32), bitcast=True)
    if not BY_SEQUENCE and m_tile == 0:
        note_pieces(notes, part, 0, 0, 0, False)
    begin, unit_end, share, b, start = share_of_part(part, parts, batch, capacity, seqused, BLOCK_B)
    outputs = (out_ptr, lse_ptr, scratch + at_out, scratch + at_lse)
    sizes = (heads, lse_stride, num_rows)
    cache = (latent_desc, rope_desc, block_table, table_stride, page_rows)
    gl.warp_specialize(
        [
            (scores, (q_ptr, seqused, capacity, cu_q, q_smem, top_smem, factor_smem, (left_smem, right_smem, rope_smem),
                      (left_full, right_full, rope_full, p_full, p_empty), begin, unit_end, b, start, heads, scale,
                      m_tile)),
            (accumulate, (outputs, notes, seqused, capacity, cu_q, cache, left_smem, left_full, rope_smem, rope_full,
                          factor_smem, top_smem, (p_full, p_empty), begin, unit_end, b, start, share, part, sizes,
                          m_tile, 0, PAGE, GROUP, BY_SEQUENCE)),
            (accumulate, (outputs, notes, seqused, capacity, cu_q, cache, right_smem, right_full, rope_smem, rope_full,
                          factor_smem, top_smem, (p_full, p_empty), begin, unit_end, b, start, share, part, sizes,
                          m_tile, 1, PAGE, GROUP, BY_SEQUENCE)),
        ],
        [4, 4],
        [REGS, REGS],
    )  # fmt: skip


REGISTERS = 160  # a thread of the two output warpgroups: ptxas refuses fewer beside 64 × 256 accumulators
MAX_REGISTERS = 168  # of all on average; the scores' warpgroup gets what the two leave: 184
MAX_ROWS = 1024  # query rows (tokens × heads) of a sequence; above it a kernel for prefill serves better
_DTYPES = (torch.float16, torch.bfloat16)
_UNSUPPORTED = ("seqused_q", "leftpad_k", "learnable_sink", "alibi_slopes", "k_scale")


def refuses_mla_decode(
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
    given = [name for name in _UNSUPPORTED if getattr(t, name) is not None]
    return f"it does not take {', '.join(given)}" if given else None


_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


def _descriptor(cache: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Boxes of rows and columns of the cache, seen as one run of rows."""
    shape, strides = [cache.shape[0] * cache.shape[1], cache.shape[2]], [cache.stride(1), 1]
    return ragged_descriptor(cache, shape, strides, [rows, columns], _LAYOUT)


class LatentCall(NamedTuple):
    """All of a call but its numbers."""

    device: torch.device
    dtype: torch.dtype
    q_shape: tuple[int, ...]
    cache_shape: tuple[int, ...]
    cache_strides: tuple[int, ...]
    table_shape: tuple[int, ...]
    table_stride: int
    max_q: int
    softmax_scale: float
    aligned: bool  # q begins on 16 bytes


class LatentPlan(NamedTuple):
    """The two launches of a call, and what they need."""

    decode: Launch
    combine: Launch
    boxes: tuple[int, int]  # rows of a TMA box, and columns of one of the latent
    m_tiles: int
    parts: int
    scratch_size: int


@lru_cache(maxsize=4096)
def _plan(call: LatentCall) -> LatentPlan:
    tokens, heads, _ = call.q_shape
    batch, page = call.table_shape[0], call.cache_shape[1]
    block_stride, stride = call.cache_strides[:2]
    m_tiles = max(1, triton.cdiv(call.max_q * heads, ROWS.value))
    parts = max(1, num_processors(call.device) // m_tiles)
    num_rows = m_tiles * ROWS.value
    scratch = scratch_of(batch, parts, num_rows, 2 * HALF.value)
    group = min(page, BLOCK.value)
    early = early_launch_options(call.device)["PDL"]
    capacity = min(call.table_shape[1] * page, 2**31 - 1)
    page_rows = block_stride // stride
    scalars = (
        batch, parts, m_tiles, heads, call.table_stride, page_rows, tokens, num_rows, capacity,
        scratch.at_lse, scratch.at_out, call.softmax_scale * LOG2E.value,
    )  # fmt: skip
    constants = (
        ("PAGE", page), ("GROUP", group), ("BY_SEQUENCE", scratch.by_sequence),
        ("BLOCK_B", 128 if batch <= 128 else 1024), ("REGS", REGISTERS), ("PDL", early),
    )  # fmt: skip
    key = (call.dtype, call.aligned, integer_key((heads, page_rows)))
    options = {"num_warps": 4, "maxnreg": MAX_REGISTERS, "launch_pdl": early}
    decode = Launch(mla_decode_kernel, parts * m_tiles, scalars, constants, key, options)
    shape, strides = (tokens, heads, 2 * HALF.value), (heads * 2 * HALF.value, 2 * HALF.value, 0, tokens)
    sizes = (batch, 1, call.max_q, num_rows)
    # not launched early: that costs 7 µs at 1 × 32768 and gains nothing elsewhere
    combine = combine_launch(call.dtype, shape, strides, True, False, sizes, scratch)
    boxes = (group, HALF.value if group == BLOCK.value else 64)
    return LatentPlan(decode, combine, boxes, m_tiles, parts, scratch.size)


def _plan_of(q: Tensor, kv_cache: Tensor, spec: AttentionSpec, t: AttentionTensors) -> LatentPlan:
    assert t.block_table is not None
    return _plan(
        LatentCall(
            q.device, q.dtype, q.shape, kv_cache.shape, kv_cache.stride(), t.block_table.shape, t.block_table.stride(0),
            t.max_seqlen_q, spec.softmax_scale, q.data_ptr() % 16 == 0,
        )
    )  # fmt: skip


def plan_mla_decode(
    q: Tensor, kv_cache: Tensor, head_dim_v: int, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> dict[str, object]:
    """What `octavo.explain` shows of a call."""
    plan = _plan_of(q, kv_cache, spec, t)
    return {"tile": f"{ROWS.value} rows × {BLOCK.value} tokens", "parts": plan.parts, "tiles of rows": plan.m_tiles}


def mla_decode(
    q: Tensor, kv_cache: Tensor, head_dim_v: int, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> tuple[Tensor, Tensor]:
    """q (T, Hq, R + rope) packed, kv_cache (num_blocks, block_size, R + rope) → out (T, Hq, R), LSE (Hq, T)."""
    assert t.block_table is not None
    q = q.contiguous()
    tokens, heads, _ = q.shape
    out = torch.empty((tokens, heads, head_dim_v), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or t.block_table.shape[0] == 0:
        return out.zero_(), lse.fill_(-math.inf)
    plan = _plan_of(q, kv_cache, spec, t)
    scratch = torch.empty(plan.scratch_size, dtype=torch.float32, device=q.device)
    rows, columns = plan.boxes
    descriptors = (_descriptor(kv_cache, rows, columns), _descriptor(kv_cache, rows, 64))
    plan.decode(*descriptors, q, out, lse, scratch, t.seqused_k, t.cu_seqlens_q, t.block_table)
    plan.combine(out, lse, t.cu_seqlens_q, scratch)
    return out, lse
