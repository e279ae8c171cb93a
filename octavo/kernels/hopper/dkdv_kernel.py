"""dK and dV for Hopper (sm_90) with head sizes up to 256, in Gluon; dQ has a kernel of its own.

dK and dV of 64 keys fill the registers of a warpgroup each, so the two consumer warpgroups share the work by kind, not
by key. Both see 64 keys and, for block i of queries,

    the values' warpgroup                          the keys' warpgroup
    S(i+1) = K·Q(i+1)ᵀ                             dS(i) = P ∘ dP(i)
    meanwhile P(i) = exp2 of S(i)              →   dP(i+1) = V·dO(i+1)ᵀ
    dV += P(i)·dO(i)                               dK += dS(i)·Q(i)

P crosses over through shared memory in 16 bits. It serves deterministic calls; `backward_wide_kernel`, which sums dQ in
memory in any order, is faster.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from octavo.kernels.hopper.backward_parts import (
    G_EMPTY,
    NUM_WG,
    P_EMPTY,
    P_FULL,
    Q_EMPTY,
    as_operand,
    issue_transposed,
    opaque_zero,
    probabilities,
    produce,
    query_blocks,
    stage_of,
    write_gradient,
)
from octavo.kernels.hopper.flash_fwd import WG_ROWS, allocate_boxes, as_rows, barriers, box_at, sequence
from octavo.kernels.hopper.gluon_compat import (
    barrier_arrive,
    barrier_sync,
    barrier_sync_if,
    pack_pairs,
    tma_store_wait,
    unpack_pairs,
)

BLOCK_N = gl.constexpr(64)  # keys of one thread block


@gluon.jit
def step_values(
    m, index, total, s, dv, scores, keys, smem, bars,
    MASK: gl.constexpr, RIGHT: gl.constexpr, LEFT: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Query block m of ring entry `index`, whose scores s come in; those of the next go out."""
    q_smem, k_smem, _v_smem, g_smem, p_smem, lse_smem, _delta_smem = smem
    q_full, g_full, stat_full = bars
    S_LAYOUT: gl.constexpr = s.type.layout
    dtype: gl.constexpr = q_smem.dtype
    q_stage, q_phase = stage_of(index, q_smem.shape[0])
    g_stage, g_phase = stage_of(index, g_smem.shape[0])
    g = as_rows(g_smem.index(g_stage))
    k = as_rows(k_smem.index(opaque_zero(index)))

    next_stage, next_phase = stage_of(index + 1, q_smem.shape[0])
    mbarrier.wait(q_full.index(next_stage), next_phase, pred=index + 1 < total)
    following = issue_transposed(k, as_rows(q_smem.index(next_stage)))
    mbarrier.wait(stat_full.index(q_stage), q_phase)
    lse = lse_smem.index(q_stage).load(gl.SliceLayout(0, S_LAYOUT))
    p, t = probabilities(s, lse, m, scores, keys, MASK, RIGHT, LEFT, SOFTCAP)
    packed = pack_pairs(p, dtype)
    a = as_operand(packed, dv, dtype)
    mbarrier.wait(g_full.index(g_stage), g_phase)
    dv = warpgroup_mma(a, g, dv, is_async=True)
    barrier_arrive(Q_EMPTY + q_stage, 128 * (NUM_WG + 1))
    if SOFTCAP:
        packed = pack_pairs(p * (1 - t * t), dtype)
    barrier_sync_if(index > 0, P_EMPTY, 128 * NUM_WG)
    p_smem.index(0).store(unpack_pairs(packed, dtype, S_LAYOUT))
    barrier_arrive(P_FULL, 128 * NUM_WG)
    following, dv, a = warpgroup_mma_wait(0, [following, dv, a])
    barrier_arrive(G_EMPTY + g_stage, 128 * (NUM_WG + 1))
    return following, dv


