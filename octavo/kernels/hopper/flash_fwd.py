"""FlashAttention forward for Hopper (sm_90), in Gluon: dense, varlen, paged, GQA, causal, window, softcap, sinks.

One thread block holds a producer (the default partition: TMA only) and NUM_WG consumer warpgroups of 64 query rows
each. The producer keeps a ring of key and value blocks full; each consumer runs, for key block i,

    issue S(i) = Q·K(i)ᵀ  →  issue O += P(i-1)·V(i-1)  →  softmax of S(i) while that product runs  →  pack P(i)

and hands the tensor cores to the next warpgroup right after issuing, so that its softmax runs under the other's
products. P never leaves the registers. Key blocks are walked from the last to the first: the masked ones (the end of
the sequence, the diagonal) come first and those after them need no mask. Thread blocks are persistent: a counter hands
out query tiles, the longest first, and the next tile's queries load while the last one's output is written.

Long calls are bound by the card's power, so the design saves instructions and shared-memory reads: Q is read into
registers once where they hold it, the output is rescaled only when a row's maximum has outgrown its reference 2^8
times, sums over a row stay within a thread until the end, and P is carried packed.

Rows of ragged (varlen) sequences are addressed so that TMA itself cuts at the end of each sequence, see `box_at`.
Keys and values may lie in the pages of a cache (`paged_prefill`): then a block comes in boxes of up to one page.
`docs/kernels/hopper_flash_fwd.md` draws the schedule and lists what was measured.
"""

import functools
import math
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.hopper.descriptors import WRAP, make_descriptor, ragged_descriptor
from octavo.kernels.hopper.gluon_compat import (
    FIRST_BARRIER,
    KEEPS_LOOP_OPERANDS,
    barrier_arrive,
    barrier_sync,
    barrier_sync_if,
    finish_before_next_wait,
    pack_pairs,
    reinterpret,
    scale_unless_one,
    tanh,
    tma_load,
    tma_store,
    tma_store_wait,
    unpack_pairs,
)
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor
from octavo.kernels.triton.launch import launch, pointer_key

LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
WG_ROWS = gl.constexpr(64)  # query rows of one warpgroup: the M of wgmma
LAG = gl.constexpr(8.0)  # powers of two by which the row maximum may outgrow its reference
# named barriers: up to 4 warpgroups' turns at the tensor cores, and up to 3 stages of the ring that they have left
TURN = gl.constexpr(FIRST_BARRIER)
K_EMPTY = gl.constexpr(FIRST_BARRIER + 4)
V_EMPTY = gl.constexpr(FIRST_BARRIER + 7)


# --------------------------------------------------------------------------------------------- what a tile is


@gluon.jit
def tile_place(tile, grid, lengths, ROWS: gl.constexpr, VARLEN: gl.constexpr):
    """Tile number → (query block, query head, batch).

    (batch, head) pairs are taken in sections whose keys and values fit the L2 together; in a section the last query
    blocks, which are the longest when causal, go first.
    """
    num_m, heads, pairs, section, batches = grid
    index = tile // (section * num_m)
    rest = tile - index * section * num_m
    width = gl.minimum(section, pairs - index * section)
    pair = index * section + rest % width
    m_block = num_m - 1 - rest // width
    batch = pair // heads
    if VARLEN:
        batch, m_block = find_sequence(m_block, lengths[0], batches, ROWS)
    return m_block, pair % heads, batch


@gluon.jit
def sequence(batch, lengths, VARLEN: gl.constexpr, PAGE: gl.constexpr):
    """First query row, first key row, and their numbers, of one sequence; paged, `cu_k` holds the numbers of keys."""
    cu_q, cu_k, len_q, len_k = lengths
    start_q = 0
    start_k = 0
    if VARLEN:
        start_q = gl.load(cu_q + batch)
        len_q = gl.load(cu_q + batch + 1) - start_q
    if PAGE:
        len_k = gl.load(cu_k + batch)
    elif VARLEN:
        start_k = gl.load(cu_k + batch)
        len_k = gl.load(cu_k + batch + 1) - start_k
    return start_q, start_k, len_q, len_k


@gluon.jit
def find_sequence(block, cu_q, batch, ROWS: gl.constexpr):
    """(sequence, query block in it) of a numbering in which sequence b begins at cu_q[b] // ROWS + b."""
    low = block * 0
    high = low + batch
    while high - low > 1:
        middle = (low + high) // 2
        if gl.load(cu_q + middle) // ROWS + middle <= block:
            low = middle
        else:
            high = middle
    return low, block - gl.load(cu_q + low) // ROWS - low


@gluon.jit
def key_blocks(
    row, len_q, len_k, window, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, RIGHT: gl.constexpr, LEFT: gl.constexpr
):
    """Key blocks [begin, end) that query rows [row, row + ROWS) see; of them [clear_begin, clear_end) need no mask."""
    left, right = window
    row += len_k - len_q  # masks align bottom-right
    end = len_k
    clear = len_k
    begin = 0
    clear_begin = 0
    if RIGHT:
        end = gl.minimum(end, row + ROWS + right)
        clear = gl.minimum(clear, row + right + 1)
    if LEFT:
        begin = gl.maximum(row - left, 0) // BLOCK_N
        clear_begin = gl.cdiv(gl.maximum(row + ROWS - 1 - left, 0), BLOCK_N)
    return begin, gl.cdiv(gl.maximum(end, 0), BLOCK_N), clear_begin, gl.maximum(clear, 0) // BLOCK_N


@gluon.jit
def visible_keys(row, len_q, len_k, window, RIGHT: gl.constexpr, LEFT: gl.constexpr):
    """First and last key that each of the query rows `row` sees."""
    left, right = window
    row += len_k - len_q
    first = row - left if LEFT else row
    last = gl.minimum(row + right, len_k - 1) if RIGHT else row * 0 + (len_k - 1)
    return first, last


