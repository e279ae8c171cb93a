"""What the two backward kernels for Hopper share: the producer, the scores, the sums of dQ, and who waits for whom.

Blocks of queries and of dO, with their LSE and δ, come through rings; the keys and values of a thread block stay.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma

from octavo.kernels.hopper.flash_fwd import LOG2E, WG_ROWS, as_rows, box_at
from octavo.kernels.hopper.gluon_compat import (
    FIRST_BARRIER,
    barrier_sync_if,
    tanh,
    tma_add,
    tma_load,
    tma_store,
    tma_store_wait,
    tma_written_wait,
    unpack_pairs,
)

NUM_WG = gl.constexpr(2)  # consumer warpgroups
# named barriers: up to 3 stages of each ring that the consumers have left; what they tell each other
Q_EMPTY = gl.constexpr(FIRST_BARRIER)
G_EMPTY = gl.constexpr(FIRST_BARRIER + 3)
DS_FULL = gl.constexpr(FIRST_BARRIER + 6)
P_FULL = gl.constexpr(FIRST_BARRIER + 7)
P_EMPTY = gl.constexpr(FIRST_BARRIER + 8)


# --------------------------------------------------------------------------------------------- which blocks


@gluon.jit
def query_blocks(
    col, len_q, len_k, window, COLS: gl.constexpr, BLOCK_M: gl.constexpr, RIGHT: gl.constexpr, LEFT: gl.constexpr
):
    """Query blocks [begin, end) that see keys [col, col + COLS); of them [clear_begin, clear_end) need no mask."""
    left, right = window
    shift = len_k - len_q  # masks align bottom-right
    begin = 0
    clear_begin = 0
    end = gl.cdiv(len_q, BLOCK_M)
    clear_end = end
    if RIGHT:
        begin = gl.minimum(gl.maximum(col - right - shift, 0) // BLOCK_M, end)
        clear_begin = gl.cdiv(gl.maximum(col + COLS - 1 - right - shift, 0), BLOCK_M)
    if LEFT:
        end = gl.maximum(gl.minimum(gl.cdiv(gl.maximum(col + COLS + left - shift, 0), BLOCK_M), end), begin)
        clear_end = gl.maximum(col + left - shift + 1, 0) // BLOCK_M
    clear_begin = gl.maximum(gl.minimum(clear_begin, end), begin)
    if col + COLS > len_k:
        clear_begin = end
    clear_end = gl.maximum(gl.minimum(clear_end, end), clear_begin)
    return begin, end, clear_begin, clear_end


@gluon.jit
def stage_of(index, STAGES: gl.constexpr):
    """Ring entry → (stage, phase of its barrier)."""
    if STAGES == 2:
        return index & 1, (index >> 1) & 1
    else:
        return index % STAGES, (index // STAGES) & 1


# --------------------------------------------------------------------------------------------- producer


@gluon.jit
def load_block(desc, coord, index, smem, full, EMPTY: gl.constexpr, STAGES: gl.constexpr):
    """Load ring entry `index` once both consumers have left the one before it in the same stage."""
    stage = index % STAGES
    barrier_sync_if(index >= STAGES, EMPTY + stage, 128 * (NUM_WG + 1))
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    tma_load(desc, coord, full.index(stage), smem.index(stage))


@gluon.jit
def produce(
    descs, stats, smem, bars, place, lengths, window, group,
    BLOCK_M: gl.constexpr, Q_STAGES: gl.constexpr, G_STAGES: gl.constexpr, RIGHT: gl.constexpr, LEFT: gl.constexpr,
    VARLEN: gl.constexpr,
):  # fmt: skip
    """Load the keys and values, then for each query head of theirs the blocks of Q, dO, LSE and δ that see them."""
    q_desc, k_desc, v_desc, g_desc = descs
    lse_ptr, delta_ptr, stat_b, stat_h = stats
    q_smem, k_smem, v_smem, g_smem, lse_smem, delta_smem = smem
    kv_full, q_full, g_full, stat_full = bars
    col, head_k, batch = place
    start_q, start_k, len_q, len_k = lengths
    PIECES: gl.constexpr = k_smem.shape[0]
    i = gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    mbarrier.expect(kv_full.index(0), PIECES * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
    for piece in gl.static_range(PIECES):
        coord = box_at(batch, start_k, len_k, col + piece * WG_ROWS, head_k, VARLEN)
        tma_load(k_desc, coord, kv_full.index(0), k_smem.index(piece))
        tma_load(v_desc, coord, kv_full.index(0), v_smem.index(piece))
    begin, end, _, _ = query_blocks(col, len_q, len_k, window, PIECES * WG_ROWS, BLOCK_M, RIGHT, LEFT)
    index = 0
    for member in range(group):
        head = head_k * group + member
        row_stats = batch.to(gl.int64) * stat_b + head.to(gl.int64) * stat_h + start_q
        for m in range(begin, end):
            row = m * BLOCK_M
            coord = box_at(batch, start_q, len_q, row, head, VARLEN)
            load_block(q_desc, coord, index, q_smem, q_full, Q_EMPTY, Q_STAGES)
            used = row + i < len_q
            lse = gl.load(lse_ptr + row_stats + row + i, mask=used, other=float("inf"))
            delta = gl.load(delta_ptr + row_stats + row + i, mask=used, other=0.0)
            load_block(g_desc, coord, index, g_smem, g_full, G_EMPTY, G_STAGES)
            stage = index % Q_STAGES
            # +inf gives P = 0, to rows behind the end and to rows that saw nothing
            lse_smem.index(stage).store(gl.where(lse == float("-inf"), float("inf"), lse) * LOG2E)
            delta_smem.index(stage).store(delta)
            mbarrier.arrive(stat_full.index(stage), count=1)
            index += 1


# --------------------------------------------------------------------------------------------- consumers


@gluon.jit
def opaque_zero(x):
    """0, which the compiler does not know: an address made with it is not kept in a register over a loop."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def issue_transposed(rows, block):
    """Start rows · blockᵀ, (64 keys × queries), both in shared memory."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block.shape[0], 16])
    zero = gl.full([rows.shape[0], block.shape[0]], 0.0, gl.float32, LAYOUT)
    return warpgroup_mma(rows, block.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def probabilities(
    s, lse, m, scores, keys, MASK: gl.constexpr, RIGHT: gl.constexpr, LEFT: gl.constexpr, SOFTCAP: gl.constexpr
):
    """(P, tanh of softcap or P) of the products s (keys × queries) of query block m."""
    scale, cap, len_k, shift, window = scores
    left, right = window
    if SOFTCAP:
        s = tanh(s * cap)
    p = gl.exp2(s * scale - lse[None, :])
    if MASK:
        row = m * s.shape[1] + shift + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))[None, :]
        p = gl.where(keys[:, None] < len_k, p, 0.0)
        if RIGHT:
            p = gl.where(keys[:, None] <= row + right, p, 0.0)
        if LEFT:
            p = gl.where(keys[:, None] >= row - left, p, 0.0)
    if SOFTCAP:
        return p, s
    else:
        return p, p


@gluon.jit
def as_operand(packed, like, dtype: gl.constexpr):
    """What `pack_pairs` packed, as the operand in registers of a product with the accumulator `like`."""
    return unpack_pairs(packed, dtype, gl.DotOperandLayout(0, like.type.layout, 2))


@gluon.jit
def add_rows(x, desc, row, smem, counter, turn, seen, IN_TURN: gl.constexpr):
    """Start adding x (64, 64), a wgmma accumulator, to fp32 rows of 32 from `row` on, in the order of `finish_kernel`.

    Four numbers of a thread stand together, which makes the write to shared memory free of conflicts. With room for
    half of x it goes in two pieces. IN_TURN: not before `counter`, which held `seen` a while ago, has come to `turn`.
    """
    if smem.shape[0] == 128:
        x = gl.permute(gl.reshape(x, [4, 2, 8, 8, 4, 2]), [3, 0, 2, 4, 1, 5])
        add_piece(gl.reshape(x, [128, 32]), desc, row, smem, counter, turn, seen, IN_TURN)
    else:
        x = gl.permute(gl.reshape(x, [4, 2, 8, 2, 4, 4, 2]), [4, 0, 2, 5, 1, 6, 3])
        first, second = gl.split(x)
        add_piece(gl.reshape(first, [64, 32]), desc, row, smem, counter, turn, seen, IN_TURN)
        add_piece(gl.reshape(second, [64, 32]), desc, row + 64, smem, counter, turn, seen, False)


@gluon.jit
def add_piece(x, desc, row, smem, counter, turn, seen, IN_TURN: gl.constexpr):
    tma_store_wait(0)
    smem.store(x)
    fence_async_shared()
    if IN_TURN:
        await_turn(counter, turn, seen)
    tma_add(desc, [row, 0], smem)


@gluon.jit
def give_turn(counter, condition):
    """Let the next key block add to what `counter` counts for, once this warpgroup's sums there are in memory.

    They were started a block of queries ago, so that waiting for them costs little. They are complete in the L2 then,
    where whoever comes next adds to them, so no fence, which every block would wait for, stands before the counter.
    """
    tma_written_wait()
    tma_store_wait(0)  # for all threads, where the wait above is for the one that started them
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; and.b32 t, t, 127; setp.eq.u32 p, t, 0;"
        " setp.ne.and.s32 p, $2, 0, p; @p red.relaxed.gpu.global.add.s32 [$1], 1;"
        " mov.u32 $0, 0; }",
        "=r,l,r",
        [counter.to(gl.int64), condition.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def look_at(counter):
    """The counter as it stands now; the load runs while what follows does not need it."""
    return gl.inline_asm_elementwise(
        "ld.relaxed.gpu.global.s32 $0, [$1];", "=r,l", [counter.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def await_turn(counter, turn, seen):
    """Wait until `counter` has come to `turn`, if it had not when it was `seen`.

    With votes, or the assembler takes all that follows for divergent.
    """
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .s32 v; setp.lt.s32 p, $3, $2; vote.sync.any.pred p, p, -1; @!p bra.uni DONE;"
        " AGAIN: ld.acquire.gpu.global.s32 v, [$1]; setp.lt.s32 p, v, $2;"
        " vote.sync.any.pred p, p, -1; @p bra.uni AGAIN; DONE: mov.u32 $0, 0; }",
        "=r,l,r,r",
        [counter.to(gl.int64), turn, seen],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def turn_of(m, col, scores, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, RIGHT: gl.constexpr):
    """How many key blocks add to query block m before the one at `col`: all that are later in the sequence."""
    _, _, len_k, shift, window = scores
    last = (len_k - 1) // BLOCK_N
    if RIGHT:
        last = gl.minimum(last, (m * BLOCK_M + BLOCK_M - 1 + shift + window[1]) // BLOCK_N)
    return last - col // BLOCK_N


@gluon.jit
def write_gradient(x, desc, coord, smem):
    """Start the write of 64 rows of dK or dV through shared memory that nobody reads any more."""
    as_rows(smem).store(x.to(smem.dtype))
    fence_async_shared()
    tma_store(desc, coord, smem)