@gluon.jit
def step_keys(index, total, dp, dk, smem, bars):
    """Ring entry `index`, whose dP comes in without δ; that of the next goes out."""
    q_smem, _k_smem, v_smem, g_smem, p_smem, _lse_smem, delta_smem = smem
    _q_full, g_full, stat_full = bars
    S_LAYOUT: gl.constexpr = dp.type.layout
    dtype: gl.constexpr = q_smem.dtype
    q_stage, q_phase = stage_of(index, q_smem.shape[0])
    g_stage, _g_phase = stage_of(index, g_smem.shape[0])
    q = as_rows(q_smem.index(q_stage))
    v = as_rows(v_smem.index(opaque_zero(index)))

    barrier_arrive(G_EMPTY + g_stage, 128 * (NUM_WG + 1))
    mbarrier.wait(stat_full.index(q_stage), q_phase)
    dp -= delta_smem.index(q_stage).load(gl.SliceLayout(0, S_LAYOUT))[None, :]
    barrier_sync(P_FULL, 128 * NUM_WG)
    p = p_smem.index(0).load(S_LAYOUT)
    ds = pack_pairs(p.to(gl.float32) * dp, dtype)
    barrier_arrive(P_EMPTY, 128 * NUM_WG)
    next_stage, next_phase = stage_of(index + 1, g_smem.shape[0])
    mbarrier.wait(g_full.index(next_stage), next_phase, pred=index + 1 < total)
    dp = issue_transposed(v, as_rows(g_smem.index(next_stage)))
    b = as_operand(ds, dk, dtype)
    dk = warpgroup_mma(b, q, dk, is_async=True)
    dp, dk, b = warpgroup_mma_wait(0, [dp, dk, b])
    barrier_arrive(Q_EMPTY + q_stage, 128 * (NUM_WG + 1))
    return dp, dk


