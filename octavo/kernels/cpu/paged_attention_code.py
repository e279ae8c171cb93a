"""The code of paged_attention.py: imported only to compile it, so that a warm start needs no Numba."""

import math

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils

from octavo.kernels.cpu.dense_tiles_code import as_bf16, make_copy_row, multiply_add
from octavo.kernels.cpu.jit import cpu
from octavo.kernels.cpu.paged_attention import MAX_ROWS, TILE
from octavo.kernels.cpu.simd import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    barrier,
    emitted,
    exp,
    f32,
    float_argument,
    i32,
    i64,
    int_argument,
    num_threads,
    share,
    thread,
    vector,
)

DIRECT_ROWS = 7  # up to here keys are multiplied where they lie
TILE_COST = 4  # what a tile costs beside its rows, in rows
REGISTERS = 24  # of 32, for what stays in them
_SIZES = {"f32": 4, "f16": 2, "bf16": 2}
_jit = njit(error_model="numpy")


# ---- emitted pieces --------------------------------------------------------------------------------------------------


def make_load_row(width, dtype):
    """target[width] = source[width] · scale[0], as fp32."""

    def emit(code, source, scale, target):
        factor = code.splat_load(scale, F32)
        for i in range(0, width, LANES):
            value = code.load_floats(code.offset(source, i * _SIZES[dtype]), dtype)
            code.store(code.b.fmul(value, factor), code.offset(target, 4 * i))

    return emitted(emit)


def make_store_row(width, dtype):
    """target[width] = source[width] · scale[0], from fp32."""

    def emit(code, source, scale, target):
        factor = code.splat_load(scale, F32)
        for i in range(0, width, LANES):
            value = code.b.fmul(code.load(code.offset(source, 4 * i), vector(F32)), factor)
            code.store_floats(value, code.offset(target, i * _SIZES[dtype]), dtype)

    return emitted(emit)


