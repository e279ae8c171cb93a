"""The backward kernels: δ, then dK and dV by tiles of keys, dQ by tiles of queries, and the gradient of a bias.

P is recomputed from the LSE and never stored (Dao et al., "FlashAttention-2", 2023). With dP = dO Vᵀ and
δ = rowsum(dO ∘ O) − dLSE,

    dV = Pᵀ dO    dS = P ∘ (dP − δ)    dQ = scale · dS K    dK = scale · dSᵀ Q

dQ has a kernel of its own: two more products than a single pass that adds dQ atomically, and in return every sum has a
fixed order, so two runs agree bit for bit, grouped heads included (one program adds up the heads of its key head).
"""

import triton
import triton.language as tl

from octavo.kernels.triton.forward_kernel import key_range, load_rows
from octavo.kernels.triton.scores import LOG2E, add_position_terms, dropout_keep, sequence, tanh, visible


@triton.jit(do_not_specialize=["seqlen_q", "tiles", "stride_lb", "stride_lh"])
def delta_kernel(
    out, dout, dlse, delta, cu_seqlens_q, seqused_q, seqlen_q, tiles, heads,
    stride_ob, stride_os, stride_oh, stride_gb, stride_gs, stride_gh, stride_lb, stride_lh,
    stride_dlb, stride_dlh, stride_dls,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout ∘ out) − dlse, in the layout of the LSE."""
    pid = tl.program_id(0)
    head = (pid // tiles) % heads
    b = pid // (tiles * heads)
    start, length = sequence(b, cu_seqlens_q, seqused_q, seqlen_q)
    i = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    used = i < length
    d = tl.arange(0, BLOCK_DV)
    row = start + i
    b64 = b.to(tl.int64)
    o = load_rows(
        out + b64 * stride_ob + row[:, None] * stride_os + head * stride_oh, d, used, HEAD_DIM_V, BLOCK_DV, True
    )
    g = load_rows(
        dout + b64 * stride_gb + row[:, None] * stride_gs + head * stride_gh, d, used, HEAD_DIM_V, BLOCK_DV, True
    )
    result = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if dlse is not None:
        result -= tl.load(dlse + b64 * stride_dlb + head * stride_dlh + row * stride_dls, mask=used, other=0.0)
    tl.store(delta + b64 * stride_lb + head.to(tl.int64) * stride_lh + row, result, mask=used)


@triton.jit
def load_row_statistics(lse_base, delta_base, i, length, MASKED: tl.constexpr):
    """LSE in units of log 2 and δ of rows i. A row that saw nothing gets +inf, which makes its P zero."""
    if MASKED:
        lse = tl.load(lse_base + i, mask=i < length, other=float("inf"))
        delta = tl.load(delta_base + i, mask=i < length, other=0.0)
    else:
        lse = tl.load(lse_base + i)
        delta = tl.load(delta_base + i)
    return tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E, delta


@triton.jit
def probabilities(
    s, lse, i, j, in_range, first_key, end_key, shift, window_left, window_right, softmax_scale, softcap,
    slope, bias_rows, stride_bias_q, stride_bias_k, MASKED: tl.constexpr,
):  # fmt: skip
    """P from the products s, and the factor that softcap's derivative puts on dS (1 without softcap)."""
    slack = 1.0
    if softcap is None and slope is None and bias_rows is None:
        s *= softmax_scale * LOG2E
    else:
        s *= softmax_scale
        if softcap is not None:
            t = tanh(s / softcap)
            slack = 1 - t * t
            s = softcap * t
        s = add_position_terms(s, i, j, shift, slope, bias_rows, in_range, stride_bias_q, stride_bias_k) * LOG2E
    p = tl.exp2(s - lse)
    if MASKED:
        p = tl.where(visible(i, j, first_key, end_key, shift, window_left, window_right), p, 0.0)
    return p, slack