@gluon.jit
def box_at(batch, start, length, row, head, VARLEN: gl.constexpr):
    """TMA coordinates of the box from `row` of a sequence on; past the sequence's end TMA reads 0 and writes nothing.

    Dense descriptors have the axes (batch, row, head, dim). Ragged ones have three axes for the row over the same
    buffer: the third ends at WRAP, so that starting it at WRAP - (rows left) makes the hardware cut at the end of the
    sequence; the second steps to where the sequence ends; and the first, at WRAP, takes WRAP rows back, as its stride
    times WRAP is a multiple of 2^64 less WRAP rows (`descriptors.ragged_descriptor`).
    """
    if VARLEN:
        return WRAP, start + length, WRAP - length + row, head, 0
    else:
        return batch, row, head, 0


@gluon.jit
def allocate_boxes(desc, N: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, VARLEN: gl.constexpr):
    """Shared memory for N blocks of rows, in the axes of their descriptor."""
    if VARLEN:
        return gl.allocate_shared_memory(desc.dtype, [N, 1, 1, ROWS, 1, COLUMNS], desc.layout)
    else:
        return gl.allocate_shared_memory(desc.dtype, [N, 1, ROWS, 1, COLUMNS], desc.layout)


@gluon.jit
def as_rows(box):
    """The block (rows, columns) that a box in shared memory holds."""
    return box.reshape([box.shape[-3], box.shape[-1]])


# --------------------------------------------------------------------------------------------- producer


@gluon.constexpr_function
def ring_threads(num_wg, pager):
    """Threads that meet at a barrier of the ring: the consumers and whoever fills it."""
    return 128 * num_wg + (32 if pager else 128)


