"""The code of dense_forward.py: imported only to compile it, so that a warm start needs no Numba."""

import math

from llvmlite import ir
from numba import njit

from octavo.kernels.cpu.dense_calls import KEYS, ROWS
from octavo.kernels.cpu.dense_forward import ROW_FIELDS, Layout
from octavo.kernels.cpu.dense_tiles_code import (
    as_bf16,
    bound_offsets,
    exp2,
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
    LANES,
    Code,
    emitted,
    exp,
    f32,
    float_argument,
    i64,
    int_argument,
    thread,
    vector,
)

_jit = njit(error_model="numpy")


# ---- emitted pieces --------------------------------------------------------------------------------------------------


def larger(code: Code, x, y):
    """The larger of two, NaN if y is."""
    return code.b.select(code.b.fcmp_ordered(">", x, y), x, y)


def largest_of(code: Code, vectors):
    """The largest of all lanes of all vectors, in every lane."""
    while len(vectors) > 1:
        vectors = [larger(code, x, y) for x, y in zip(vectors[::2], vectors[1::2], strict=True)]
    x = vectors[0]
    for distance in (8, 4, 2, 1):
        mask = ir.Constant(vector(I32), [i ^ distance for i in range(LANES)])
        x = larger(code, x, code.b.shuffle_vector(x, x, mask))
    return x


