"""The backward kernel for Hopper (sm_90) with head sizes up to 128, in Gluon.

A thread block holds 128 keys with their values, and a producer (the default partition) brings blocks of queries and of
dO. Each of two consumer warpgroups owns 64 of the keys, keeps their dK and dV in registers, and runs for block i

    dP(i) = V·dO(i)ᵀ − δ       meanwhile P(i) = exp2 of S(i)
    dV += P(i)·dO(i)           meanwhile dS(i) = P ∘ dP, to shared memory for both; the warpgroups meet
    dQ(i) = dS(i)ᵀ·K           over all 128 keys, each warpgroup half of the columns (or of the rows)
    S(i+1) = K·Q(i+1)ᵀ         meanwhile dQ goes through shared memory to TMA, which adds it to fp32 in global memory
    dK += dS(i)·Q(i)

S and dP are held transposed (keys × queries), so that P and dS are operands from registers for dV and dK. dP starts
from −δ. The scores behind the last block are computed from whatever is there, for nobody.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from octavo.kernels.hopper.backward_parts import (
    DS_FULL,
    G_EMPTY,
    NUM_WG,
    Q_EMPTY,
    add_rows,
    as_operand,
    give_turn,
    issue_transposed,
    look_at,
    opaque_zero,
    probabilities,
    produce,
    query_blocks,
    stage_of,
    turn_of,
    write_gradient,
)
from octavo.kernels.hopper.flash_fwd import WG_ROWS, allocate_boxes, as_rows, barriers, box_at, sequence
from octavo.kernels.hopper.gluon_compat import (
    FITS_THREE_PRODUCTS,
    barrier_arrive,
    barrier_sync,
    pack_pairs,
    tma_store_wait,
    unpack_pairs,
)

BLOCK_N = gl.constexpr(128)  # keys of one thread block, 64 a warpgroup


@gluon.jit
def step(  # noqa: PLR0915 (a step is one schedule)
    m, index, total, sums, last, s, dk, dv, scores, keys, col, smem, bars,
    wg: gl.constexpr, MASK: gl.constexpr, RIGHT: gl.constexpr, LEFT: gl.constexpr, SOFTCAP: gl.constexpr,
    IN_TURN: gl.constexpr,
):  # fmt: skip
    """Query block m of ring entry `index`, whose scores s come in; those of the next go out."""
    q_smem, k_smem, v_smem, g_smem, ds_smem, lse_smem, delta_smem, acc_smem = smem
    q_full, g_full, stat_full = bars
    acc_desc, acc_row, turns, first_turn = sums
    BLOCK_M: gl.constexpr = q_smem.shape[-3]
    D: gl.constexpr = q_smem.shape[-1]
    Q_STAGES: gl.constexpr = q_smem.shape[0]
    S_LAYOUT: gl.constexpr = s.type.layout
    COLS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    dtype: gl.constexpr = q_smem.dtype
    q_stage, q_phase = stage_of(index, Q_STAGES)
    g_stage, g_phase = stage_of(index, g_smem.shape[0])
    mine = wg + opaque_zero(index)
    q = as_rows(q_smem.index(q_stage))
    g = as_rows(g_smem.index(g_stage))

    mbarrier.wait(stat_full.index(q_stage), q_phase)
    delta = delta_smem.index(q_stage).load(COLS)
    dp = gl.full([WG_ROWS, BLOCK_M], 0.0, gl.float32, S_LAYOUT) - delta[None, :]
    mbarrier.wait(g_full.index(g_stage), g_phase)
    dp = warpgroup_mma(as_rows(v_smem.index(mine)), g.permute((1, 0)), dp, is_async=True)

    p, t = probabilities(s, lse_smem.index(q_stage).load(COLS), m, scores, keys, MASK, RIGHT, LEFT, SOFTCAP)
    a = as_operand(pack_pairs(p, dtype), dv, dtype)
    dv = warpgroup_mma(a, g, dv, is_async=True)
    if SOFTCAP:
        p = p * (1 - t * t)
    dp = warpgroup_mma_wait(1, [dp])
    ds = pack_pairs(p * dp, dtype)
    half = (index & 1) * NUM_WG
    ds_smem.index(half + wg).store(unpack_pairs(ds, dtype, S_LAYOUT))
    fence_async_shared()
    dv, a = warpgroup_mma_wait(0, [dv, a])
    barrier_arrive(G_EMPTY + g_stage, 128 * (NUM_WG + 1))
    barrier_sync(DS_FULL, 128 * NUM_WG)

    dq = gl.full([64, 64], 0.0, gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
    for piece in gl.static_range(NUM_WG):
        ds_piece = ds_smem.index(half + piece)
        k_piece = as_rows(k_smem.index(mine - wg + piece))
        if BLOCK_M == 64:
            k_piece = k_piece.slice(wg * 64, 64, dim=1)
        else:
            ds_piece = ds_piece.slice(wg * 64, 64, dim=1)
        dq = warpgroup_mma(ds_piece.permute((1, 0)), k_piece, dq, use_acc=piece > 0, is_async=True)
    seen = 0
    if IN_TURN:
        seen = look_at(turns + first_turn + m * NUM_WG + wg)
    b = as_operand(ds, dk, dtype)
    if BLOCK_M == 128 and not FITS_THREE_PRODUCTS:
        dk = warpgroup_mma(b, q, dk, is_async=True)
        dq = warpgroup_mma_wait(1, [dq])
    next_stage, next_phase = stage_of(index + 1, Q_STAGES)
    mbarrier.wait(q_full.index(next_stage), next_phase, pred=index + 1 < total)
    s = issue_transposed(as_rows(k_smem.index(mine)), as_rows(q_smem.index(next_stage)))
    if BLOCK_M == 64 or FITS_THREE_PRODUCTS:
        dk = warpgroup_mma(b, q, dk, is_async=True)
        dq = warpgroup_mma_wait(2, [dq])
    if IN_TURN:
        give_turn(turns + last, index > 0)
        last = first_turn + m * NUM_WG + wg
    turn = turn_of(m, col, scores, BLOCK_M, BLOCK_N, RIGHT)
    acc_row += m * (BLOCK_M * D // 32) + wg * 128
    add_rows(dq, acc_desc, acc_row, acc_smem.index(wg), turns + last, turn, seen, IN_TURN)
    s, dk, b = warpgroup_mma_wait(0, [s, dk, b])
    barrier_arrive(Q_EMPTY + q_stage, 128 * (NUM_WG + 1))
    return last, s, dk, dv


@gluon.jit
def walk(
    m, stop, index, total, sums, last, s, dk, dv, scores, keys, col, smem, bars,
    wg: gl.constexpr, MASK: gl.constexpr, RIGHT: gl.constexpr, LEFT: gl.constexpr, SOFTCAP: gl.constexpr,
    IN_TURN: gl.constexpr,
):  # fmt: skip
    """Query blocks [m, stop) of one head."""
    while m < stop:
        last, s, dk, dv = step(
            m, index, total, sums, last, s, dk, dv, scores, keys, col, smem, bars,
            wg, MASK, RIGHT, LEFT, SOFTCAP, IN_TURN,
        )  # fmt: skip
        index += 1
        m += 1
    return index, last, s, dk, dv


@gluon.jit
def consume(
    shared,
    wg: gl.constexpr, RIGHT: gl.constexpr, LEFT: gl.constexpr, VARLEN: gl.constexpr, SOFTCAP: gl.constexpr,
    IN_TURN: gl.constexpr,
):  # fmt: skip
    """One warpgroup: dK and dV of 64 keys, over all query heads of theirs."""
    dk_desc, dv_desc, acc_desc, turns, tiles, smem, bars, place, lengths, window, group, scale, cap, out_scale = shared
    q_smem, k_smem, v_smem, g_smem, _ds_smem, _lse_smem, _delta_smem, _acc_smem = smem
    kv_full, q_full, g_full, stat_full = bars
    col, head_k, batch = place
    _start_q, start_k, len_q, len_k = lengths
    first_tile, head_tiles = tiles
    BLOCK_M: gl.constexpr = q_smem.shape[-3]
    D: gl.constexpr = q_smem.shape[-1]
    DV: gl.constexpr = g_smem.shape[-1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    first_key = col + wg * WG_ROWS
    keys = first_key + gl.arange(0, WG_ROWS, gl.SliceLayout(1, S_LAYOUT))
    begin, end, clear_begin, clear_end = query_blocks(col, len_q, len_k, window, BLOCK_N, BLOCK_M, RIGHT, LEFT)
    total = gl.maximum(end - begin, 0) * group
    scores = (scale, cap, len_k, len_k - len_q, window)
    dk = gl.full([WG_ROWS, D], 0.0, gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]))
    dv = gl.full([WG_ROWS, DV], 0.0, gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16]))
    mbarrier.wait(kv_full.index(0), 0)
    mbarrier.wait(q_full.index(0), 0, pred=total > 0)
    s = issue_transposed(as_rows(k_smem.index(wg)), as_rows(q_smem.index(0)))
    s = warpgroup_mma_wait(0, [s])
    index = 0
    last = 0
    for member in range(group):
        tile = first_tile + (head_k * group + member) * head_tiles
        sums = (acc_desc, tile * (BLOCK_M * D // 32), turns, tile * NUM_WG)
        index, last, s, dk, dv = walk(
            begin, clear_begin, index, total, sums, last, s, dk, dv, scores, keys, col, smem,
            (q_full, g_full, stat_full), wg, True, RIGHT, LEFT, SOFTCAP, IN_TURN,
        )  # fmt: skip
        index, last, s, dk, dv = walk(
            clear_begin, clear_end, index, total, sums, last, s, dk, dv, scores, keys, col,
            smem, (q_full, g_full, stat_full), wg, False, RIGHT, LEFT, SOFTCAP, IN_TURN,
        )  # fmt: skip
        if LEFT:
            index, last, s, dk, dv = walk(
                clear_end, end, index, total, sums, last, s, dk, dv, scores, keys, col, smem,
                (q_full, g_full, stat_full), wg, True, RIGHT, LEFT, SOFTCAP, IN_TURN,
            )  # fmt: skip
    if IN_TURN:
        give_turn(turns + last, total > 0)
    barrier_sync(DS_FULL, 128 * NUM_WG)  # both have read all of K
    coord = box_at(batch, start_k, len_k, first_key, head_k, VARLEN)
    write_gradient(dv, dv_desc, coord, v_smem.index(wg))
    write_gradient(dk * out_scale, dk_desc, coord, k_smem.index(wg))
    tma_store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "len_q", "len_k", "num_n", "heads_k", "group", "left", "right", "stat_b", "stat_h", "batch_tiles", "head_tiles",
    ]
)  # fmt: skip
def backward_kernel(
    q_desc, k_desc, v_desc, g_desc, dk_desc, dv_desc, acc_desc, lse_ptr, delta_ptr, cu_q, cu_k, turns,
    len_q, len_k, num_n, heads_k, group, left, right, scale, cap, out_scale, stat_b, stat_h, batch_tiles, head_tiles,
    Q_STAGES: gl.constexpr, G_STAGES: gl.constexpr, RIGHT: gl.constexpr, LEFT: gl.constexpr, VARLEN: gl.constexpr,
    SOFTCAP: gl.constexpr, IN_TURN: gl.constexpr, REGS: gl.constexpr,
):  # fmt: skip
    """dK and dV, and sums of dQ in fp32, not yet scaled; `num_n` thread blocks for each sequence and key head."""
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[-3]
    D: gl.constexpr = q_desc.block_type.shape[-1]
    DV: gl.constexpr = g_desc.block_type.shape[-1]
    dtype: gl.constexpr = q_desc.dtype
    pid = gl.program_id(0)
    n_block = pid % num_n
    if IN_TURN:  # a thread block waits for those of later keys only, so those start before it
        n_block = num_n - 1 - n_block
    col = n_block * BLOCK_N
    head_k = (pid // num_n) % heads_k
    batch = pid // (num_n * heads_k)
    start_q, start_k, len_q, len_k = sequence(batch, (cu_q, cu_k, len_q, len_k), VARLEN, 0)
    if col < len_k:
        q_smem = allocate_boxes(q_desc, Q_STAGES, BLOCK_M, D, VARLEN)
        k_smem = allocate_boxes(k_desc, NUM_WG, WG_ROWS, D, VARLEN)
        v_smem = allocate_boxes(v_desc, NUM_WG, WG_ROWS, DV, VARLEN)
        g_smem = allocate_boxes(g_desc, G_STAGES, BLOCK_M, DV, VARLEN)
        ds_smem = gl.allocate_shared_memory(
            dtype, [2 * NUM_WG, WG_ROWS, BLOCK_M], gl.NVMMASharedLayout(128, 16, rank=2)
        )  # fmt: skip
        acc_smem = gl.allocate_shared_memory(gl.float32, [NUM_WG, 128, 32], acc_desc.layout)
        lse_smem = gl.allocate_shared_memory(gl.float32, [Q_STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        delta_smem = gl.allocate_shared_memory(gl.float32, [Q_STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        bars = (barriers(1, 1), barriers(Q_STAGES, 1), barriers(G_STAGES, 1), barriers(Q_STAGES, 1))
        place = (col, head_k, batch)
        lengths = (start_q, start_k, len_q, len_k)
        window = (left, right)
        first_tile = batch * batch_tiles
        if VARLEN:
            first_tile = start_q // BLOCK_M + batch
        loads = (q_smem, k_smem, v_smem, g_smem, lse_smem, delta_smem)
        smem = (q_smem, k_smem, v_smem, g_smem, ds_smem, lse_smem, delta_smem, acc_smem)
        shared = (
            dk_desc, dv_desc, acc_desc, turns, (first_tile, head_tiles), smem, bars, place, lengths, window, group,
            scale, cap, out_scale,
        )  # fmt: skip
        # constexprs stay constexprs only in a tuple that is not given a name
        gl.warp_specialize(
            [
                (
                    produce,
                    ((q_desc, k_desc, v_desc, g_desc), (lse_ptr, delta_ptr, stat_b, stat_h), loads, bars, place,
                     lengths, window, group, BLOCK_M, Q_STAGES, G_STAGES, RIGHT, LEFT, VARLEN),
                ),
                (consume, (shared, 0, RIGHT, LEFT, VARLEN, SOFTCAP, IN_TURN)),
                (consume, (shared, 1, RIGHT, LEFT, VARLEN, SOFTCAP, IN_TURN)),
            ],
            [4, 4],
            [REGS, REGS],
        )  # fmt: skip
