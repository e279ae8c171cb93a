"""The code of dense_backward.py: imported only to compile it, so that a warm start needs no Numba."""

import math

from llvmlite import ir
from numba import njit

from octavo.kernels.cpu.dense_backward import ROW_FIELDS, Layout
from octavo.kernels.cpu.dense_calls import KEYS, ROWS
from octavo.kernels.cpu.dense_tiles_code import (
    as_bf16,
    bound_offsets,
    exp2,
    join_pairs,
    make_interleave,
    make_load_tile,
    make_tile_product,
    make_transpose,
    make_write_row,
    make_zero,
    next_number,
)
from octavo.kernels.cpu.simd import (
    F32,
    I32,
    I64,
    LANES,
    emitted,
    f32,
    float_argument,
    i64,
    int_argument,
    thread,
    vector,
)

_jit = njit(error_model="numpy")


def make_scores_to_gradients(masked, capped, pairs):
    """Two rows of a tile: scores become probabilities, dP becomes dS.

    `rows` holds LSE · log₂e and δ of each row, ROWS apart; `bounds` four int64, the first key that each row sees and
    the one after the last. With `pairs` the results go to p_pairs and ds_pairs (the two rows side by side) and ds_rows
    in bf16, else they stay in place. factors: scale · log₂e, or with a cap scale / cap and cap · log₂e.
    """
    lanes = ir.Constant(vector(I32), list(range(LANES)))

    def emit(code, scores, dprobs, rows, factors, bounds, p_pairs, ds_pairs, ds_rows):
        b = code.b
        factor, cap = (code.splat_load(code.offset(factors, at), F32) for at in (0, 4))
        for i in range(KEYS // LANES):
            results = []
            for r in range(2):
                lse, delta = (code.splat_load(code.offset(rows, 4 * (r + ROWS * part)), F32) for part in (0, 1))
                at = 4 * (KEYS * r + LANES * i)
                x = code.load(code.offset(scores, at), vector(F32))
                if capped:
                    tanh = code.tanh(b.fmul(x, factor))
                    x = code.fma(tanh, cap, b.fneg(lse))
                else:
                    x = code.fma(x, factor, b.fneg(lse))
                p = exp2(code, x)
                if masked:
                    low, high = (
                        code.splat(b.trunc(code.load(code.offset(bounds, 8 * (2 * r + end)), I64), I32))
                        for end in (0, 1)
                    )
                    index = b.add(lanes, code.constant(LANES * i, I32))
                    seen = b.and_(b.icmp_signed(">=", index, low), b.icmp_signed("<", index, high))
                    p = b.select(seen, p, code.constant(0.0))
                dprob = code.load(code.offset(dprobs, at), vector(F32))
                ds = b.fmul(p, b.fsub(dprob, delta))
                if capped:
                    ds = b.fmul(ds, b.fsub(code.constant(1.0), b.fmul(tanh, tanh)))
                if not pairs:
                    code.store(p, code.offset(scores, at))
                    code.store(ds, code.offset(dprobs, at))
                results.append((p, ds))
            if pairs:
                (p0, ds0), (p1, ds1) = ([as_bf16(code, x) for x in row] for row in results)
                code.store(join_pairs(code, p0, p1), code.offset(p_pairs, 64 * i))
                code.store(join_pairs(code, ds0, ds1), code.offset(ds_pairs, 64 * i))
                code.store(ds0, code.offset(ds_rows, 32 * i))
                code.store(ds1, code.offset(ds_rows, 2 * KEYS + 32 * i))

    return emitted(emit)


# ---- the kernel ------------------------------------------------------------------------------------------------------


def make_load_keys(layout, dtype, pairs):
    """K and V of a tile: transposed, for the scores and dP; K once more by rows, for dQ."""
    d, dv = layout.head_dim, layout.head_dim_v
    kt, vt, kb, raw = layout.k_transposed, layout.v_transposed, layout.k_rows, layout.raw
    load_k, load_v = (make_load_tile(n, dtype, pairs) for n in (d, dv))
    words_k, words_v = (d // 2, dv // 2) if pairs else (d, dv)
    transpose_k, transpose_v = make_transpose(words_k), make_transpose(words_v)
    interleave = make_interleave(KEYS, d)

    @_jit
    def load_keys(scratch, k, k_stride, v, v_stride, count):
        load_v(v, v_stride, count, scratch + raw, KEYS)
        transpose_v((scratch + raw, scratch + vt))
        if pairs:
            load_k(k, k_stride, count, scratch + raw, KEYS)
            transpose_k((scratch + raw, scratch + kt))
            interleave((scratch + raw, scratch + kb))
        else:
            load_k(k, k_stride, count, scratch + kb, KEYS)
            transpose_k((scratch + kb, scratch + kt))

    return load_keys


def make_load_rows(layout, dtype, pairs):
    """q and dO of a tile of rows, with LSE · log₂e (+∞ in rows that are not there) and δ."""
    d, dv = layout.head_dim, layout.head_dim_v
    q_at, do_at, q_pairs, do_pairs, stats = layout.q, layout.dout, layout.q_pairs, layout.dout_pairs, layout.statistics
    load_q, load_do = (make_load_tile(n, dtype, pairs) for n in (d, dv))
    interleave_q, interleave_do = make_interleave(ROWS, d), make_interleave(ROWS, dv)
    log2e, infinite = math.log2(math.e), math.inf

    @_jit
    def load_rows(scratch, q, q_stride, dout, dout_stride, lse, delta, count):
        load_q(q, q_stride, count, scratch + q_at, ROWS)
        load_do(dout, dout_stride, count, scratch + do_at, ROWS)
        if pairs:
            interleave_q((scratch + q_at, scratch + q_pairs))
            interleave_do((scratch + do_at, scratch + do_pairs))
        for r in range(ROWS):
            inside = r < count
            f32(scratch + stats)[r] = f32(lse)[r] * log2e if inside else infinite
            f32(scratch + stats)[ROWS + r] = f32(delta)[r] if inside else 0.0

    return load_rows


def make_gradients(layout, capped, pairs):
    """Probabilities and dS of a tile out of its scores and dP; row r sees keys low + r … high + r − 1."""
    stats, bounds = layout.statistics, layout.bounds
    s, dp, factors = layout.scores, layout.dprobs, layout.factors
    pp, dsp, dsr = layout.p_pairs, layout.ds_pairs, layout.ds_rows
    plain, masked = (make_scores_to_gradients(is_masked, capped, pairs) for is_masked in (False, True))

    @_jit
    def gradients(scratch, is_masked, low, high, count):
        for r in range(0, ROWS, 2):
            for i in range(2):
                i64(scratch + bounds)[2 * i] = max(low + r + i, 0)
                i64(scratch + bounds)[2 * i + 1] = min(high + r + i, count)
            at = 4 * KEYS * r
            arguments = (
                scratch + s + at, scratch + dp + at, scratch + stats + 4 * r, scratch + factors, scratch + bounds,
                scratch + pp + at // 2, scratch + dsp + at // 2, scratch + dsr + at // 2,
            )  # fmt: skip
            if is_masked:
                masked(arguments)
            else:
                plain(arguments)

    return gradients


def make_tile(layout, capped, pairs):
    """The five products of a tile of rows and keys, of which dK, dV and dQ grow."""
    d, dv = layout.head_dim, layout.head_dim_v
    size, per_word = (2, 2) if pairs else (4, 1)
    scores = make_tile_product(ROWS, KEYS, d * size, 4, False, pairs)
    dprobs = make_tile_product(ROWS, KEYS, dv * size, 4, False, pairs)
    add_dv = make_tile_product(KEYS, dv, 4, 4 * KEYS, True, pairs)
    add_dk = make_tile_product(KEYS, d, 4, 4 * KEYS, True, pairs)
    add_dq = make_tile_product(ROWS, d, KEYS * size, 4, True, pairs)
    gradients = make_gradients(layout, capped, pairs)
    kt, vt, kb, s, dp = layout.k_transposed, layout.v_transposed, layout.k_rows, layout.scores, layout.dprobs
    q, do, dk_at, dv_at = layout.q, layout.dout, layout.dk, layout.dv
    # what the last three multiply: p and dS with rows summed, dS with keys summed, dO and q by rows
    p_by_row, ds_by_row, ds_by_key, do_rows, q_rows = (
        (layout.p_pairs, layout.ds_pairs, layout.ds_rows, layout.dout_pairs, layout.q_pairs)
        if pairs
        else (s, dp, dp, do, q)
    )

    @_jit
    def tile(scratch, dq, is_masked, low, high, count):
        scores(scratch + q, scratch + kt, scratch + s, d // per_word)
        dprobs(scratch + do, scratch + vt, scratch + dp, dv // per_word)
        gradients(scratch, is_masked, low, high, count)
        add_dv(scratch + p_by_row, scratch + do_rows, scratch + dv_at, ROWS // per_word)
        add_dk(scratch + ds_by_row, scratch + q_rows, scratch + dk_at, ROWS // per_word)
        add_dq(scratch + ds_by_key, scratch + kb, dq, KEYS // per_word)

    return tile


def make_key_tile(layout, dtype, capped, pairs):
    """All rows of one head against one tile of keys."""
    d = layout.head_dim
    load_rows, tile = make_load_rows(layout, dtype, pairs), make_tile(layout, capped, pairs)

    @_jit
    def key_tile(p, scratch, q, dout, lse, delta, dq, rows, shift, first, count):
        """shift: the diagonal of row 0. first: the tile's first key."""
        q_stride, dout_stride = int_argument(p, 6), int_argument(p, 8)
        low, high = bound_offsets(int_argument(p, 21), int_argument(p, 22))
        for row in range(max(0, first - shift - high + 1), min(rows, first + count - shift - low), ROWS):
            here, at = min(ROWS, rows - row), row + shift - first
            q_row, dout_row = q + row * q_stride, dout + row * dout_stride
            load_rows(scratch, q_row, q_stride, dout_row, dout_stride, lse + 4 * row, delta + 4 * row, here)
            is_masked = count < KEYS or at + here - 1 + low > 0 or at + high < KEYS
            tile(scratch, dq + 4 * d * row, is_masked, at + low, at + high, count)

    return key_tile


def make_kernel(head_dim, head_dim_v, dtype, pairs, capped):
    layout = Layout(head_dim, head_dim_v)
    load_keys, zero = make_load_keys(layout, dtype, pairs), make_zero()
    key_tile = make_key_tile(layout, dtype, capped, pairs)
    write_d, write_dv = make_write_row(head_dim, dtype), make_write_row(head_dim_v, dtype)
    dk_at, dv_at, factors = layout.dk, layout.dv, layout.factors
    log2e = math.log2(math.e)

    @_jit
    def add_keys(p, where, scratch, work, part, first, count):
        """dK and dV of a tile of keys, and its share of dQ."""
        kv_head = part // int_argument(p, 5)
        rows, keys, group = i64(where)[1], i64(where)[2], int_argument(p, 4)
        k = i64(where)[8] + kv_head * int_argument(p, 13) + first * int_argument(p, 12)
        v = i64(where)[9] + kv_head * int_argument(p, 15) + first * int_argument(p, 14)
        load_keys(scratch, k, int_argument(p, 12), v, int_argument(p, 14), count)
        zero((scratch + dk_at, KEYS * head_dim // LANES))
        zero((scratch + dv_at, KEYS * head_dim_v // LANES))
        for head in range(group):
            h = part * group + head
            q, dout = i64(where)[3] + h * int_argument(p, 7), i64(where)[4] + h * int_argument(p, 9)
            lse, delta = i64(where)[6] + h * int_argument(p, 20), i64(where)[7] + h * int_argument(p, 20)
            dq = work + head * (rows + ROWS) * head_dim * 4
            key_tile(p, scratch, q, dout, lse, delta, dq, rows, keys - rows, first, count)
        dk = i64(where)[10] + part * int_argument(p, 17) + first * int_argument(p, 16)
        dv = i64(where)[11] + part * int_argument(p, 19) + first * int_argument(p, 18)
        for j in range(count):
            write_d((scratch + dk_at + 4 * head_dim * j, scratch + factors + 8, dk + j * int_argument(p, 16)))
            write_dv((scratch + dv_at + 4 * head_dim_v * j, scratch + factors + 12, dv + j * int_argument(p, 18)))

    @_jit
    def run_job(p, where, scratch, work, part):
        """A part of one key head's query heads, of one sequence, `where` its row of the table."""
        rows, keys, group = i64(where)[1], i64(where)[2], int_argument(p, 4)
        of_head = (rows + ROWS) * head_dim * 4
        zero((work, group * of_head // 64))
        for first in range(0, keys, KEYS):
            add_keys(p, where, scratch, work, part, first, min(KEYS, keys - first))
        for head in range(group):
            dq = i64(where)[5] + (part * group + head) * int_argument(p, 11)
            for row in range(rows):
                source = work + head * of_head + 4 * head_dim * row
                write_d((source, scratch + factors + 8, dq + row * int_argument(p, 10)))

    def kernel(p):
        me = thread(p)
        scratch, work = int_argument(p, 23) + me * int_argument(p, 24), int_argument(p, 25) + me * int_argument(p, 26)
        scale, cap = float_argument(p, 27), float_argument(p, 28)
        f32(scratch + factors)[0] = scale / cap if capped else scale * log2e
        f32(scratch + factors)[1] = cap * log2e
        f32(scratch + factors)[2] = scale
        f32(scratch + factors)[3] = 1.0
        where, sequence = int_argument(p, 0), 0
        number = next_number(int_argument(p, 2))
        while number < int_argument(p, 3):
            while sequence + 1 < int_argument(p, 1) and i64(where)[ROW_FIELDS] <= number:
                sequence, where = sequence + 1, where + 8 * ROW_FIELDS
            run_job(p, where, scratch, work, number - i64(where)[0])
            number = next_number(int_argument(p, 2))

    return kernel