@triton.jit(
    do_not_specialize=[
        "seqlen_q", "seqlen_k", "max_seqlen_q", "max_seqlen_k", "dropout_seed", "n_tiles", "window_left",
        "window_right", "stride_lb", "stride_lh",
    ]
)  # fmt: skip
def dkdv_kernel(  # noqa: C901, PLR0915 (a kernel is one function)
    q, k, v, qv, dout, lse, delta, q_descriptor, g_descriptor, dk, dv,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, alibi_slopes, bias,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_qvb, stride_qvs, stride_qvh, stride_gb, stride_gs, stride_gh, stride_lb, stride_lh,
    stride_dkb, stride_dks, stride_dkh, stride_dvb, stride_dvs, stride_dvh,
    stride_slopes, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    softmax_scale, softcap, window_left, window_right, dropout_p, dropout_seed,
    heads_k, seqlen_q, seqlen_k, max_seqlen_q, max_seqlen_k, n_tiles,
    QUERIES_PER_KEY: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_TILES: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys: all queries of all its query heads pass by. Tiles are held as (keys, queries)."""
    pid = tl.program_id(0)
    n_tile = pid % n_tiles
    head_k = (pid // n_tiles) % heads_k
    b = pid // (n_tiles * heads_k)
    b64 = b.to(tl.int64)
    start_q, length_q = sequence(b, cu_seqlens_q, seqused_q, seqlen_q)
    start_k, length_k = sequence(b, cu_seqlens_k, seqused_k, seqlen_k)
    n = n_tile * BLOCK_N
    if n >= length_k:
        return
    leftpad = 0
    if leftpad_k is not None:
        leftpad = tl.load(leftpad_k + b)
    j = n + tl.arange(0, BLOCK_N)
    key_used = (j >= leftpad) & (j < length_k)
    d = tl.arange(0, BLOCK_D)
    dvs = tl.arange(0, BLOCK_DV)
    key_row = (start_k + j)[:, None]
    k_tile = load_rows(
        k + b64 * stride_kb + key_row * stride_ks + head_k * stride_kh, d, key_used, HEAD_DIM, BLOCK_D, True
    )
    v_tile = load_rows(
        v + b64 * stride_vb + key_row * stride_vs + head_k * stride_vh, dvs, key_used, HEAD_DIM_V, BLOCK_DV, True
    )

    # rows that see some key of the tile, and between them those that see all; padding keys are dropped at the store
    shift = length_k - length_q
    first = 0
    end = length_q
    full = 0
    full_end = length_q
    n_last = n + BLOCK_N - 1
    if window_right is not None:
        first = tl.maximum(first, n - window_right - shift)
        full = tl.maximum(full, n_last - window_right - shift)
    if window_left is not None:
        end = tl.minimum(end, tl.minimum(n_last, length_k - 1) + window_left - shift + 1)
        full_end = tl.minimum(full_end, n + window_left - shift + 1)
    first = first // BLOCK_M * BLOCK_M
    end = tl.maximum(end, first)
    full = tl.minimum(tl.cdiv(full, BLOCK_M), tl.cdiv(end, BLOCK_M)) * BLOCK_M
    full_end = tl.maximum(tl.maximum(full_end, 0) // BLOCK_M * BLOCK_M, full)

    first_row = b * seqlen_q if cu_seqlens_q is None else start_q.to(tl.int32)  # of the sequence, in the descriptors
    dk_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for group in range(QUERIES_PER_KEY):
        h = head_k * QUERIES_PER_KEY + group
        h64 = h.to(tl.int64)
        q_base = q + b64 * stride_qb + start_q * stride_qs + h64 * stride_qh
        g_base = dout + b64 * stride_gb + start_q * stride_gs + h64 * stride_gh
        lse_base = lse + b64 * stride_lb + h64 * stride_lh + start_q
        delta_base = delta + b64 * stride_lb + h64 * stride_lh + start_q
        slope = None
        if alibi_slopes is not None:
            slope = tl.load(alibi_slopes + b * stride_slopes + h)
        bias_rows = None
        if bias is not None:
            bias_rows = bias + b64 * stride_bias_b + h64 * stride_bias_h
        for phase in tl.static_range(3):
            if phase == 0:
                start = first
                stop = tl.minimum(full, end)
            elif phase == 1:
                start = full
                stop = full_end
            else:
                start = full_end
                stop = end
            if phase == 1 or (phase == 0 and window_right is not None) or (phase == 2 and not WHOLE_TILES):
                for m in tl.range(start, stop, BLOCK_M):
                    i = m + tl.arange(0, BLOCK_M)
                    row_used = i < length_q
                    row = i.to(tl.int64)[:, None]
                    if phase == 1 and q_descriptor is not None:
                        q_tile = q_descriptor.load([first_row + m, h * stride_qh])
                    else:
                        q_tile = load_rows(q_base + row * stride_qs, d, row_used, HEAD_DIM, BLOCK_D, phase != 1)
                    row_lse, row_delta = load_row_statistics(lse_base, delta_base, i, length_q, phase != 1)
                    s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                    if qv is not None:
                        qv_rows = qv + b64 * stride_qvb + (start_q + row) * stride_qvs + h64 * stride_qvh
                        qv_tile = load_rows(qv_rows, dvs, row_used, HEAD_DIM_V, BLOCK_DV, phase != 1)
                        s = tl.dot(v_tile, tl.trans(qv_tile), s, input_precision="ieee")
                    in_range = row_used[None, :] & key_used[:, None]
                    p, slack = probabilities(
                        s, row_lse[None, :], i[None, :], j[:, None], in_range, leftpad, length_k, shift,
                        window_left, window_right, softmax_scale, softcap, slope, bias_rows, stride_bias_q,
                        stride_bias_k, phase != 1,
                    )  # fmt: skip
                    if phase == 1 and g_descriptor is not None:
                        g_tile = g_descriptor.load([first_row + m, h * stride_gh])
                    else:
                        g_tile = load_rows(g_base + row * stride_gs, dvs, row_used, HEAD_DIM_V, BLOCK_DV, phase != 1)
                    dp = tl.dot(v_tile, tl.trans(g_tile), input_precision="ieee")
                    p_kept = p
                    if dropout_p is not None:
                        batch_head = b * heads_k * QUERIES_PER_KEY + h
                        keep = dropout_keep(
                            dropout_seed, dropout_p, batch_head, i[None, :], j[:, None], max_seqlen_q, max_seqlen_k
                        )
                        p_kept = tl.where(keep, p / (1 - dropout_p), 0.0)
                        dp = tl.where(keep, dp / (1 - dropout_p), 0.0)
                    dv_acc = tl.dot(p_kept.to(g_tile.dtype), g_tile, dv_acc, input_precision="ieee")
                    ds = p * (dp - row_delta[None, :]) * slack
                    if qv is not None:
                        dv_acc = tl.dot((ds * softmax_scale).to(qv_tile.dtype), qv_tile, dv_acc, input_precision="ieee")
                    dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")

    key_used = key_used[:, None]
    dk_rows = dk + b64 * stride_dkb + key_row * stride_dks + head_k * stride_dkh
    dv_rows = dv + b64 * stride_dvb + key_row * stride_dvs + head_k * stride_dvh
    dk_acc *= softmax_scale
    tl.store(dk_rows + d[None, :], dk_acc.to(dk.dtype.element_ty), mask=key_used & (d < HEAD_DIM)[None, :])
    tl.store(dv_rows + dvs[None, :], dv_acc.to(dv.dtype.element_ty), mask=key_used & (dvs < HEAD_DIM_V)[None, :])


@triton.jit(
    do_not_specialize=[
        "seqlen_q", "seqlen_k", "max_seqlen_q", "max_seqlen_k", "dropout_seed", "m_tiles", "window_left",
        "window_right", "stride_lb", "stride_lh",
    ]
)  # fmt: skip
def dq_kernel(  # noqa: C901, PLR0915 (a kernel is one function)
    q, k, v, qv, dout, lse, delta, k_descriptor, v_descriptor, dq, dqv,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, alibi_slopes, bias,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_qvb, stride_qvs, stride_qvh, stride_gb, stride_gs, stride_gh, stride_lb, stride_lh,
    stride_dqb, stride_dqs, stride_dqh, stride_dqvb, stride_dqvs, stride_dqvh,
    stride_slopes, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    softmax_scale, softcap, window_left, window_right, dropout_p, dropout_seed,
    heads, seqlen_q, seqlen_k, max_seqlen_q, max_seqlen_k, m_tiles,
    QUERIES_PER_KEY: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_TILES: tl.constexpr,
):  # fmt: skip
    """dQ (and dQV) of one tile of queries: the keys it can see pass by, as in the forward kernel."""
    pid = tl.program_id(0)
    m_tile = m_tiles - 1 - pid % m_tiles
    h = (pid // m_tiles) % heads
    b = pid // (m_tiles * heads)
    b64 = b.to(tl.int64)
    h64 = h.to(tl.int64)
    start_q, length_q = sequence(b, cu_seqlens_q, seqused_q, seqlen_q)
    start_k, length_k = sequence(b, cu_seqlens_k, seqused_k, seqlen_k)
    if m_tile * BLOCK_M >= length_q:
        return
    i = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_used = i < length_q
    row = (start_q + i)[:, None]
    d = tl.arange(0, BLOCK_D)
    dvs = tl.arange(0, BLOCK_DV)
    q_tile = load_rows(q + b64 * stride_qb + row * stride_qs + h64 * stride_qh, d, row_used, HEAD_DIM, BLOCK_D, True)
    g_tile = load_rows(
        dout + b64 * stride_gb + row * stride_gs + h64 * stride_gh, dvs, row_used, HEAD_DIM_V, BLOCK_DV, True
    )
    if qv is not None:
        qv_rows = qv + b64 * stride_qvb + row * stride_qvs + h64 * stride_qvh
        qv_tile = load_rows(qv_rows, dvs, row_used, HEAD_DIM_V, BLOCK_DV, True)
        dqv_acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    statistics = b64 * stride_lb + h64 * stride_lh + start_q
    row_lse, row_delta = load_row_statistics(lse + statistics, delta + statistics, i, length_q, True)
    head_k = h64 // QUERIES_PER_KEY
    k_base = k + b64 * stride_kb + start_k * stride_ks + head_k * stride_kh
    v_base = v + b64 * stride_vb + start_k * stride_vs + head_k * stride_vh
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + b * stride_slopes + h)
    bias_rows = None
    if bias is not None:
        bias_rows = bias + b64 * stride_bias_b + h64 * stride_bias_h

    shift = length_k - length_q
    leftpad = 0
    if leftpad_k is not None:
        leftpad = tl.load(leftpad_k + b)
    i_last = tl.minimum(m_tile * BLOCK_M + BLOCK_M - 1, length_q - 1)
    first, end, full, full_end = key_range(
        m_tile * BLOCK_M, i_last, leftpad, length_k, shift, window_left, window_right, BLOCK_N
    )
    first_row = b * seqlen_k if cu_seqlens_k is None else start_k.to(tl.int32)  # of the sequence, in the descriptors
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for phase in tl.static_range(3):
        if phase == 0:
            start = first // BLOCK_N * BLOCK_N
            stop = tl.minimum(full, end)
        elif phase == 1:
            start = full
            stop = full_end
        else:
            start = full_end
            stop = end
        if phase == 1 or (phase == 2 and not WHOLE_TILES) or (window_left is not None or leftpad_k is not None):
            for n in tl.range(start, stop, BLOCK_N):
                j = n + tl.arange(0, BLOCK_N)
                key_used = (j >= first) & (j < end)
                key_row = j.to(tl.int64)[:, None]
                if phase == 1 and k_descriptor is not None:
                    k_tile = k_descriptor.load([first_row + n, (head_k * stride_kh).to(tl.int32)])
                    v_tile = v_descriptor.load([first_row + n, (head_k * stride_vh).to(tl.int32)])
                else:
                    k_tile = load_rows(k_base + key_row * stride_ks, d, key_used, HEAD_DIM, BLOCK_D, phase != 1)
                    v_tile = load_rows(v_base + key_row * stride_vs, dvs, key_used, HEAD_DIM_V, BLOCK_DV, phase != 1)
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                if qv is not None:
                    s = tl.dot(qv_tile, tl.trans(v_tile), s, input_precision="ieee")
                in_range = row_used[:, None] & key_used[None, :]
                p, slack = probabilities(
                    s, row_lse[:, None], i[:, None], j[None, :], in_range, first, end, shift, window_left, window_right,
                    softmax_scale, softcap, slope, bias_rows, stride_bias_q, stride_bias_k, phase != 1,
                )  # fmt: skip
                dp = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
                if dropout_p is not None:
                    keep = dropout_keep(
                        dropout_seed, dropout_p, b * heads + h, i[:, None], j[None, :], max_seqlen_q, max_seqlen_k
                    )
                    dp = tl.where(keep, dp / (1 - dropout_p), 0.0)
                ds = (p * (dp - row_delta[:, None]) * slack).to(k_tile.dtype)
                acc = tl.dot(ds, k_tile, acc, input_precision="ieee")
                if qv is not None:
                    dqv_acc = tl.dot(ds, v_tile, dqv_acc, input_precision="ieee")

    row_used = row_used[:, None]
    acc *= softmax_scale
    dq_rows = dq + b64 * stride_dqb + row * stride_dqs + h64 * stride_dqh
    tl.store(dq_rows + d[None, :], acc.to(dq.dtype.element_ty), mask=row_used & (d < HEAD_DIM)[None, :])
    if qv is not None:
        dqv_acc *= softmax_scale
        dqv_rows = dqv + b64 * stride_dqvb + row * stride_dqvs + h64 * stride_dqvh
        tl.store(dqv_rows + dvs[None, :], dqv_acc.to(dqv.dtype.element_ty), mask=row_used & (dvs < HEAD_DIM_V)[None, :])


@triton.jit(
    do_not_specialize=[
        "batch", "heads", "seqlen_q", "seqlen_k", "max_seqlen_q", "max_seqlen_k", "dropout_seed", "m_tiles", "n_tiles",
        "window_left", "window_right", "stride_lb", "stride_lh",
    ]
)  # fmt: skip
def dbias_kernel(  # noqa: PLR0915 (a kernel is one function)
    q, k, v, qv, dout, lse, delta, dbias,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, alibi_slopes, bias,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_qvb, stride_qvs, stride_qvh, stride_gb, stride_gs, stride_gh, stride_lb, stride_lh,
    stride_slopes, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    softmax_scale, softcap, window_left, window_right, dropout_p, dropout_seed,
    batch, heads, seqlen_q, seqlen_k, max_seqlen_q, max_seqlen_k, m_tiles, n_tiles,
    SUM_B: tl.constexpr, SUM_H: tl.constexpr, SUM_Q: tl.constexpr, SUM_K: tl.constexpr, QUERIES_PER_KEY: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of dbias (contiguous, the bias's own shape): dS summed over the axes that broadcast the bias."""
    pid = tl.program_id(0)
    bias_n_tiles = 1 if SUM_K else n_tiles
    bias_m_tiles = 1 if SUM_Q else m_tiles
    bias_heads = 1 if SUM_H else heads
    n_own = pid % bias_n_tiles
    m_own = (pid // bias_n_tiles) % bias_m_tiles
    h_own = (pid // (bias_n_tiles * bias_m_tiles)) % bias_heads
    b_own = pid // (bias_n_tiles * bias_m_tiles * bias_heads)
    d = tl.arange(0, BLOCK_D)
    dvs = tl.arange(0, BLOCK_DV)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for b in range(b_own, batch if SUM_B else b_own + 1):
        start_q, length_q = sequence(b, cu_seqlens_q, seqused_q, seqlen_q)
        start_k, length_k = sequence(b, cu_seqlens_k, seqused_k, seqlen_k)
        shift = length_k - length_q
        leftpad = 0
        if leftpad_k is not None:
            leftpad = tl.load(leftpad_k + b)
        for h in range(h_own, heads if SUM_H else h_own + 1):
            at_b = tl.zeros((), tl.int64) + b
            at_h = tl.zeros((), tl.int64) + h
            at_hk = at_h // QUERIES_PER_KEY
            slope = None
            if alibi_slopes is not None:
                slope = tl.load(alibi_slopes + b * stride_slopes + h)
            bias_rows = bias + at_b * stride_bias_b + at_h * stride_bias_h
            for m_tile in range(m_own, m_tiles if SUM_Q else m_own + 1):
                i = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
                row_used = i < length_q
                row = (start_q + i)[:, None]
                q_rows = q + at_b * stride_qb + row * stride_qs + at_h * stride_qh
                g_rows = dout + at_b * stride_gb + row * stride_gs + at_h * stride_gh
                q_tile = load_rows(q_rows, d, row_used, HEAD_DIM, BLOCK_D, True)
                g_tile = load_rows(g_rows, dvs, row_used, HEAD_DIM_V, BLOCK_DV, True)
                statistics = at_b * stride_lb + at_h * stride_lh + start_q
                row_lse, row_delta = load_row_statistics(lse + statistics, delta + statistics, i, length_q, True)
                for n_tile in range(n_own, n_tiles if SUM_K else n_own + 1):
                    j = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
                    key_used = (j >= leftpad) & (j < length_k)
                    key_row = (start_k + j)[:, None]
                    k_rows = k + at_b * stride_kb + key_row * stride_ks + at_hk * stride_kh
                    v_rows = v + at_b * stride_vb + key_row * stride_vs + at_hk * stride_vh
                    k_tile = load_rows(k_rows, d, key_used, HEAD_DIM, BLOCK_D, True)
                    v_tile = load_rows(v_rows, dvs, key_used, HEAD_DIM_V, BLOCK_DV, True)
                    s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                    if qv is not None:
                        qv_rows = qv + at_b * stride_qvb + row * stride_qvs + at_h * stride_qvh
                        qv_tile = load_rows(qv_rows, dvs, row_used, HEAD_DIM_V, BLOCK_DV, True)
                        s = tl.dot(qv_tile, tl.trans(v_tile), s, input_precision="ieee")
                    in_range = row_used[:, None] & key_used[None, :]
                    p, _ = probabilities(
                        s, row_lse[:, None], i[:, None], j[None, :], in_range, leftpad, length_k, shift,
                        window_left, window_right, softmax_scale, softcap, slope, bias_rows, stride_bias_q,
                        stride_bias_k, True,
                    )  # fmt: skip
                    dp = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
                    if dropout_p is not None:
                        keep = dropout_keep(
                            dropout_seed, dropout_p, b * heads + h, i[:, None], j[None, :], max_seqlen_q, max_seqlen_k
                        )
                        dp = tl.where(keep, dp / (1 - dropout_p), 0.0)
                    acc += p * (dp - row_delta[:, None])

    if SUM_Q:
        acc = tl.sum(acc, 0)[None, :]
        i = tl.zeros((1,), tl.int32)
    else:
        i = m_own * BLOCK_M + tl.arange(0, BLOCK_M)
    if SUM_K:
        acc = tl.sum(acc, 1)[:, None]
        j = tl.zeros((1,), tl.int32)
    else:
        j = n_own * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = 1 if SUM_Q else max_seqlen_q
    columns = 1 if SUM_K else max_seqlen_k
    at = ((b_own.to(tl.int64) * bias_heads + h_own) * rows + i[:, None]) * columns + j[None, :]
    mask = (i < rows)[:, None] & (j < columns)[None, :]
    tl.store(dbias + at, acc.to(dbias.dtype.element_ty), mask=mask)