@gluon.jit
def load_block(
    desc, coord, index, smem, full, EMPTY: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Load ring entry `index` once every consumer has left the one before it in the same stage."""
    stage = index % STAGES
    barrier_sync_if(index >= STAGES, EMPTY + stage, RING)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    tma_load(desc, coord, full.index(stage), smem.index(stage))


@gluon.jit
def first_rows_of_pages(table, block, len_k, desc, BLOCK_N: gl.constexpr, PAGE: gl.constexpr):
    """Rows of the cache at which the boxes of a block of keys begin, all looked up before the first is waited for."""
    ROWS: gl.constexpr = desc.block_type.shape[-3]
    rows = ()
    for piece in gl.static_range(BLOCK_N // ROWS):
        key = block * BLOCK_N + piece * ROWS
        page = gl.load(table + key // PAGE, mask=key < len_k, other=0)
        rows = rows + (page * PAGE + key % PAGE,)  # type: ignore[assignment]  # noqa: RUF005 (Triton cannot unpack)
    return rows


@gluon.jit
def load_pages(
    desc, rows, length, head, index, smem, full, EMPTY: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """`load_block` out of a paged cache: boxes of up to one page and 64 columns, which together are the block.

    Keys from `length` on, in pages that may hold anything, come as zeros.
    """
    ROWS: gl.constexpr = desc.block_type.shape[-3]
    PIECES: gl.constexpr = smem.shape[-3] // ROWS
    PANELS: gl.constexpr = smem.shape[-1] // 64
    stage = index % STAGES
    barrier_sync_if(index >= STAGES, EMPTY + stage, RING)
    mbarrier.expect(full.index(stage), PIECES * PANELS * desc.block_type.nbytes)
    boxes = reinterpret(smem.index(stage), [PANELS * PIECES, 1, 1, ROWS, 1, 64], desc.layout)
    for piece in gl.static_range(PIECES):
        left = length - piece * ROWS
        for panel in gl.static_range(PANELS):
            box = boxes.index(panel * PIECES + piece)
            tma_load(desc, [WRAP, rows[piece] + left, WRAP - left, head, panel * 64], full.index(stage), box)


@gluon.jit
def load_all_pages(
    descs, smem, bars, begin, end, index, batch, head, len_k, pages,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Load the key and value blocks [begin, end) of a tile out of a paged cache, last block first."""
    _q_desc, k_desc, v_desc = descs
    _q_smem, k_smem, v_smem, _o_smem, _tiles = smem
    _q_full, _q_empty, k_full, v_full, _tile_full, _tile_empty = bars
    table, table_stride = pages
    row_table = table + batch.to(gl.int64) * table_stride
    for n in range(begin, end):
        block = begin + end - 1 - n
        rows = first_rows_of_pages(row_table, block, len_k, k_desc, BLOCK_N, PAGE)
        keys = len_k - block * BLOCK_N
        load_pages(k_desc, rows, keys, head, index, k_smem, k_full, K_EMPTY, STAGES, RING)
        load_pages(v_desc, rows, keys, head, index, v_smem, v_full, V_EMPTY, STAGES, RING)
        index += 1
    return index


@gluon.jit
def publish(tile, turn, tiles, full, empty):
    """Tell the consumers which tile is next."""
    slot = turn % 2
    mbarrier.wait(empty.index(slot), ((turn // 2) & 1) ^ 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    tiles.index(slot).store(gl.full([1], 0, gl.int32, layout) + tile)
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def produce(
    descs, smem, bars, grid, lengths, window, num_tiles, group, counter, pages,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, NUM_WG: gl.constexpr, RIGHT: gl.constexpr, LEFT: gl.constexpr,
    VARLEN: gl.constexpr, PAGE: gl.constexpr, PAGER: gl.constexpr, DYNAMIC: gl.constexpr,
):  # fmt: skip
    """Load the queries of one tile after another and, unless in pages, their key and value blocks, last block first."""
    q_desc, k_desc, v_desc = descs
    q_smem, k_smem, v_smem, _o_smem, tiles = smem
    q_full, q_empty, k_full, v_full, tile_full, tile_empty = bars
    ROWS: gl.constexpr = WG_ROWS * NUM_WG
    RING: gl.constexpr = ring_threads(NUM_WG, PAGER)
    index = 0
    turn = 0
    loaded = 0
    tile = gl.program_id(0)
    while tile < num_tiles:
        publish(tile, turn, tiles, tile_full, tile_empty)
        m_block, head, batch = tile_place(tile, grid, lengths, ROWS, VARLEN)
        start_q, start_k, len_q, len_k = sequence(batch, lengths, VARLEN, PAGE)
        row = m_block * ROWS
        if row < len_q:
            begin, end, _, _ = key_blocks(row, len_q, len_k, window, ROWS, BLOCK_N, RIGHT, LEFT)
            for wg in gl.static_range(NUM_WG):
                mbarrier.wait(q_empty.index(wg), (loaded & 1) ^ 1)
                mbarrier.expect(q_full.index(wg), q_desc.block_type.nbytes)
                coord = box_at(batch, start_q, len_q, row + wg * WG_ROWS, head, VARLEN)
                tma_load(q_desc, coord, q_full.index(wg), q_smem.index(wg))
            loaded += 1
            if PAGE and not PAGER:
                index = load_all_pages(
                    descs, smem, bars, begin, end, index, batch, head // group, len_k, pages,
                    BLOCK_N, STAGES, RING, PAGE,
                )  # fmt: skip
            elif not PAGE:
                for n in range(begin, end):
                    block = begin + end - 1 - n
                    coord = box_at(batch, start_k, len_k, block * BLOCK_N, head // group, VARLEN)
                    load_block(k_desc, coord, index, k_smem, k_full, K_EMPTY, STAGES, RING)
                    load_block(v_desc, coord, index, v_smem, v_full, V_EMPTY, STAGES, RING)
                    index += 1
        turn += 1
        if DYNAMIC:
            tile = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
        else:
            tile += gl.num_programs(0)
    publish(num_tiles, turn, tiles, tile_full, tile_empty)


@gluon.jit
def produce_pages(
    descs, smem, bars, grid, lengths, window, num_tiles, group, pages,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, NUM_WG: gl.constexpr, RIGHT: gl.constexpr, LEFT: gl.constexpr,
    PAGE: gl.constexpr, PAGER: gl.constexpr,
):  # fmt: skip
    """Load the key and value blocks of one tile after another out of a paged cache: a partition of one warp.

    Between two boxes for one stage Triton has the partition's warps wait for each other; four warps took longer over
    that than the products over the block.
    """
    _q_smem, _k_smem, _v_smem, _o_smem, tiles = smem
    _q_full, _q_empty, _k_full, _v_full, tile_full, tile_empty = bars
    ROWS: gl.constexpr = WG_ROWS * NUM_WG
    RING: gl.constexpr = ring_threads(NUM_WG, PAGER)
    index, turn = 0, 0
    tile = next_tile(turn, tiles, tile_full, tile_empty)
    while tile < num_tiles:
        m_block, head, batch = tile_place(tile, grid, lengths, ROWS, True)
        _start_q, _start_k, len_q, len_k = sequence(batch, lengths, True, PAGE)
        if m_block * ROWS < len_q:
            begin, end, _, _ = key_blocks(m_block * ROWS, len_q, len_k, window, ROWS, BLOCK_N, RIGHT, LEFT)
            index = load_all_pages(
                descs, smem, bars, begin, end, index, batch, head // group, len_k, pages,
                BLOCK_N, STAGES, RING, PAGE,
            )  # fmt: skip
        turn += 1
        tile = next_tile(turn, tiles, tile_full, tile_empty)


# --------------------------------------------------------------------------------------------- consumers


@gluon.jit
def next_tile(turn, tiles, full, empty):
    slot = turn % 2
    mbarrier.wait(full.index(slot), (turn // 2) & 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    tile = gl.sum(tiles.index(slot).load(layout), axis=0)
    mbarrier.arrive(empty.index(slot), count=1)
    return tile


@gluon.jit
def sum_within_threads(p):
    """Row sums of p (rows, n) as far as one thread holds a row: (rows, 4), a quarter for each thread of a quad."""
    p = gl.reshape(p, [p.shape[0], p.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(p, axis=3), axis=1)


@gluon.jit
def softmax_block(
    s, top, l, scale, cap, n, visible,
    MASK: gl.constexpr, LEFT: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """exp2 of one block of scores: (P in fp32, reference exponent, sums, factor for what came before).

    P is relative to 2^top. `top` follows the row maximum only when that has outgrown it by 2^LAG, so that the factor is
    nearly always exactly 1 and the output needs no rescaling: P stays below 2^LAG, which fp32 sums and the 16-bit P
    hold as well as numbers below 1.
    """
    if SOFTCAP:
        s = tanh(s * cap)
    if MASK:
        first, last = visible
        col = n * s.shape[1] + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
        keep = col[None, :] <= last[:, None]
        if LEFT:
            keep = keep & (col[None, :] >= first[:, None])
        s = gl.where(keep, s, float("-inf"))
    highest = gl.max(s, axis=1) * scale
    top_new = gl.where(highest > top + LAG, highest, top)
    shift = top_new
    if MASK:
        shift = gl.where(top_new == float("-inf"), 0.0, top_new)
    p = gl.exp2(s * scale - shift[:, None])
    alpha = gl.exp2(top - shift)
    sums = sum_within_threads(p)
    if l is None:
        l = sums
    else:
        l = l * rows_as(alpha, sums) + sums
    return p, top_new, l, alpha


@gluon.jit
def rows_as(x, like):
    """x (rows,) as a column in the layout of `like`."""
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def issue_scores(
    q, index, k_smem, k_full, wg: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, S_LAYOUT: gl.constexpr
):
    """Start Q·Kᵀ of ring entry `index`, once this warpgroup has its turn at the tensor cores.

    Of 256 columns the last 64 may be left out: with DEPTH 192 they hold zeros.
    """
    stage = index % STAGES
    k = as_rows(k_smem.index(stage))
    mbarrier.wait(k_full.index(stage), (index // STAGES) & 1)
    barrier_sync(TURN + wg, 256)
    zero = gl.full([WG_ROWS, k.shape[0]], 0.0, gl.float32, S_LAYOUT)
    if k.shape[1] == DEPTH:
        return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    else:
        q0, k0 = q.slice(0, 128, dim=1), k.slice(0, 128, dim=1)
        q1, k1 = q.slice(128, 64, dim=1), k.slice(128, 64, dim=1)
        s = warpgroup_mma(q0, k0.permute((1, 0)), zero, use_acc=False, is_async=True)
        return warpgroup_mma(q1, k1.permute((1, 0)), s, is_async=True)


@gluon.jit
def issue_values(p, o, index, v_smem, v_full, STAGES: gl.constexpr):
    """Start O += P·V of ring entry `index`."""
    stage = index % STAGES
    v = as_rows(v_smem.index(stage))
    mbarrier.wait(v_full.index(stage), (index // STAGES) & 1)
    return warpgroup_mma(p, v, o, is_async=True)


@gluon.jit
def step(
    n, index, q, top, l, o, p, scale, cap, visible, smem, bars,
    wg: gl.constexpr, NUM_WG: gl.constexpr, RING: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    MASK: gl.constexpr, LEFT: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of key block n, and the product with V of block n + 1, whose P comes in."""
    k_smem, v_smem = smem
    k_full, v_full = bars
    s = issue_scores(q, index, k_smem, k_full, wg, DEPTH, STAGES, S_LAYOUT)
    a = unpack_pairs(p, q.dtype, gl.DotOperandLayout(0, o.type.layout, 2))
    o = issue_values(a, o, index - 1, v_smem, v_full, STAGES)
    barrier_arrive(TURN + (wg + 1) % NUM_WG, 256)
    s = warpgroup_mma_wait(1, [s])
    barrier_arrive(K_EMPTY + index % STAGES, RING)
    p, top, l, alpha = softmax_block(s, top, l, scale, cap, n, visible, MASK, LEFT, SOFTCAP)
    l = finish_before_next_wait(l)
    o, a = warpgroup_mma_wait(0, [o, a])
    barrier_arrive(V_EMPTY + (index - 1) % STAGES, RING)
    return top, l, scale_unless_one(o, rows_as(alpha, o)), pack_pairs(p, q.dtype)


@gluon.jit
def walk(
    n, stop, index, q, top, l, o, p, scale, cap, visible, smem, bars,
    wg: gl.constexpr, NUM_WG: gl.constexpr, RING: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    MASK: gl.constexpr, LEFT: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Key blocks n, n - 1, …, stop; P of block n + 1 comes in unmultiplied, that of block `stop` goes out so."""
    while n >= stop:
        top, l, o, p = step(
            n, index, q, top, l, o, p, scale, cap, visible, smem, bars,
            wg, NUM_WG, RING, DEPTH, STAGES, S_LAYOUT, MASK, LEFT, SOFTCAP,
        )  # fmt: skip
        index += 1
        n -= 1
    return n, index, top, l, o, p


@gluon.jit
def normalise(top, l, head, sink_ptr, SINK: gl.constexpr):
    """(factor for O, natural-log LSE); a sink adds exp(sink) to the sum; a row that saw nothing gives 0 and -inf."""
    shrink = 1.0
    if SINK:
        sink = gl.load(sink_ptr + head).to(gl.float32) * LOG2E
        top_new = gl.maximum(top, sink)
        shrink = gl.exp2(top - top_new)
        l = l * shrink + gl.exp2(sink - top_new)
        top = top_new
    return gl.where(l > 0, shrink / l, 0.0), gl.where(l > 0, (top + gl.log2(l)) * LN2, float("-inf"))


@gluon.jit
def pass_over(count, index, bars, wg: gl.constexpr, NUM_WG: gl.constexpr, RING: gl.constexpr, STAGES: gl.constexpr):
    """Let `count` key blocks go by that none of these rows sees, keeping the place in the ring and the turns."""
    k_full, v_full = bars
    for _ in range(count):
        stage = index % STAGES
        phase = (index // STAGES) & 1
        mbarrier.wait(k_full.index(stage), phase)
        barrier_sync(TURN + wg, 256)
        barrier_arrive(TURN + (wg + 1) % NUM_WG, 256)
        barrier_arrive(K_EMPTY + stage, RING)
        mbarrier.wait(v_full.index(stage), phase)
        barrier_arrive(V_EMPTY + stage, RING)
        index += 1
    return index


@gluon.jit
def attend(
    q, begin, end, own, index, scale, cap, visible, smem, bars,
    wg: gl.constexpr, NUM_WG: gl.constexpr, RING: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
    RIGHT: gl.constexpr, LEFT: gl.constexpr, EVEN: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Unnormalised output of 64 rows over key blocks [begin, end): (index, reference exponents, row sums, O).

    `own` is what these rows see of the blocks that the tile as a whole sees.
    """
    k_smem, v_smem = smem
    k_full, v_full = bars
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, k_smem.shape[-3], 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, v_smem.shape[-1], 16])
    top = gl.full([WG_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    o = gl.full([WG_ROWS, v_smem.shape[-1]], 0.0, gl.float32, O_LAYOUT)
    _, own_end, clear_begin, clear_end = own
    if RIGHT:
        own_end = gl.minimum(gl.maximum(own_end, begin + 1), end)
        index = pass_over(end - own_end, index, bars, wg, NUM_WG, RING, STAGES)
        end = own_end
    s = issue_scores(q, index, k_smem, k_full, wg, DEPTH, STAGES, S_LAYOUT)
    barrier_arrive(TURN + (wg + 1) % NUM_WG, 256)
    s = warpgroup_mma_wait(0, [s])
    barrier_arrive(K_EMPTY + index % STAGES, RING)
    p, top, l, _ = softmax_block(s, top, None, scale, cap, end - 1, visible, not EVEN, LEFT, SOFTCAP)
    p = pack_pairs(p, q.dtype)
    index += 1
    n = end - 2
    if RIGHT:
        n, index, top, l, o, p = walk(
            n, gl.maximum(clear_end, begin), index, q, top, l, o, p, scale, cap, visible, smem, bars,
            wg, NUM_WG, RING, DEPTH, STAGES, S_LAYOUT, True, LEFT, SOFTCAP,
        )  # fmt: skip
    n, index, top, l, o, p = walk(
        n, gl.maximum(clear_begin, begin), index, q, top, l, o, p, scale, cap, visible, smem, bars,
        wg, NUM_WG, RING, DEPTH, STAGES, S_LAYOUT, False, LEFT, SOFTCAP,
    )  # fmt: skip
    if LEFT:
        n, index, top, l, o, p = walk(
            n, begin, index, q, top, l, o, p, scale, cap, visible, smem, bars,
            wg, NUM_WG, RING, DEPTH, STAGES, S_LAYOUT, True, LEFT, SOFTCAP,
        )  # fmt: skip
    a = unpack_pairs(p, q.dtype, gl.DotOperandLayout(0, O_LAYOUT, 2))
    o = issue_values(a, o, index - 1, v_smem, v_full, STAGES)
    o, a = warpgroup_mma_wait(0, [o, a])
    barrier_arrive(V_EMPTY + (index - 1) % STAGES, RING)
    l = gl.convert_layout(gl.sum(l, axis=1), top.type.layout)
    return index, top, l, o


@gluon.jit
def write_rows(o, desc, coord, smem):
    """Start the write of a warpgroup's output; the one before it has been read out of shared memory by then."""
    tma_store_wait(0)
    as_rows(smem).store(o.to(smem.dtype))
    fence_async_shared()
    tma_store(desc, coord, smem)


@gluon.jit
def consume(
    shared,
    wg: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, NUM_WG: gl.constexpr, RIGHT: gl.constexpr,
    LEFT: gl.constexpr, VARLEN: gl.constexpr, PAGE: gl.constexpr, PAGER: gl.constexpr, EVEN: gl.constexpr,
    SOFTCAP: gl.constexpr, SINK: gl.constexpr, O_IN_Q: gl.constexpr, Q_IN_REGS: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 query rows of one tile after another."""
    o_desc, lse_ptr, sink_ptr, smem, bars, grid, lengths, window, num_tiles, scale, cap, lse_strides = shared
    q_smem, k_smem, v_smem, o_smem, tiles = smem
    q_full, q_empty, k_full, v_full, tile_full, tile_empty = bars
    ROWS: gl.constexpr = WG_ROWS * NUM_WG
    RING: gl.constexpr = ring_threads(NUM_WG, PAGER)
    DV: gl.constexpr = v_smem.shape[-1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    lse_b, lse_h = lse_strides
    q_tile = as_rows(q_smem.index(wg))
    if wg == NUM_WG - 1:
        barrier_arrive(TURN + 0, 256)  # the first warpgroup has the first turn
    index, turn, loaded = 0, 0, 0
    tile = next_tile(turn, tiles, tile_full, tile_empty)
    while tile < num_tiles:
        m_block, head, batch = tile_place(tile, grid, lengths, ROWS, VARLEN)
        start_q, _start_k, len_q, len_k = sequence(batch, lengths, VARLEN, PAGE)
        tile_row = m_block * ROWS
        if tile_row < len_q:
            first_row = tile_row + wg * WG_ROWS
            begin, end, _, _ = key_blocks(tile_row, len_q, len_k, window, ROWS, BLOCK_N, RIGHT, LEFT)
            own = key_blocks(first_row, len_q, len_k, window, WG_ROWS, BLOCK_N, RIGHT, LEFT)
            row = first_row + gl.arange(0, WG_ROWS, ROW)
            top = gl.full([WG_ROWS], float("-inf"), gl.float32, ROW)
            l = gl.full([WG_ROWS], 0.0, gl.float32, ROW)
            o = gl.full([WG_ROWS, DV], 0.0, gl.float32, O_LAYOUT)
            mbarrier.wait(q_full.index(wg), loaded & 1)
            loaded += 1
            q = q_tile
            if Q_IN_REGS:
                q = q_tile.load(gl.DotOperandLayout(0, S_LAYOUT, 2))
                fence_async_shared()
                mbarrier.arrive(q_empty.index(wg), count=1)
            if begin < end:
                index, top, l, o = attend(
                    q, begin, end, own, index, scale, cap,
                    visible_keys(row, len_q, len_k, window, RIGHT, LEFT), (k_smem, v_smem), (k_full, v_full),
                    wg, NUM_WG, RING, DEPTH, STAGES, RIGHT, LEFT, EVEN, SOFTCAP,
                )  # fmt: skip
            if not Q_IN_REGS and not O_IN_Q:
                mbarrier.arrive(q_empty.index(wg), count=1)
            factor, lse = normalise(top, l, head, sink_ptr, SINK)
            lse_row = lse_ptr + batch.to(gl.int64) * lse_b + head.to(gl.int64) * lse_h + start_q
            gl.store(lse_row + row, lse, mask=row < len_q)
            coord = box_at(batch, start_q, len_q, first_row, head, VARLEN)
            write_rows(o * rows_as(factor, o), o_desc, coord, o_smem.index(wg))
            if O_IN_Q:
                tma_store_wait(0)
                mbarrier.arrive(q_empty.index(wg), count=1)
        turn += 1
        tile = next_tile(turn, tiles, tile_full, tile_empty)
    tma_store_wait(0)


# --------------------------------------------------------------------------------------------- kernel


@gluon.jit
def barriers(N: gl.constexpr, COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit(
    do_not_specialize=[
        "table_stride", "len_q", "len_k", "num_m", "heads", "pairs", "section", "batches", "group", "left", "right",
        "num_tiles", "lse_b", "lse_h",
    ]
)  # fmt: skip
def flash_fwd_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, sink_ptr, cu_q, cu_k, table, counter,
    table_stride, len_q, len_k, num_m, heads, pairs, section, batches, group, left, right, num_tiles, scale, cap,
    lse_b, lse_h,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, NUM_WG: gl.constexpr, RIGHT: gl.constexpr, LEFT: gl.constexpr,
    VARLEN: gl.constexpr, PAGE: gl.constexpr, PAGER: gl.constexpr, EVEN: gl.constexpr, SOFTCAP: gl.constexpr,
    SINK: gl.constexpr, O_IN_Q: gl.constexpr, Q_IN_REGS: gl.constexpr, DEPTH: gl.constexpr, DYNAMIC: gl.constexpr,
    REGS: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = q_desc.block_type.shape[-1]
    DV: gl.constexpr = o_desc.block_type.shape[-1]
    q_smem = allocate_boxes(q_desc, NUM_WG, WG_ROWS, D, VARLEN)
    k_smem = allocate_boxes(k_desc, STAGES, BLOCK_N, D, VARLEN)
    v_smem = allocate_boxes(v_desc, STAGES, BLOCK_N, DV, VARLEN)
    if O_IN_Q:
        o_smem = q_smem
    else:
        o_smem = allocate_boxes(o_desc, NUM_WG, WG_ROWS, DV, VARLEN)
    tiles = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    smem = (q_smem, k_smem, v_smem, o_smem, tiles)
    bars = (
        barriers(NUM_WG, 1), barriers(NUM_WG, 1), barriers(STAGES, 1), barriers(STAGES, 1),
        barriers(2, 1), barriers(2, NUM_WG + PAGER),
    )  # fmt: skip
    grid = (num_m, heads, pairs, section, batches)
    lengths = (cu_q, cu_k, len_q, len_k)
    window = (left, right)
    lse_strides = (lse_b, lse_h)
    descs = (q_desc, k_desc, v_desc)
    shared = (o_desc, lse_ptr, sink_ptr, smem, bars, grid, lengths, window, num_tiles, scale, cap, lse_strides)
    # constexprs stay constexprs only in a tuple that is not given a name
    if PAGER:
        gl.warp_specialize(
            [
                (produce, (descs, smem, bars, grid, lengths, window, num_tiles, group, counter, (table, table_stride),
                           BLOCK_N, STAGES, NUM_WG, RIGHT, LEFT, VARLEN, PAGE, PAGER, DYNAMIC)),
                (
                    consume,
                    (shared, 0, BLOCK_N, STAGES, NUM_WG, RIGHT, LEFT, VARLEN, PAGE, PAGER, EVEN, SOFTCAP, SINK, O_IN_Q,
                     Q_IN_REGS, DEPTH),
                ),
                (
                    consume,
                    (shared, 1, BLOCK_N, STAGES, NUM_WG, RIGHT, LEFT, VARLEN, PAGE, PAGER, EVEN, SOFTCAP, SINK, O_IN_Q,
                     Q_IN_REGS, DEPTH),
                ),
                (produce_pages, (descs, smem, bars, grid, lengths, window, num_tiles, group, (table, table_stride),
                                 BLOCK_N, STAGES, NUM_WG, RIGHT, LEFT, PAGE, PAGER)),
            ],
            [4, 4, 1],
            [REGS, REGS, 24],
        )  # fmt: skip
    elif NUM_WG == 2:
        gl.warp_specialize(
            [
                (produce, (descs, smem, bars, grid, lengths, window, num_tiles, group, counter, (table, table_stride),
                           BLOCK_N, STAGES, NUM_WG, RIGHT, LEFT, VARLEN, PAGE, PAGER, DYNAMIC)),
                (
                    consume,
                    (shared, 0, BLOCK_N, STAGES, NUM_WG, RIGHT, LEFT, VARLEN, PAGE, PAGER, EVEN, SOFTCAP, SINK, O_IN_Q,
                     Q_IN_REGS, DEPTH),
                ),
                (
                    consume,
                    (shared, 1, BLOCK_N, STAGES, NUM_WG, RIGHT, LEFT, VARLEN, PAGE, PAGER, EVEN, SOFTCAP, SINK, O_IN_Q,
                     Q_IN_REGS, DEPTH),
                ),
            ],
            [4, 4],
            [REGS, REGS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (produce, (descs, smem, bars, grid, lengths, window, num_tiles, group, counter, (table, table_stride),
                           BLOCK_N, STAGES, NUM_WG, RIGHT, LEFT, VARLEN, PAGE, PAGER, DYNAMIC)),
                (
                    consume,
                    (shared, 0, BLOCK_N, STAGES, NUM_WG, RIGHT, LEFT, VARLEN, PAGE, PAGER, EVEN, SOFTCAP, SINK, O_IN_Q,
                     Q_IN_REGS, DEPTH),
                ),
                (
                    consume,
                    (shared, 1, BLOCK_N, STAGES, NUM_WG, RIGHT, LEFT, VARLEN, PAGE, PAGER, EVEN, SOFTCAP, SINK, O_IN_Q,
                     Q_IN_REGS, DEPTH),
                ),
                (
                    consume,
                    (shared, 2, BLOCK_N, STAGES, NUM_WG, RIGHT, LEFT, VARLEN, PAGE, PAGER, EVEN, SOFTCAP, SINK, O_IN_Q,
                     Q_IN_REGS, DEPTH),
                ),
                (
                    consume,
                    (shared, 3, BLOCK_N, STAGES, NUM_WG, RIGHT, LEFT, VARLEN, PAGE, PAGER, EVEN, SOFTCAP, SINK, O_IN_Q,
                     Q_IN_REGS, DEPTH),
                ),
            ],
            [4, 4, 4, 4],
            [REGS, REGS, REGS, REGS],
        )  # fmt: skip


# --------------------------------------------------------------------------------------------- host


class Tile(NamedTuple):
    """What one thread block works on at a time, and with how many registers."""

    num_wg: int  # consumer warpgroups, of 64 query rows each: 2 or 4
    block_n: int  # keys of one block
    stages: int  # blocks in the ring, up to 3
    registers: int  # of a consumer's thread
    max_registers: int  # of all threads on average, which is what the launch asks for
    q_in_registers: bool = False  # read the queries once into registers instead of at each product
    out_in_q: bool = False  # write the output through the queries' shared memory, for want of more
    pager: bool = False  # a partition of one warp fetches pages


# by the widths of q and v in shared memory; measured on an H100, see docs/kernels/hopper_flash_fwd.md
TILES = {
    (64, 64): Tile(4, 64, 3, 112, 96),
    (128, 128): Tile(2, 128, 2, 240, 168, q_in_registers=KEEPS_LOOP_OPERANDS),
    (256, 128): Tile(2, 64, 2, 240, 168),
    (256, 256): Tile(2, 64, 2, 240, 168, out_in_q=True),
}
# over pages. The pager's partition costs registers, and 256 columns of output want more than are left
PAGED_TILES = {
    (64, 64): Tile(2, 128, 2, 232, 128, q_in_registers=KEEPS_LOOP_OPERANDS, pager=True),
    (128, 128): Tile(2, 128, 2, 232, 128, q_in_registers=KEEPS_LOOP_OPERANDS, pager=True),
    (256, 128): Tile(2, 64, 2, 232, 128, pager=True),
    (256, 256): TILES[256, 256],
}
MIN_QUERIES = 64  # with fewer rows most of a tile is empty, and splitting the keys matters more
LONG_KEYS = 1024  # from here on, splitting the keys over an idle half of the GPU should pay (by count, not measured)
L2_SHARE = 32 << 20  # bytes of keys and values that one section of heads may keep in the 50 MB L2
_DTYPES = (torch.float16, torch.bfloat16)
_UNSUPPORTED = ("seqused_q", "seqused_k", "leftpad_k", "block_table", "qv", "alibi_slopes", "attn_bias")


def refuses_inputs(
    q: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors, unsupported: tuple[str, ...] = _UNSUPPORTED
) -> str | None:
    """Why no kernel of this family can take such inputs, or None."""
    if q.dtype not in _DTYPES:
        return f"it takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if (_width(q.shape[-1]), _width(v.shape[-1])) not in TILES or q.shape[-1] % 8 or v.shape[-1] % 8:
        widths = ", ".join(f"{d}/{dv}" for d, dv in TILES)
        return f"it takes head_dim/v's in multiples of 8 that round up to {widths}, not {q.shape[-1]}/{v.shape[-1]}"
    given = [name for name in unsupported if getattr(t, name) is not None]
    if given or spec.dropout_p:
        return f"it does not take {', '.join(given) or 'dropout_p'}"
    if spec.softmax_scale <= 0:
        return f"it takes a positive softmax_scale, not {spec.softmax_scale}"
    return None


def refuses_flash_fwd(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> str | None:
    """Why this backend cannot take the call, or None."""
    reason = refuses_inputs(q, v, spec, t)
    if reason is not None:
        return reason
    if (t.cu_seqlens_q is None) != (t.cu_seqlens_k is None):
        return "it takes cu_seqlens_q and cu_seqlens_k together"
    if k.numel() == 0:
        return "there are no keys"
    batch, len_q, len_k = _sizes(q, k, t)
    if len_q < MIN_QUERIES:
        return f"its tiles are {MIN_QUERIES} query rows or more, the call has {len_q}"
    num_tiles = batch * q.shape[-2] * _num_query_blocks(q, v, len_q)
    if q.is_cuda and len_k >= LONG_KEYS and 2 * num_tiles < _processors(q.device):
        return f"its {num_tiles} tiles would leave most of the GPU idle over {len_k} keys, which it does not split"
    return None


def flash_fwd(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> tuple[Tensor, Tensor]:
    """`(out, softmax_lse)`: out as q with v's last axis, LSE fp32 (B, Hq, Sq) or (Hq, Tq). See `kernels/spec.py`."""
    k, v = _readable_by_tma(k), _readable_by_tma(v)
    block_n = TILES[_width(q.shape[-1]), _width(v.shape[-1])].block_n
    varlen = t.cu_seqlens_k is not None
    descriptors = (_descriptor(k, block_n, varlen), _descriptor(v, block_n, varlen))
    lengths = t.cu_seqlens_k if varlen else None
    return run_forward(q, descriptors, _sizes(q, k, t), (k.shape[-2], v.shape[-1]), lengths, None, 0, spec, t)


def run_forward(
    q: Tensor,
    descriptors: tuple[TensorDescriptor, TensorDescriptor],
    sizes: tuple[int, int, int],
    heads_and_dim_v: tuple[int, int],
    lengths_k: Tensor | None,
    block_table: Tensor | None,
    page: int,
    spec: AttentionSpec,
    t: AttentionTensors,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel over keys and values behind `descriptors`; `sizes` as of `_sizes`."""
    varlen = t.cu_seqlens_q is not None
    q = _readable_by_tma(q)
    batch, len_q, len_k = sizes
    heads, (heads_k, dim_v) = q.shape[-2], heads_and_dim_v
    out = q.new_empty((*q.shape[:-1], dim_v))
    lse = torch.empty((heads, q.shape[0]) if varlen else (batch, heads, len_q), dtype=torch.float32, device=q.device)
    if varlen:  # rows that belong to no sequence
        out.zero_()
        lse.fill_(-math.inf)
    if out.numel() == 0 or batch == 0:
        return out, lse
    tile = (PAGED_TILES if page else TILES)[_width(q.shape[-1]), _width(dim_v)]
    rows = tile.num_wg * WG_ROWS.value
    # sequences of different lengths share one numbering of query blocks, see `find_sequence`
    num_m, pairs = (q.shape[0] // rows + batch, heads) if varlen else (math.ceil(len_q / rows), batch * heads)
    num_tiles = num_m * pairs
    programs = min(num_tiles, _processors(q.device))
    uneven = varlen or page > 0 or spec.window_left >= 0 or spec.window_right >= 0
    pairs_in_l2 = L2_SHARE // (max(len_k, 1) * (q.shape[-1] + dim_v) * q.element_size()) if uneven else 1
    group = heads // heads_k
    arguments = (
        _descriptor(q, WG_ROWS.value, varlen),
        *descriptors,
        _descriptor(out, WG_ROWS.value, varlen),
        lse,
        lse if t.learnable_sink is None else t.learnable_sink,
        lse if t.cu_seqlens_q is None else t.cu_seqlens_q,
        lse if lengths_k is None else lengths_k,
        lse if block_table is None else block_table,
        torch.zeros(1, dtype=torch.int32, device=q.device) if num_tiles > programs else lse,
        0 if block_table is None else block_table.stride(0),
        len_q,
        len_k,
        num_m,
        heads,
        pairs,
        min(pairs, group * max(1, pairs_in_l2)),
        batch,
        group,
        spec.window_left,
        spec.window_right,
        num_tiles,
        (spec.softcap or spec.softmax_scale) * LOG2E.value,
        spec.softmax_scale / spec.softcap if spec.softcap else 0.0,
        0 if varlen else lse.stride(0),
        lse.stride(-2),
    )
    constants = (
        ("BLOCK_N", tile.block_n),
        ("STAGES", tile.stages),
        ("NUM_WG", tile.num_wg),
        ("RIGHT", spec.window_right >= 0),
        ("LEFT", spec.window_left >= 0),
        ("VARLEN", varlen),
        ("PAGE", page),
        ("PAGER", tile.pager),
        ("EVEN", not uneven and len_k % tile.block_n == 0),
        ("SOFTCAP", spec.softcap != 0),
        ("SINK", t.learnable_sink is not None),
        ("O_IN_Q", tile.out_in_q),
        ("Q_IN_REGS", tile.q_in_registers),
        ("DEPTH", _depth(q.shape[-1])),
        ("DYNAMIC", num_tiles > programs),
        ("REGS", tile.registers),
    )
    key = (q.dtype, _width(q.shape[-1]), _width(dim_v), *(pointer_key(x) for x in arguments[5:9]))
    launch(flash_fwd_kernel, (programs, 1, 1), arguments, constants, key, num_warps=4, maxnreg=tile.max_registers)
    return out, lse


def _sizes(q: Tensor, k: Tensor, t: AttentionTensors) -> tuple[int, int, int]:
    """Sequences, and the queries and keys of the longest."""
    if t.cu_seqlens_q is None:
        return q.shape[0], q.shape[1], k.shape[1]
    return len(t.cu_seqlens_q) - 1, t.max_seqlen_q, t.max_seqlen_k


def _num_query_blocks(q: Tensor, v: Tensor, len_q: int) -> int:
    rows = TILES[_width(q.shape[-1]), _width(v.shape[-1])].num_wg * WG_ROWS.value
    return math.ceil(len_q / rows)


@functools.cache
def _width(head_dim: int) -> int:
    """Columns of a head in shared memory; TMA fills those past head_dim with zeros and does not write them back."""
    return max(64, 1 << (head_dim - 1).bit_length())


@functools.cache
def _depth(head_dim: int) -> int:
    """Columns that Q·Kᵀ is taken over: those of `_width`, or three quarters of 256 where they hold the head."""
    return 192 if 128 < head_dim <= 192 else _width(head_dim)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _readable_by_tma(x: Tensor) -> Tensor:
    """x, or a copy where TMA could not address it: last axis contiguous, the others' strides multiples of 16 bytes."""
    if x.is_contiguous() and x.shape[-1] * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    aligned = all(stride * x.element_size() % 16 == 0 and stride > 0 for stride in strides)
    if x.stride(-1) == 1 and aligned and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _descriptor(x: Tensor, rows: int, varlen: bool, width: int = 0) -> TensorDescriptor:
    """Boxes of `rows` rows of one head for `box_at`, of `width` columns, or all."""
    make = ragged_descriptor if varlen else make_descriptor
    return make(x, *_axes(x.shape, x.stride(), rows, varlen, width))


@functools.lru_cache(maxsize=1024)
def _axes(
    shape: tuple[int, ...], strides: tuple[int, ...], rows: int, varlen: bool, width: int
) -> tuple[list[int], list[int], list[int], gl.NVMMASharedLayout]:
    """Shape, strides, box and layout of a descriptor."""
    # TMA checks the stride of an axis of size 1 too, and torch may hold anything there
    steps = [stride if size > 1 else shape[-1] for size, stride in zip(shape, strides, strict=True)]
    box = [rows, 1, width or _width(shape[-1])]
    if not varlen:
        box.insert(0, 1)
    return list(shape), [*steps[:-1], 1], box, _RAGGED_LAYOUT if varlen else _LAYOUT


_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
_RAGGED_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5)
