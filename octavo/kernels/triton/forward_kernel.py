"""The forward kernel of every attention here: dense, packed, paged, split over keys, grouped heads, latent (MLA).

One program holds a tile of query rows and walks the keys they can see, with the running maximum m, denominator l and
output of the online softmax (Dao et al., "FlashAttention", 2022). Three things it does beyond that:

* Keys come in three phases: the left edge of the window, the interior where every row sees every key, the right edge.
  Only the edges pay for masks, and the interior may load by TMA.
* GROUP_ROWS > 1 packs the query heads that share a key head into the rows of one tile ("PackGQA"), so that decoding
  reads each key once: row r is query r // GROUP_ROWS of head `head · GROUP_ROWS + r % GROUP_ROWS`.
* A key of HEAD_DIM = BLOCK_D + a tail is multiplied in two parts (192 = 128 + 64, 576 = 512 + 64), which pads less than
  the next power of two; with V_IS_K the value is the first part of the key, so an MLA latent is read once.

Scores are kept in units of log 2: exp2 is what the hardware has.
"""

import triton
import triton.language as tl

from octavo.kernels.triton.scores import LN2, LOG2E, add_position_terms, dropout_keep, sequence, tanh, visible
from octavo.kernels.triton.split_kv import split_of_slot


@triton.jit
def load_rows(pointers, d, used, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows of WIDTH numbers from `pointers` (R, 1) as (R, BLOCK), 0 where `used` (R,) is false and past WIDTH."""
    if MASKED and WIDTH < BLOCK:
        return tl.load(pointers + d[None, :], mask=used[:, None] & (d < WIDTH)[None, :], other=0.0)
    elif MASKED:
        return tl.load(pointers + d[None, :], mask=used[:, None], other=0.0)
    elif WIDTH < BLOCK:
        return tl.load(pointers + d[None, :], mask=(d < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(pointers + d[None, :])


@triton.jit
def key_offsets(
    n, first_key, end_key, table, stride_kb, stride_ks, stride_vb, stride_vs,
    PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Offsets (BLOCK_N,) int64 of keys n, n + 1, … in k and in v, through the block table where there is one."""
    j = n + tl.arange(0, BLOCK_N)
    if table is None:
        j = j.to(tl.int64)
        return j * stride_ks, j * stride_vs
    else:
        if PAGE_SIZE % BLOCK_N == 0:  # tiles start at multiples of BLOCK_N: one page holds this one
            page = tl.load(table + n // PAGE_SIZE).to(tl.int64)
            slot = n % PAGE_SIZE + tl.arange(0, BLOCK_N)
        elif MASKED:
            page = tl.load(table + j // PAGE_SIZE, mask=(j >= first_key) & (j < end_key), other=0).to(tl.int64)
            slot = j % PAGE_SIZE
        else:
            page = tl.load(table + j // PAGE_SIZE).to(tl.int64)
            slot = j % PAGE_SIZE
        return page * stride_kb + slot * stride_ks, page * stride_vb + slot * stride_vs


@triton.jit
def key_range(i_first, i_last, leftpad, length_k, shift, window_left, window_right, BLOCK_N: tl.constexpr):
    """(first, end) keys that rows i_first … i_last can see; (full, full_end), tile-aligned, those that all do."""
    first = leftpad
    full = leftpad
    end = length_k
    full_end = length_k
    if window_left is not None:
        first = tl.maximum(first, i_first + shift - window_left)
        full = tl.maximum(full, i_last + shift - window_left)
    if window_right is not None:
        end = tl.minimum(end, i_last + shift + window_right + 1)
        full_end = tl.minimum(full_end, i_first + shift + window_right + 1)
    end = tl.maximum(end, first)
    full = tl.minimum(tl.cdiv(full, BLOCK_N), tl.cdiv(end, BLOCK_N)) * BLOCK_N
    full_end = tl.maximum(tl.maximum(full_end, 0) // BLOCK_N * BLOCK_N, full)
    return first, end, full, full_end


@triton.jit(
    do_not_specialize=[
        "seqlen_q", "seqlen_k", "max_seqlen_q", "max_seqlen_k", "dropout_seed", "batch", "m_tiles", "split_target",
        "split_max_keys", "num_splits", "capacity", "window_left", "window_right", "stride_lh", "stride_lb",
        "stride_table",
    ]
)  # fmt: skip
def forward_kernel(  # noqa: C901, PLR0915 (a kernel is one function)
    q, k, v, qv, out, lse, k_descriptor, v_descriptor,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, block_table,
    alibi_slopes, sink, bias,
    partial_out, partial_lse, split_ranges,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_qvb, stride_qvs, stride_qvh, stride_ob, stride_os, stride_oh, stride_lb, stride_lh,
    stride_table, stride_slopes, stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    softmax_scale, softcap, window_left, window_right, dropout_p, dropout_seed,
    batch, heads, seqlen_q, seqlen_k, max_seqlen_q, max_seqlen_k, m_tiles, split_target, num_splits, split_max_keys,
    capacity,
    GROUP_ROWS: tl.constexpr, QUERIES_PER_KEY: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
    V_IS_K: tl.constexpr, SPLIT: tl.constexpr, WHOLE_TILES: tl.constexpr,
):  # fmt: skip
    """Output and LSE of one tile of rows; strides in elements, the last axis contiguous. See `launch_forward`.

    Both descriptors are given or neither: two-dimensional views (all rows, all heads' columns) of k and v.
    """
    pid = tl.program_id(0)
    if SPLIT:  # heads are neighbours in a page, so run them side by side
        head = pid % heads
        m_tile = (pid // heads) % m_tiles
        b, first_slot, splits = split_of_slot(
            pid // (heads * m_tiles), batch, seqused_k, split_target, num_splits, split_max_keys, BLOCK_N, BLOCK_B
        )
        split = pid // (heads * m_tiles) - first_slot
        if b == batch:
            return
        if (split == 0) & (head == 0) & (m_tile == 0):
            tl.store(split_ranges + 2 * b, first_slot)
            tl.store(split_ranges + 2 * b + 1, splits)
    else:  # tiles of one head run side by side, the longest of a causal mask first
        m_tile = m_tiles - 1 - pid % m_tiles
        head = (pid // m_tiles) % heads
        b = pid // (m_tiles * heads)
    start_q, length_q = sequence(b, cu_seqlens_q, seqused_q, seqlen_q)
    start_k, length_k = sequence(b, cu_seqlens_k, seqused_k, seqlen_k)
    if block_table is not None:
        length_k = tl.minimum(length_k, capacity)
    if m_tile * BLOCK_M >= length_q * GROUP_ROWS:
        return
    b64 = b.to(tl.int64)

    r = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    i = r // GROUP_ROWS
    row_used = i < length_q
    h = head * GROUP_ROWS + r % GROUP_ROWS
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    q_rows = q + b64 * stride_qb + (start_q + i)[:, None] * stride_qs + h.to(tl.int64)[:, None] * stride_qh
    DIM_MAIN: tl.constexpr = BLOCK_D if BLOCK_TAIL > 0 else HEAD_DIM
    q_tile = load_rows(q_rows, d, row_used, DIM_MAIN, BLOCK_D, True)
    if BLOCK_TAIL > 0:
        d_tail = tl.arange(0, BLOCK_TAIL)
        q_tail = load_rows(q_rows + BLOCK_D, d_tail, row_used, HEAD_DIM - BLOCK_D, BLOCK_TAIL, True)
    if qv is not None:
        qv_rows = qv + b64 * stride_qvb + (start_q + i)[:, None] * stride_qvs + h.to(tl.int64)[:, None] * stride_qvh
        qv_tile = load_rows(qv_rows, dv, row_used, HEAD_DIM_V, BLOCK_DV, True)

    key_head = (head * GROUP_ROWS // QUERIES_PER_KEY).to(tl.int64)
    k_base = k + start_k * stride_ks + key_head * stride_kh
    v_base = v + start_k * stride_vs + key_head * stride_vh
    if block_table is None:
        table = None
        k_base += b64 * stride_kb
        v_base += b64 * stride_vb
    else:
        table = block_table + b64 * stride_table
    first_row = b * seqlen_k if cu_seqlens_k is None else start_k.to(tl.int32)  # of the sequence, in the descriptors
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + b * stride_slopes + h)[:, None]
    bias_rows = None
    if bias is not None:
        bias_rows = bias + b64 * stride_bias_b + h.to(tl.int64)[:, None] * stride_bias_h

    shift = length_k - length_q
    leftpad = 0
    if leftpad_k is not None:
        leftpad = tl.load(leftpad_k + b)
    i_last = tl.minimum((m_tile * BLOCK_M + BLOCK_M - 1) // GROUP_ROWS, length_q - 1)
    first, end, full, full_end = key_range(
        m_tile * BLOCK_M // GROUP_ROWS, i_last, leftpad, length_k, shift, window_left, window_right, BLOCK_N
    )
    lo = first // BLOCK_N * BLOCK_N
    hi = end
    if SPLIT:
        keys_a_split = tl.cdiv(tl.cdiv(end - lo, BLOCK_N), splits) * BLOCK_N
        lo += split * keys_a_split
        hi = tl.minimum(end, lo + keys_a_split)

    PLAIN: tl.constexpr = softcap is None and alibi_slopes is None and bias is None
    if PLAIN:
        to_log2 = softmax_scale * LOG2E
    else:
        to_log2 = LOG2E
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for phase in tl.static_range(3):
        if phase == 0:
            start = lo
            stop = tl.minimum(full, hi)
        elif phase == 1:
            start = tl.maximum(full, lo)
            stop = tl.minimum(full_end, hi)
        else:
            start = tl.maximum(full_end, lo)
            stop = hi
        if phase == 1 or (phase == 2 and not WHOLE_TILES) or (window_left is not None or leftpad_k is not None):
            for n in tl.range(start, stop, BLOCK_N):
                n = tl.multiple_of(n, BLOCK_N)
                j = n + tl.arange(0, BLOCK_N)
                key_used = (j >= first) & (j < end)
                if phase == 1 and k_descriptor is not None:
                    k_tile = k_descriptor.load([first_row + n, (key_head * stride_kh).to(tl.int32)])
                else:
                    k_offsets, v_offsets = key_offsets(
                        n, first, end, table, stride_kb, stride_ks, stride_vb, stride_vs, PAGE_SIZE, BLOCK_N, phase != 1
                    )
                    k_rows = k_base + k_offsets[:, None]
                    k_tile = load_rows(k_rows, d, key_used, DIM_MAIN, BLOCK_D, phase != 1)
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                if BLOCK_TAIL > 0:
                    k_tail = load_rows(k_rows + BLOCK_D, d_tail, key_used, HEAD_DIM - BLOCK_D, BLOCK_TAIL, phase != 1)
                    s = tl.dot(q_tail, tl.trans(k_tail), s, input_precision="ieee")
                if V_IS_K:
                    v_tile = k_tile
                elif phase == 1 and v_descriptor is not None:
                    v_tile = v_descriptor.load([first_row + n, (key_head * stride_vh).to(tl.int32)])
                else:
                    v_tile = load_rows(v_base + v_offsets[:, None], dv, key_used, HEAD_DIM_V, BLOCK_DV, phase != 1)
                if qv is not None:
                    s = tl.dot(qv_tile, tl.trans(v_tile), s, input_precision="ieee")
                if softcap is not None:
                    s = softcap * tanh(s * (softmax_scale / softcap))
                elif not PLAIN:
                    s *= softmax_scale
                if not PLAIN:
                    in_range = row_used[:, None] & key_used[None, :]
                    s = add_position_terms(
                        s, i[:, None], j[None, :], shift, slope, bias_rows, in_range, stride_bias_q, stride_bias_k
                    )
                if phase != 1:
                    seen = visible(i[:, None], j[None, :], first, end, shift, window_left, window_right)
                    s = tl.where(seen, s, float("-inf"))
                m_new = tl.maximum(m, tl.max(s, 1) * to_log2)
                if phase != 1 or bias is not None:  # a row that has seen nothing: −inf − (−inf) is NaN
                    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
                else:
                    m_safe = m_new
                p = tl.exp2(s * to_log2 - m_safe[:, None])
                alpha = tl.exp2(m - m_safe)
                l = l * alpha + tl.sum(p, 1)
                if dropout_p is not None:
                    keep = dropout_keep(
                        dropout_seed, dropout_p, (b * heads * GROUP_ROWS + h)[:, None], i[:, None], j[None, :],
                        max_seqlen_q, max_seqlen_k,
                    )  # fmt: skip
                    p = tl.where(keep, p / (1 - dropout_p), 0.0)
                acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")
                m = m_new

    if sink is not None:
        sink_log2 = tl.load(sink + h).to(tl.float32) * LOG2E
        if SPLIT:  # one split of the sequence carries it
            sink_log2 = tl.where(split == 0, sink_log2, float("-inf"))
        m_new = tl.maximum(m, sink_log2)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m - m_safe)
        l = l * alpha + tl.exp2(sink_log2 - m_safe)
        acc *= alpha[:, None]
        m = m_new
    l = tl.where(l == 0.0, 1.0, l)  # a row that has seen nothing: 0 and −inf
    row_lse = (m + tl.log2(l)) * LN2
    result = acc / l[:, None]
    dv_used = (dv < HEAD_DIM_V)[None, :]
    if SPLIT:  # noqa: SIM102 (`splits` exists only then)
        if splits > 1:
            rows = max_seqlen_q * GROUP_ROWS
            index = ((first_slot + split).to(tl.int64) * heads + head) * rows + r
            tl.store(partial_lse + index, row_lse, mask=row_used)
            tl.store(partial_out + index[:, None] * HEAD_DIM_V + dv[None, :], result, mask=row_used[:, None] & dv_used)
            return
    out_rows = out + b64 * stride_ob + (start_q + i)[:, None] * stride_os + h.to(tl.int64)[:, None] * stride_oh
    tl.store(out_rows + dv[None, :], result.to(out.dtype.element_ty), mask=row_used[:, None] & dv_used)
    tl.store(lse + b64 * stride_lb + h.to(tl.int64) * stride_lh + start_q + i, row_lse, mask=row_used)