def make_softmax_row(head_dim_v, masked, capped, pairs):
    """One row's step of the online softmax: scores become weights; maximum, totals and output are brought up to date.

    factors: scale · log₂e, or with a cap scale / cap and cap · log₂e. Keys low to high − 1 of the tile are seen.
    """
    lanes = ir.Constant(vector(I32), list(range(LANES)))

    def emit(code, scores, weights, factors, maximum, totals, out, low, high):
        b = code.b
        factor, cap = (code.splat_load(code.offset(factors, i), F32) for i in (0, 4))
        x = [b.fmul(code.load(code.offset(scores, 64 * i), vector(F32)), factor) for i in range(KEYS // LANES)]
        if capped:
            x = [b.fmul(code.tanh(y), cap) for y in x]
        if masked:
            first, last = (code.splat(b.trunc(y, I32)) for y in (low, high))
            for i, y in enumerate(x):
                index = b.add(lanes, code.constant(LANES * i, I32))
                seen = b.and_(b.icmp_signed(">=", index, first), b.icmp_signed("<", index, last))
                x[i] = b.select(seen, y, code.constant(-math.inf))
        before = code.splat_load(maximum, F32)
        new = larger(code, before, largest_of(code, x))
        nothing = b.fcmp_ordered("==", new, code.constant(-math.inf))
        base = b.select(nothing, code.constant(0.0), new)
        total = code.constant(0.0)
        for i, y in enumerate(x):
            p = exp2(code, b.fsub(y, base))
            total = b.fadd(total, p)
            if pairs:
                code.store(as_bf16(code, p), code.offset(weights, 32 * i))
            else:
                code.store(p, code.offset(scores, 64 * i))
        was, now = (b.extract_element(y, I32(0)) for y in (before, new))
        with b.if_then(b.fcmp_unordered("!=", was, now)):
            fade = exp2(code, b.fsub(before, base))
            code.store(now, maximum)
            for at in (totals, *(code.offset(out, 4 * i) for i in range(0, head_dim_v, LANES))):
                code.store(b.fmul(code.load(at, vector(F32)), fade), at)
        code.store(b.fadd(code.load(totals, vector(F32)), total), totals)

    return emitted(emit)


def make_sum_lanes():
    """target[0] = Σ source[16]."""

    def emit(code, source, target):
        code.store(code.reduce("add", code.load(source, vector(F32))), target)

    return emitted(emit)


# ---- the kernel ------------------------------------------------------------------------------------------------------


def make_load_keys(layout, dtype, pairs):
    """K of a tile transposed, V by rows."""
    d, dv = layout.head_dim, layout.head_dim_v
    kt, vb, raw = layout.k_transposed, layout.v_rows, layout.raw
    load_k, load_v = make_load_tile(d, dtype, pairs), make_load_tile(dv, dtype, pairs)
    transpose, interleave = make_transpose(d // 2 if pairs else d), make_interleave(KEYS, dv)

    @_jit
    def load_keys(scratch, k, k_stride, v, v_stride, count):
        load_k(k, k_stride, count, scratch + raw, KEYS)
        transpose((scratch + raw, scratch + kt))
        if pairs:
            load_v(v, v_stride, count, scratch + raw, KEYS)
            interleave((scratch + raw, scratch + vb))
        else:
            load_v(v, v_stride, count, scratch + vb, KEYS)

    return load_keys


def make_tile(layout, pairs, capped):
    """A tile of rows and keys; row r sees keys low + r … high + r − 1 of it."""
    d, dv, size = layout.head_dim, layout.head_dim_v, 2 if pairs else 4
    scores = make_tile_product(ROWS, KEYS, d * size, 4, False, pairs)
    add_values = make_tile_product(ROWS, dv, KEYS * size, 4, True, pairs)
    plain, masked = (make_softmax_row(dv, is_masked, capped, pairs) for is_masked in (False, True))
    kt, vb, s, factors = layout.k_transposed, layout.v_rows, layout.scores, layout.factors
    weights = layout.weights if pairs else s
    steps_d, steps_keys = (d // 2, KEYS // 2) if pairs else (d, KEYS)

    @_jit
    def tile(scratch, q, out, totals, maxima, is_masked, low, high, count):
        scores(q, scratch + kt, scratch + s, steps_d)
        for r in range(ROWS):
            arguments = (
                scratch + s + 4 * KEYS * r, scratch + weights + size * KEYS * r, scratch + factors, maxima + 4 * r,
                totals + 64 * r, out + 4 * dv * r, max(low + r, 0), min(high + r, count),
            )  # fmt: skip
            if is_masked:
                masked(arguments)
            else:
                plain(arguments)
        add_values(scratch + weights, scratch + vb, out, steps_keys)

    return tile


def make_write_rows(layout, dtype):
    """Normalised rows, and of each its maximum and its total, the sink's share in both."""
    dv, factors = layout.head_dim_v, layout.factors
    sum_lanes, write_row = make_sum_lanes(), make_write_row(dv, dtype)
    log2e = math.log2(math.e)

    @_jit
    def write_rows(p, scratch, out, totals, maxima, count, target, highest, sums, sink):
        stats = f32(scratch + factors)
        for r in range(count):
            sum_lanes((totals + 64 * r, scratch + factors + 8))
            largest, total, fade = f32(maxima)[r], stats[2], stats[3]
            if sink != 0:
                sink_score = f32(sink)[0] * log2e
                new = max(largest, sink_score)
                fade = exp((largest - new) / log2e)
                total = total * fade + exp((sink_score - new) / log2e)
                largest = new
            stats[4] = fade / total if total != 0 else 0.0
            write_row((out + 4 * dv * r, scratch + factors + 16, target + r * int_argument(p, 9)))
            f32(highest)[r], f32(sums)[r] = largest, total

    return write_rows


def make_block(layout, dtype, pairs, capped):
    """The keys of a block of rows: tiles of keys outside, heads and tiles of rows inside."""
    d, dv, size = layout.head_dim, layout.head_dim_v, 2 if pairs else 4
    load_keys, tile = make_load_keys(layout, dtype, pairs), make_tile(layout, pairs, capped)

    @_jit
    def block(p, scratch, k, v, q, out, totals, maxima, rows, first_diagonal, keys):
        per_head, group = int_argument(p, 4), int_argument(p, 5)
        low, high = bound_offsets(int_argument(p, 16), int_argument(p, 17))
        for j in range(max(0, first_diagonal + low), min(keys, first_diagonal + rows - 1 + high), KEYS):
            count = min(KEYS, keys - j)
            k_stride, v_stride = int_argument(p, 11), int_argument(p, 13)
            load_keys(scratch, k + j * k_stride, k_stride, v + j * v_stride, v_stride, count)
            for row in range(0, rows, ROWS):
                here, at = min(ROWS, rows - row), first_diagonal + row - j
                if at + low >= count or at + here - 1 + high <= 0:
                    continue
                is_masked = count < KEYS or at + here - 1 + low > 0 or at + high < KEYS
                for head in range(group):
                    r = head * per_head + row
                    tile(
                        scratch, q + r * d * size, out + r * dv * 4, totals + r * 64, maxima + r * 4,
                        is_masked, at + low, at + high, count,
                    )  # fmt: skip

    return block


def make_kernel(head_dim, head_dim_v, dtype, pairs, capped):
    layout = Layout(head_dim, head_dim_v)
    size, factors = 2 if pairs else 4, layout.factors
    load_q, zero, write_rows = make_load_tile(head_dim, dtype, pairs), make_zero(), make_write_rows(layout, dtype)
    attend = make_block(layout, dtype, pairs, capped)
    log2e = math.log2(math.e)

    @_jit
    def run_job(p, where, scratch, work, kv_head, first):
        """Rows from `first` of one sequence, `where` its row of the table, for the heads of one key head."""
        per_head, group = int_argument(p, 4), int_argument(p, 5)
        rows, keys = i64(where)[1], i64(where)[2]
        here, all_rows = min(per_head, rows - first), group * per_head
        q_at, out_at = work, work + all_rows * head_dim * 4
        totals, maxima = out_at + all_rows * head_dim_v * 4, out_at + all_rows * (head_dim_v * 4 + 64)
        zero((out_at, all_rows * (head_dim_v + LANES) // LANES))
        for r in range(all_rows):
            f32(maxima)[r] = -math.inf
        q = i64(where)[3] + first * int_argument(p, 7) + kv_head * group * int_argument(p, 8)
        for head in range(group):
            target = q_at + head * per_head * head_dim * size
            load_q(q + head * int_argument(p, 8), int_argument(p, 7), here, target, per_head)
        k, v = i64(where)[7] + kv_head * int_argument(p, 12), i64(where)[8] + kv_head * int_argument(p, 14)
        attend(p, scratch, k, v, q_at, out_at, totals, maxima, here, first + keys - rows, keys)
        for head in range(group):
            at, h = head * per_head, kv_head * group + head
            out = i64(where)[4] + first * int_argument(p, 9) + h * int_argument(p, 10)
            statistics = h * int_argument(p, 15) + 4 * first
            sink = int_argument(p, 18) + 4 * h if int_argument(p, 18) != 0 else 0
            write_rows(
                p, scratch, out_at + at * head_dim_v * 4, totals + at * 64, maxima + at * 4, here, out,
                i64(where)[5] + statistics, i64(where)[6] + statistics, sink,
            )  # fmt: skip

    def kernel(p):
        me = thread(p)
        scratch, work = int_argument(p, 19) + me * int_argument(p, 20), int_argument(p, 21) + me * int_argument(p, 22)
        scale, cap = float_argument(p, 23), float_argument(p, 24)
        f32(scratch + factors)[0] = scale / cap if capped else scale * log2e
        f32(scratch + factors)[1] = cap * log2e
        f32(scratch + factors)[3] = 1.0
        where, sequence = int_argument(p, 0), 0
        number = next_number(int_argument(p, 2))
        while number < int_argument(p, 3):
            while sequence + 1 < int_argument(p, 1) and i64(where)[ROW_FIELDS] <= number:
                sequence, where = sequence + 1, where + 8 * ROW_FIELDS
            per_head = int_argument(p, 4)
            blocks = (i64(where)[1] + per_head - 1) // per_head
            job = number - i64(where)[0]
            # under a causal mask the last blocks are the longest: they come first
            run_job(p, where, scratch, work, job // blocks, (blocks - 1 - job % blocks) * per_head)
            number = next_number(int_argument(p, 2))

    return kernel