@gluon.jit
def walk_values(
    m, stop, index, total, s, dv, scores, keys, smem, bars,
    MASK: gl.constexpr, RIGHT: gl.constexpr, LEFT: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Query blocks [m, stop) of one head."""
    while m < stop:
        s, dv = step_values(m, index, total, s, dv, scores, keys, smem, bars, MASK, RIGHT, LEFT, SOFTCAP)
        index += 1
        m += 1
    return index, s, dv


@gluon.jit
def consume_values(shared, RIGHT: gl.constexpr, LEFT: gl.constexpr, VARLEN: gl.constexpr, SOFTCAP: gl.constexpr):
    """dV of 64 keys, over all query heads of theirs."""
    _dk_desc, dv_desc, smem, bars, place, lengths, window, group, scale, cap, _ = shared
    q_smem, k_smem, v_smem, g_smem, _p_smem, _lse_smem, _delta_smem = smem
    kv_full, q_full, g_full, stat_full = bars
    col, head_k, batch = place
    _start_q, start_k, len_q, len_k = lengths
    BLOCK_M: gl.constexpr = q_smem.shape[-3]
    DV: gl.constexpr = g_smem.shape[-1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    keys = col + gl.arange(0, WG_ROWS, gl.SliceLayout(1, S_LAYOUT))
    begin, end, clear_begin, clear_end = query_blocks(col, len_q, len_k, window, BLOCK_N, BLOCK_M, RIGHT, LEFT)
    total = gl.maximum(end - begin, 0) * group
    scores = (scale, cap, len_k, len_k - len_q, window)
    dv = gl.full([WG_ROWS, DV], 0.0, gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16]))
    mbarrier.wait(kv_full.index(0), 0)
    mbarrier.wait(q_full.index(0), 0, pred=total > 0)
    s = issue_transposed(as_rows(k_smem.index(0)), as_rows(q_smem.index(0)))
    s = warpgroup_mma_wait(0, [s])
    index = 0
    for _ in range(group):
        index, s, dv = walk_values(
            begin, clear_begin, index, total, s, dv, scores, keys, smem, (q_full, g_full, stat_full),
            True, RIGHT, LEFT, SOFTCAP,
        )  # fmt: skip
        index, s, dv = walk_values(
            clear_begin, clear_end, index, total, s, dv, scores, keys, smem, (q_full, g_full, stat_full),
            False, RIGHT, LEFT, SOFTCAP,
        )  # fmt: skip
        if LEFT:
            index, s, dv = walk_values(
                clear_end, end, index, total, s, dv, scores, keys, smem, (q_full, g_full, stat_full),
                True, RIGHT, LEFT, SOFTCAP,
            )  # fmt: skip
    barrier_sync_if(total > 0, P_EMPTY, 128 * NUM_WG)
    barrier_sync(P_FULL, 128 * NUM_WG)  # both are through with K and V
    coord = box_at(batch, start_k, len_k, col, head_k, VARLEN)
    write_gradient(dv, dv_desc, coord, v_smem.index(0))
    tma_store_wait(0)


@gluon.jit
def consume_keys(shared, RIGHT: gl.constexpr, LEFT: gl.constexpr, VARLEN: gl.constexpr):
    """dK of 64 keys, over all query heads of theirs."""
    dk_desc, _dv_desc, smem, bars, place, lengths, window, group, _scale, _cap, out_scale = shared
    q_smem, k_smem, v_smem, g_smem, _p_smem, _lse_smem, _delta_smem = smem
    kv_full, q_full, g_full, stat_full = bars
    col, head_k, batch = place
    _start_q, start_k, len_q, len_k = lengths
    BLOCK_M: gl.constexpr = q_smem.shape[-3]
    D: gl.constexpr = q_smem.shape[-1]
    begin, end, _, _ = query_blocks(col, len_q, len_k, window, BLOCK_N, BLOCK_M, RIGHT, LEFT)
    total = gl.maximum(end - begin, 0) * group
    dk = gl.full([WG_ROWS, D], 0.0, gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]))
    mbarrier.wait(kv_full.index(0), 0)
    mbarrier.wait(g_full.index(0), 0, pred=total > 0)
    dp = issue_transposed(as_rows(v_smem.index(0)), as_rows(g_smem.index(0)))
    dp = warpgroup_mma_wait(0, [dp])
    for index in range(total):
        dp, dk = step_keys(index, total, dp, dk, smem, (q_full, g_full, stat_full))
    barrier_sync(P_FULL, 128 * NUM_WG)  # both are through with K and V
    coord = box_at(batch, start_k, len_k, col, head_k, VARLEN)
    write_gradient(dk * out_scale, dk_desc, coord, k_smem.index(0))
    tma_store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "len_q", "len_k", "num_n", "heads_k", "group", "left", "right", "stat_b", "stat_h",
    ]
)  # fmt: skip
def dkdv_kernel(
    q_desc, k_desc, v_desc, g_desc, dk_desc, dv_desc, lse_ptr, delta_ptr, cu_q, cu_k,
    len_q, len_k, num_n, heads_k, group, left, right, scale, cap, out_scale, stat_b, stat_h,
    Q_STAGES: gl.constexpr, G_STAGES: gl.constexpr, RIGHT: gl.constexpr, LEFT: gl.constexpr, VARLEN: gl.constexpr,
    SOFTCAP: gl.constexpr, REGS: gl.constexpr,
):  # fmt: skip
    """dK and dV; `num_n` thread blocks for each sequence and key head."""
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[-3]
    D: gl.constexpr = q_desc.block_type.shape[-1]
    DV: gl.constexpr = g_desc.block_type.shape[-1]
    dtype: gl.constexpr = q_desc.dtype
    pid = gl.program_id(0)
    col = pid % num_n * BLOCK_N
    head_k = (pid // num_n) % heads_k
    batch = pid // (num_n * heads_k)
    start_q, start_k, len_q, len_k = sequence(batch, (cu_q, cu_k, len_q, len_k), VARLEN, 0)
    if col < len_k:
        q_smem = allocate_boxes(q_desc, Q_STAGES, BLOCK_M, D, VARLEN)
        k_smem = allocate_boxes(k_desc, 1, WG_ROWS, D, VARLEN)
        v_smem = allocate_boxes(v_desc, 1, WG_ROWS, DV, VARLEN)
        g_smem = allocate_boxes(g_desc, G_STAGES, BLOCK_M, DV, VARLEN)
        p_smem = gl.allocate_shared_memory(dtype, [1, WG_ROWS, BLOCK_M], gl.NVMMASharedLayout(128, 16, rank=2))
        lse_smem = gl.allocate_shared_memory(gl.float32, [Q_STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        delta_smem = gl.allocate_shared_memory(gl.float32, [Q_STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        bars = (barriers(1, 1), barriers(Q_STAGES, 1), barriers(G_STAGES, 1), barriers(Q_STAGES, 1))
        place = (col, head_k, batch)
        lengths = (start_q, start_k, len_q, len_k)
        window = (left, right)
        loads = (q_smem, k_smem, v_smem, g_smem, lse_smem, delta_smem)
        smem = (q_smem, k_smem, v_smem, g_smem, p_smem, lse_smem, delta_smem)
        shared = (dk_desc, dv_desc, smem, bars, place, lengths, window, group, scale, cap, out_scale)
        # constexprs stay constexprs only in a tuple that is not given a name
        gl.warp_specialize(
            [
                (
                    produce,
                    ((q_desc, k_desc, v_desc, g_desc), (lse_ptr, delta_ptr, stat_b, stat_h), loads, bars, place,
                     lengths, window, group, BLOCK_M, Q_STAGES, G_STAGES, RIGHT, LEFT, VARLEN),
                ),
                (consume_values, (shared, RIGHT, LEFT, VARLEN, SOFTCAP)),
                (consume_keys, (shared, RIGHT, LEFT, VARLEN)),
            ],
            [4, 4],
            [REGS, REGS],
        )  # fmt: skip