def make_scores_direct(rows, head_dim, dtype, pairs):
    """scores[rows, 16] of 16 keys read where they lie; `keys` holds their addresses, `upcoming` those to prefetch.

    With `pairs`, queries are bf16, as the keys, and not scaled yet: a lane multiplies two neighbours of each.
    """
    size = _SIZES[dtype]
    width = head_dim // (2 * LANES if pairs else LANES)

    def load_key(code, address, i):
        if pairs:
            return code.load(code.offset(address, 64 * i), vector(F32))
        return code.load_floats(code.offset(address, LANES * size * i), dtype)

    def products(code, q, keys, upcoming, first, count):
        """Sums of each row with keys first … first + count, in 16 / count lanes each."""
        if count > 1:
            halves = [products(code, q, keys, upcoming, first + half * count // 2, count // 2) for half in range(2)]
            return [code.add_halves(x, y, 2 * LANES // count) for x, y in zip(*halves, strict=True)]
        code.prefetch(code.load(code.offset(upcoming, 8 * first), I64), head_dim * size)
        key = code.load(code.offset(keys, 8 * first), I64)
        k = [load_key(code, key, i) for i in range(width)]
        sums = [code.constant(0.0)] * rows
        for i in range(width):
            sums = [multiply_add(code, q[r][i], k[i], sums[r], pairs) for r in range(rows)]
        return sums

    def emit(code, scale, queries, keys, upcoming, scores):
        q = [
            [code.load(code.offset(queries, 4 * (r * head_dim + LANES * i)), vector(F32)) for i in range(width)]
            for r in range(rows)
        ]
        quarters = code.b.ptrtoint(cgutils.alloca_once(code.b, vector(F32), size=4 * rows), I64)
        with cgutils.for_range(code.b, I64(4)) as loop:  # given 16 keys at once, LLVM orders them so that sums spill
            here, later = (code.offset(x, (loop.index, 8 * 4)) for x in (keys, upcoming))
            for r, total in enumerate(products(code, q, here, later, 0, 4)):
                code.store(total, code.offset(quarters, (loop.index, 4 * LANES), 4 * 4 * LANES * r))
        for r in range(rows):
            a, b, c, d = (code.load(code.offset(quarters, 4 * LANES * (4 * r + i)), vector(F32)) for i in range(4))
            total = code.add_halves(code.add_halves(a, b, 4), code.add_halves(c, d, 4), 2)
            if pairs:
                total = code.b.fmul(total, code.splat_load(scale, F32))
            code.store(total, code.offset(scores, 4 * r * TILE))

    return emitted(emit)


def make_transpose_keys(head_dim, dtype):
    """target[head_dim, TILE] = keys of one group of 16, transposed."""

    def emit(code, keys, target):
        addresses = [code.load(code.offset(keys, 8 * j), I64) for j in range(LANES)]
        with cgutils.for_range(code.b, I64(head_dim // LANES)) as loop:
            at = [code.offset(a, (loop.index, LANES * _SIZES[dtype])) for a in addresses]
            columns = code.transpose([code.load_floats(a, dtype) for a in at])
            for i, column in enumerate(columns):
                code.store(column, code.offset(target, (loop.index, 4 * TILE * LANES), 4 * TILE * i))

    return emitted(emit)


def make_scores_packed(rows, head_dim):
    """scores[rows, TILE] of a tile of transposed keys."""
    width = TILE // LANES
    cells = [(r, i) for r in range(rows) for i in range(width)]

    def emit(code, queries, keys, scores):
        sums = {cell: code.variable(code.constant(0.0)) for cell in cells}
        with cgutils.for_range(code.b, I64(head_dim)) as loop:
            k = [code.load(code.offset(keys, (loop.index, 4 * TILE), 64 * i), vector(F32)) for i in range(width)]
            for r in range(rows):
                q = code.splat_load(code.offset(queries, (loop.index, 4), 4 * head_dim * r), F32)
                for i in range(width):
                    code.b.store(code.fma(q, k[i], code.b.load(sums[r, i])), sums[r, i])
        for r, i in cells:
            code.store(code.b.load(sums[r, i]), code.offset(scores, 4 * TILE * r, 64 * i))

    return emitted(emit)


def make_add_values(rows, head_dim_v, dtype, pairs):
    """sums[rows, head_dim_v] += weights[rows, keys] · values; `values` and `upcoming` hold addresses.

    As many columns at a time as stay in registers, so that a value is widened once for all rows. With `pairs`, weights
    are bf16, a step takes two keys, and a lane adds their two products. `steps`: of keys, or of pairs.
    """
    width, size = head_dim_v // LANES, _SIZES[dtype]
    keys = 2 if pairs else 1
    columns = max(n for n in range(keys, width + 1, keys) if width % n == 0 and (rows * n <= REGISTERS or n == keys))
    cells = [(r, i) for r in range(rows) for i in range(columns)]
    both = [[i + LANES * half for pair in range(LANES) for i in (pair, pair + 2 * LANES)] for half in range(2)]

    def load_values(code, addresses, first):
        if not pairs:
            return [
                code.load_floats(code.offset(addresses[0], size * LANES * (first + i)), dtype) for i in range(columns)
            ]
        values = []
        for i in range(first, first + columns, 2):
            one, two = (code.load(code.offset(a, size * LANES * i), vector(I16, 2 * LANES)) for a in addresses)
            masks = [ir.Constant(vector(I32, 2 * LANES), half) for half in both]
            values += [code.b.bitcast(code.b.shuffle_vector(one, two, mask), vector(F32)) for mask in masks]
        return values

    def emit(code, weights, values, upcoming, steps, sums):
        for first in range(0, width, columns):
            at = {(r, i): code.offset(sums, 4 * (r * head_dim_v + LANES * (first + i))) for r, i in cells}
            totals = {cell: code.variable(code.load(at[cell], vector(F32))) for cell in cells}
            with cgutils.for_range(code.b, steps) as loop:
                at_step = [(loop.index, 8 * keys, 8 * key) for key in range(keys)]
                if first == 0:
                    for index, factor, shift in at_step:
                        code.prefetch(code.load(code.offset(upcoming, (index, factor), shift), I64), head_dim_v * size)
                addresses = [code.load(code.offset(values, (i, factor), shift), I64) for i, factor, shift in at_step]
                v = load_values(code, addresses, first)
                for r in range(rows):
                    p = code.splat_load(code.offset(weights, (loop.index, 4), 4 * TILE * r), F32)
                    for i in range(columns):
                        total = multiply_add(code, p, v[i], code.b.load(totals[r, i]), pairs)
                        code.b.store(total, totals[r, i])
            for cell in cells:
                code.store(code.b.load(totals[cell]), at[cell])

    return emitted(emit)


def make_softmax_row(head_dim_v, with_softcap, pairs):
    """One row's step of the online softmax: scores become weights (bf16 with `pairs`, in the first half of their
    place); maximum, total and sums are brought up to date.

    `low` and `high` bound the visible keys of the tile; `softcap` is the address of the cap and its inverse.
    """

    def emit(code, scores, groups, low, high, softcap, maximum, total, sums):
        b = code.b
        lane = ir.Constant(vector(I32), list(range(LANES)))
        infinite = code.constant(-math.inf)
        bounds = [code.splat(b.trunc(x, I32)) for x in (low, high)]
        largest = code.variable(infinite)
        with cgutils.for_range(b, groups) as loop:
            at = code.offset(scores, (loop.index, 4 * LANES))
            s = code.load(at, vector(F32))
            if with_softcap:
                cap, inverse = (code.splat_load(code.offset(softcap, i), F32) for i in (0, 4))
                s = b.fmul(cap, code.tanh(b.fmul(s, inverse)))
            index = b.add(lane, code.splat(b.trunc(b.mul(loop.index, I64(LANES)), I32)))
            seen = b.and_(b.icmp_signed(">=", index, bounds[0]), b.icmp_signed("<", index, bounds[1]))
            s = b.select(seen, s, infinite)
            code.store(s, at)
            # not maxnum: a NaN score must not vanish
            higher = b.fcmp_unordered(">", s, b.load(largest))
            b.store(b.select(higher, s, b.load(largest)), largest)
        before = code.load(maximum, F32)
        tile_largest = code.reduce("max", b.load(largest))
        new = b.select(b.fcmp_ordered(">", before, tile_largest), before, tile_largest)
        nothing = b.fcmp_ordered("==", new, ir.Constant(F32, -math.inf))
        base = b.select(nothing, ir.Constant(F32, 0.0), new)
        running = code.variable(code.constant(0.0))
        with cgutils.for_range(b, groups) as loop:
            at = code.offset(scores, (loop.index, 4 * LANES))
            p = code.exp(b.fsub(code.load(at, vector(F32)), code.splat(base)))
            if pairs:
                code.store(as_bf16(code, p), code.offset(scores, (loop.index, 2 * LANES)))
            else:
                code.store(p, at)
            b.store(b.fadd(b.load(running), p), running)
        fade = code.exp(b.fsub(before, base))
        tile_total = code.reduce("add", b.load(running))
        code.store(code.fma(code.load(total, F32), fade, tile_total), total)
        code.store(new, maximum)
        fades = code.splat(fade)
        for i in range(0, head_dim_v, LANES):
            at = code.offset(sums, 4 * i)
            code.store(b.fmul(code.load(at, vector(F32)), fades), at)

    return emitted(emit)


def by_rows(pieces):
    """pieces[n - 1] handles n rows: a function that handles any number, in chunks, with strides of its pointers."""
    largest = len(pieces)
    one, two, three, four, five, six = (pieces[min(n, largest) - 1] for n in range(1, 7))

    @_jit
    def run(rows, arguments):
        if rows == 1:
            one(arguments)
        elif rows == 2:
            two(arguments)
        elif rows == 3:
            three(arguments)
        elif rows == 4:
            four(arguments)
        elif rows == 5:
            five(arguments)
        else:
            six(arguments)

    return run, largest


# ---- the kernel ------------------------------------------------------------------------------------------------------


class Layout:
    """Where things are in a thread's scratch, in bytes; first are scale, softcap, 1 / softcap, a spare, a factor."""

    def __init__(self, head_dim, head_dim_v, kv_type):
        self.head_dim, self.head_dim_v, self.kv_type = head_dim, head_dim_v, kv_type
        # products of bf16 pairs, two an instruction
        self.pairs = kv_type == "bf16" and "avx512bf16" in cpu()[1] and head_dim % 32 == head_dim_v % 32 == 0
        self.queries = 64
        self.keys = self.queries + 4 * MAX_ROWS * head_dim
        self.scores = self.keys + 4 * TILE * head_dim
        self.addresses = self.scores + 4 * MAX_ROWS * TILE  # of a tile's keys and values, and of the next tile's
        self.sums = self.addresses + 2 * 16 * TILE  # sums, maxima, totals; then the same twice for partial results
        self.maxima = 4 * MAX_ROWS * head_dim_v  # from the sums
        self.totals = self.maxima + 4 * MAX_ROWS
        self.partial = self.totals + 4 * MAX_ROWS  # size of one result


def make_scores(layout):
    """All scores of one tile."""
    head_dim, kv_type, pairs = layout.head_dim, layout.kv_type, layout.pairs
    width = head_dim // (2 * LANES if pairs else LANES)
    most = max(1, min(4, REGISTERS // width))
    direct, direct_rows = by_rows([make_scores_direct(n, head_dim, kv_type, pairs) for n in range(1, most + 1)])
    packed_most = REGISTERS * LANES // TILE
    packed, packed_rows = by_rows([make_scores_packed(n, head_dim) for n in range(1, packed_most + 1)])
    transpose_keys = make_transpose_keys(head_dim, kv_type)

    @_jit
    def score(scratch, rows, groups, queries, keys, upcoming, transposed, scores):
        if rows <= DIRECT_ROWS:
            for r in range(0, rows, direct_rows):
                for g in range(groups):
                    at, to = 8 * LANES * g, scores + 4 * r * TILE + 4 * LANES * g
                    pointers = (scratch, queries + 4 * r * head_dim, keys + at, upcoming + at, to)
                    direct(min(direct_rows, rows - r), pointers)
        else:
            for g in range(groups):
                transpose_keys((keys + 8 * LANES * g, transposed + 4 * LANES * g))
            for r in range(0, rows, packed_rows):
                packed(min(packed_rows, rows - r), (queries + 4 * r * head_dim, transposed, scores + 4 * r * TILE))

    return score


def make_run_tile(layout):
    """Scores, softmax and values of one tile."""
    score = make_scores(layout)
    head_dim_v, maxima, totals = layout.head_dim_v, layout.maxima, layout.totals
    queries_at, keys_at, scores_at, sums_at = layout.queries, layout.keys, layout.scores, layout.sums
    kv_type, pairs = layout.kv_type, layout.pairs
    add_values, value_rows = by_rows([make_add_values(n, head_dim_v, kv_type, pairs) for n in range(1, 7)])
    softmax_plain, softmax_capped = (make_softmax_row(head_dim_v, capped, pairs) for capped in (False, True))

    @_jit
    def run_tile(scratch, addresses, upcoming, rows, count, capped, group, position, window_left, window_right):
        """`position`: of the first row, from the tile's first key on; `upcoming`: the next tile's addresses."""
        scores, sums = scratch + scores_at, scratch + sums_at
        groups = (count + LANES - 1) // LANES
        score(scratch, rows, groups, scratch + queries_at, addresses, upcoming, scratch + keys_at, scores)
        for r in range(rows):
            at = position + r // group
            low = at - window_left if window_left >= 0 else 0
            high = min(count, at + window_right + 1) if window_right >= 0 else count
            statistics = (sums + maxima + 4 * r, sums + totals + 4 * r, sums + 4 * r * head_dim_v)
            row = (scores + 4 * r * TILE, groups, low, high, scratch + 4, statistics[0], statistics[1], statistics[2])
            if capped:
                softmax_capped(row)
            else:
                softmax_plain(row)
        values, upcoming_values = addresses + 8 * TILE, upcoming + 8 * TILE
        steps = (count + 1) // 2 if pairs else count  # the last pair may hold the last key twice, once without weight
        for r in range(0, rows, value_rows):
            row_scores, row_sums = scores + 4 * r * TILE, sums + 4 * r * head_dim_v
            add_values(min(value_rows, rows - r), (row_scores, values, upcoming_values, steps, row_sums))

    return run_tile


@_jit
def find_keys(p, target, sequence, head, start, count):
    """The addresses of a tile's keys and values; places past its end hold those of its last key."""
    block_size = int_argument(p, 12)
    table = i32(int_argument(p, 21) + 4 * sequence * int_argument(p, 22))
    k = int_argument(p, 10) + head * int_argument(p, 15)
    v = int_argument(p, 11) + head * int_argument(p, 18)
    k_block, k_step, v_block, v_step = (
        int_argument(p, 13),
        int_argument(p, 14),
        int_argument(p, 16),
        int_argument(p, 17),
    )
    addresses = i64(target)
    index, slot = start // block_size, start % block_size
    j = 0
    while (
        j < count
    ):  # block by block: a division or a look-up for each key would take a quarter of a decode tile's time
        at_k, at_v = k + table[index] * k_block + slot * k_step, v + table[index] * v_block + slot * v_step
        for i in range(j, min(count, j + block_size - slot)):
            addresses[i], addresses[TILE + i] = at_k, at_v
            at_k, at_v = at_k + k_step, at_v + v_step
        j, index, slot = j + block_size - slot, index + 1, 0
    for j in range(count, TILE):
        addresses[j] = addresses[count - 1]
        addresses[TILE + j] = addresses[TILE + count - 1]


def make_load_query(layout, io_type):
    """A query as the scores want it: scaled fp32, or bf16 as it is."""
    pairs = layout.pairs
    load_row, copy_row = make_load_row(layout.head_dim, io_type), make_copy_row(layout.head_dim, io_type, True)

    @_jit
    def load_query(rows, scratch, source, target):
        if pairs and rows <= DIRECT_ROWS:
            copy_row((source, target))
        else:
            load_row((source, scratch, target))

    return load_query


def make_rows(layout, io_type):
    """(begin_rows, write_rows, merge_into): an item's rows before, after and between its tiles."""
    head_dim, head_dim_v, maxima, totals = layout.head_dim, layout.head_dim_v, layout.maxima, layout.totals
    queries_at, sums_at, io_size = layout.queries, layout.sums, _SIZES[io_type]
    load_query, store_row = make_load_query(layout, io_type), make_store_row(head_dim_v, io_type)

    @_jit
    def begin_rows(p, scratch, group, rows, first_row, head):
        sums = scratch + sums_at
        for r in range(rows):
            h = head * group + r % group
            source = int_argument(p, 0) + (first_row + r // group) * int_argument(p, 1) + h * int_argument(p, 2)
            load_query(rows, scratch, source, scratch + queries_at + 4 * r * head_dim)
            f32(sums + maxima)[r] = -math.inf
            f32(sums + totals)[r] = 0.0
        for i in range(rows * head_dim_v):
            f32(sums)[i] = 0.0

    @_jit
    def write_rows(p, scratch, sums, group, rows, first_row, head):
        """Normalised results, and where wanted each row's maximum and total, of which the LSE is made."""
        statistics, tokens, heads = int_argument(p, 5), int_argument(p, 6), int_argument(p, 8)
        sinks = int_argument(p, 25)
        for r in range(rows):
            token, h = first_row + r // group, head * group + r % group
            largest, total = f32(sums + maxima)[r], f32(sums + totals)[r]
            fade = np.float32(1)
            if sinks != 0:
                sink = f32(sinks)[h]
                new = max(largest, sink)
                fade = exp(largest - new)
                total = total * fade + exp(sink - new)
                largest = new
            f32(scratch)[4] = fade / total if total != 0 else np.float32(0)
            out = int_argument(p, 3) + token * int_argument(p, 4) + h * head_dim_v * io_size
            store_row((sums + 4 * r * head_dim_v, scratch + 16, out))
            if statistics != 0:
                f32(statistics)[h * tokens + token] = largest
                f32(statistics)[(heads + h) * tokens + token] = total

    @_jit
    def merge_into(target, source, rows):
        """Joins two partial results; the second's rows fade into the first's."""
        for r in range(rows):
            a, b = f32(target + maxima)[r], f32(source + maxima)[r]
            new = max(a, b)
            if new == -math.inf:
                continue
            fade_a, fade_b = exp(a - new), exp(b - new)
            f32(target + maxima)[r] = new
            f32(target + totals)[r] = f32(target + totals)[r] * fade_a + f32(source + totals)[r] * fade_b
            for i in range(r * head_dim_v, (r + 1) * head_dim_v):
                f32(target)[i] = f32(target)[i] * fade_a + f32(source)[i] * fade_b

    return begin_rows, write_rows, merge_into


@_jit
def item_bounds(p, sequence, first, queries):
    """(row of q, position of that row, first key, last key + 1) of `queries` tokens from a sequence's `first`."""
    cu_seqlens = i32(int_argument(p, 19))
    keys = i32(int_argument(p, 20))[sequence]
    begin, end = cu_seqlens[sequence], cu_seqlens[sequence + 1]
    position = keys - (end - begin) + first
    window_left, window_right = int_argument(p, 23), int_argument(p, 24)
    key_begin = max(0, position - window_left) if window_left >= 0 else 0
    key_end = min(keys, position + queries + window_right) if window_right >= 0 else keys
    return begin + first, position, key_begin, max(key_begin, key_end)


@_jit
def tiles_of(bounds):
    return max(1, (bounds[3] - bounds[2] + TILE - 1) // TILE)


@_jit
def tokens_of(p, sequence):
    return i32(int_argument(p, 19))[sequence + 1] - i32(int_argument(p, 19))[sequence]


@_jit
def total_work(p, group, per_item):
    """Of all items: tiles times rows, and a little for what each tile costs anyway."""
    work = 0
    for sequence in range(int_argument(p, 7)):
        length = tokens_of(p, sequence)
        for first in range(0, length, per_item):
            queries = min(per_item, length - first)
            tiles = tiles_of(item_bounds(p, sequence, first, queries))
            work += tiles * (queries * group + TILE_COST) * int_argument(p, 9)
    return work


@_jit
def first_tile_at(work, at, cost):
    """The first tile of an item beginning at `at` that begins at or after `work`."""
    return max(0, (work - at + cost - 1) // cost)


@_jit
def begin_scratch(p, scratch):
    cap = float_argument(p, 27)
    f32(scratch)[0] = float_argument(p, 26)
    f32(scratch)[1] = cap
    f32(scratch)[2] = 1 / cap if cap != 0 else 0.0


@_jit
def find_next_item(p, target, sequence, head, key_begin, key_end, queries):
    """The first tile of the item that is likely to come next, for the prefetch alone; false when there is none."""
    if head + 1 < int_argument(p, 9):
        head += 1
    elif sequence + 1 < int_argument(p, 7):
        sequence, head = sequence + 1, 0
        _, _, key_begin, key_end = item_bounds(p, sequence, 0, queries)
    else:
        return False
    if key_end > key_begin:
        find_keys(p, target, sequence, head, key_begin, min(TILE, key_end - key_begin))
    return key_end > key_begin


def make_run_piece(layout, begin_rows, run_tile):
    addresses_at = layout.addresses

    @_jit
    def run_piece(p, scratch, sequence, head, group, bounds, rows, tile_begin, tile_end):
        """Tiles tile_begin to tile_end of an item, into the scratch's sums."""
        first_row, position, key_begin, key_end = bounds
        begin_rows(p, scratch, group, rows, first_row, head)
        capped, window_left, window_right = float_argument(p, 27) != 0, int_argument(p, 23), int_argument(p, 24)
        addresses, upcoming = scratch + addresses_at, scratch + addresses_at + 16 * TILE
        start, stop = key_begin + tile_begin * TILE, min(key_end, key_begin + tile_end * TILE)
        count = min(TILE, stop - start)
        if count > 0:
            find_keys(p, addresses, sequence, head, start, count)
        while count > 0:
            after = min(TILE, stop - start - count)
            following = addresses
            if after > 0:
                find_keys(p, upcoming, sequence, head, start + count, after)
                following = upcoming
            elif find_next_item(p, upcoming, sequence, head, key_begin, key_end, rows // group):
                following = upcoming
            at = position - start
            run_tile(scratch, addresses, following, rows, count, capped, group, at, window_left, window_right)
            start, count = start + count, after
            addresses, upcoming = upcoming, addresses

    return run_piece


def make_pieces(layout, merge_into):
    """(keep_piece, join_pieces): for items that several threads share."""
    sums_at, partial = layout.sums, layout.partial

    @_jit
    def keep_piece(scratch, slot):
        source, target = f32(scratch + sums_at), f32(scratch + sums_at + slot * partial)
        for i in range(partial // 4):
            target[i] = source[i]

    @_jit
    def join_pieces(p, me, threads, work, rows, at, cost, tiles):
        """The pieces of an item that began on this thread; returns where they are joined."""
        scratches, stride = int_argument(p, 28), int_argument(p, 29)
        target = scratches + me * stride + sums_at + 2 * partial
        for other in range(me + 1, threads):
            low, high = share(work, other, threads)
            if first_tile_at(low, at, cost) < min(tiles, first_tile_at(high, at, cost)):
                merge_into(target, scratches + other * stride + sums_at + partial, rows)
        return target

    return keep_piece, join_pieces


def make_attention(head_dim, head_dim_v, io_type, kv_type):
    """attend(p, me, threads, merging) does all items of this thread; called again, after a barrier, with merging true,
    it joins the items that several threads shared.

    A thread's tiles are those that begin in its share of the work. An item that continues on the next threads is left
    in the scratch's last partial result, one that began on an earlier thread in the first; the thread on which an
    item began joins the pieces.
    """
    layout = Layout(head_dim, head_dim_v, kv_type)
    sums_at = layout.sums
    begin_rows, write_rows, merge_into = make_rows(layout, io_type)
    keep_piece, join_pieces = make_pieces(layout, merge_into)
    run_piece = make_run_piece(layout, begin_rows, make_run_tile(layout))

    @_jit
    def attend(p, me, threads, merging):
        group, kv_heads = int_argument(p, 8) // int_argument(p, 9), int_argument(p, 9)
        per_item = MAX_ROWS // group
        work = total_work(p, group, per_item)
        low, high = share(work, me, threads)
        scratch = int_argument(p, 28) + me * int_argument(p, 29)
        begin_scratch(p, scratch)
        at = 0
        for sequence in range(int_argument(p, 7)):
            length = tokens_of(p, sequence)
            for first in range(0, length, per_item):
                queries = min(per_item, length - first)
                bounds = item_bounds(p, sequence, first, queries)
                tiles, rows = tiles_of(bounds), queries * group
                cost = rows + TILE_COST
                for head in range(kv_heads):
                    begin, end = first_tile_at(low, at, cost), min(tiles, first_tile_at(high, at, cost))
                    if begin < end and not merging:
                        run_piece(p, scratch, sequence, head, group, bounds, rows, begin, end)
                        if begin > 0:
                            keep_piece(scratch, 1)
                        elif end < tiles:
                            keep_piece(scratch, 2)
                        else:
                            write_rows(p, scratch, scratch + sums_at, group, rows, bounds[0], head)
                    if begin == 0 and 0 < end < tiles and merging:
                        joined = join_pieces(p, me, threads, work, rows, at, cost, tiles)
                        write_rows(p, scratch, joined, group, rows, bounds[0], head)
                    at += tiles * cost

    return attend


def make_kernel(head_dim, head_dim_v, io_type, kv_type):
    attend = make_attention(head_dim, head_dim_v, io_type, kv_type)

    def kernel(p):
        me, threads = thread(p), num_threads(p)
        attend(p, me, threads, False)
        barrier(p)
        attend(p, me, threads, True)

    return kernel
