"""What the compiled dense forward and backward are made of: products of tiles, and the loads that feed them.

A tile of scores is ROWS query rows × KEYS keys in fp32. Products keep 6 rows × 4 vectors of the result in registers
(24 of the 32 of AVX-512): each step loads four vectors of b and six numbers of a for 24 multiply-adds. In bf16, where
the CPU has `vdpbf16ps`, "pairs" replace numbers: 32 bits that hold two neighbours along the summed axis.
"""

import math

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.kernels.cpu.dense_calls import KEYS
from octavo.kernels.cpu.simd import F32, I16, I32, I64, LANES, Code, emitted, vector

CHUNK = 6  # rows of a product that are kept in registers, four vectors each
WIDTH = 4  # vectors of a row of it
_SIZES = {"f32": 4, "f16": 2, "bf16": 2}
_jit = njit(error_model="numpy")


class BFloat(ir.Type):  # type: ignore[misc]
    """bf16, which llvmlite does not name."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, BFloat)

    def __hash__(self):
        return hash(BFloat)


def multiply_add(code: Code, a, b, c, pairs):
    """c + a · b in 16 lanes; with `pairs` a lane of a and b holds two bf16 numbers, whose products are both added."""
    if not pairs:
        return code.fma(a, b, c)
    both = vector(BFloat(), 2 * LANES)
    return code.call("llvm.x86.avx512bf16.dpbf16ps.512", c.type, c, *(code.b.bitcast(x, both) for x in (a, b)))


def exp2(code: Code, x):
    """2^x for x up to 127, within 2 ulp; 0 below −127, NaN for NaN."""
    b, constant = code.b, code.constant

    def at_least(y, low):
        return b.select(b.fcmp_ordered("<", y, constant(low)), constant(low), y)

    n = at_least(code.call("llvm.rint.v16f32", x.type, x), -127.0)
    r = at_least(b.fsub(x, n), -0.5)
    y = constant(math.log(2) ** 6 / 720)
    for k in (5, 4, 3, 2, 1, 0):
        y = code.fma(y, r, constant(math.log(2) ** k / math.factorial(k)))
    exponent = b.add(b.fptosi(n, vector(I32)), constant(127, I32))
    return b.fmul(y, b.bitcast(b.shl(exponent, constant(23, I32)), vector(F32)))


def as_bf16(code: Code, x):
    """fp32 rounded to bf16, as int16."""
    return code.b.bitcast(code.b.fptrunc(x, vector(BFloat())), vector(I16))


def join_pairs(code: Code, low, high):
    """Two vectors of int16 as one of int32 whose halves they are."""
    low, high = (code.b.zext(x, vector(I32)) for x in (low, high))
    return code.b.or_(low, code.b.shl(high, code.constant(16, I32)))


def make_product(rows, width, a_row, a_step, b_step, c_row, accumulate, pairs):
    """c[rows, 16 · width] (+)= Σ a[row, step] · b[step, 16 · width] over `steps`; strides in bytes."""
    cells = [(r, i) for r in range(rows) for i in range(width)]

    def emit(code, a, b, c, steps):
        at = {(r, i): code.offset(c, r * c_row + 64 * i) for r, i in cells}
        zero = code.constant(0.0)
        sums = {x: code.variable(code.load(at[x], vector(F32)) if accumulate else zero) for x in cells}
        with cgutils.for_range(code.b, steps) as loop:
            right = [code.load(code.offset(b, (loop.index, b_step), 64 * i), vector(F32)) for i in range(width)]
            for r in range(rows):
                left = code.splat_load(code.offset(a, (loop.index, a_step), r * a_row), F32)
                for i in range(width):
                    code.b.store(multiply_add(code, left, right[i], code.b.load(sums[r, i]), pairs), sums[r, i])
        for x in cells:
            code.store(code.b.load(sums[x]), at[x])

    return emitted(emit)


def make_copy_row(width, dtype, raw):
    """target[width] = source[width], as fp32, or as it is where `raw`."""

    def emit(code, source, target):
        if raw:
            for i in range(0, width, LANES):
                code.store(code.load(code.offset(source, 2 * i), vector(I16)), code.offset(target, 2 * i))
        else:
            for i in range(0, width, LANES):
                code.store(code.load_floats(code.offset(source, i * _SIZES[dtype]), dtype), code.offset(target, 4 * i))

    return emitted(emit)


def make_write_row(width, dtype):
    """target[width] = source[width] · factor[0], from fp32."""

    def emit(code, source, factor, target):
        scale = code.splat_load(factor, F32)
        for i in range(0, width, LANES):
            value = code.b.fmul(code.load(code.offset(source, 4 * i), vector(F32)), scale)
            code.store_floats(value, code.offset(target, i * _SIZES[dtype]), dtype)

    return emitted(emit)


def make_zero():
    """Clears `count` times 64 bytes."""

    def emit(code, target, count):
        with cgutils.for_range(code.b, count) as loop:
            code.store(code.constant(0.0), code.offset(target, (loop.index, 64)))

    return emitted(emit)


def make_transpose(words):
    """target[words, KEYS] = source[KEYS, words], of 32-bit words."""

    def emit(code, source, target):
        with cgutils.for_range(code.b, I64(words // LANES)) as column:
            for first in range(0, KEYS, LANES):
                at = code.offset(source, (column.index, 4 * LANES), 4 * words * first)
                rows = [code.load(code.offset(at, 4 * words * i), vector(F32)) for i in range(LANES)]
                to = code.offset(target, (column.index, 4 * LANES * KEYS), 4 * first)
                for i, row in enumerate(code.transpose(rows)):
                    code.store(row, code.offset(to, 4 * KEYS * i))

    return emitted(emit)


def make_interleave(rows, width):
    """target[rows / 2, width] of pairs = source[rows, width] of bf16: rows 2i and 2i + 1 side by side."""

    def emit(code, source, target):
        with cgutils.for_range(code.b, I64(rows // 2)) as loop:
            for i in range(0, width, LANES):
                low, high = (
                    code.load(code.offset(source, (loop.index, 4 * width), 2 * (part * width + i)), vector(I16))
                    for part in (0, 1)
                )
                code.store(join_pairs(code, low, high), code.offset(target, (loop.index, 4 * width), 4 * i))

    return emitted(emit)


def make_load_tile(width, dtype, pairs):
    """Rows of a tensor into a contiguous tile, zeros after the last."""
    size = 2 if pairs else 4
    copy_row, zero = make_copy_row(width, dtype, pairs), make_zero()

    @_jit
    def load_tile(source, stride, count, target, rows):
        for r in range(count):
            copy_row((source + r * stride, target + r * width * size))
        if count < rows:
            zero((target + count * width * size, (rows - count) * width * size // 64))

    return load_tile


# ---- products of a tile ----------------------------------------------------------------------------------------------


def make_tile_product(rows, columns, a_row, a_step, accumulate, pairs):
    """c[rows, columns] (+)= a · b, in chunks that fit the registers; b and c are contiguous, fp32 or pairs."""
    stride = 4 * columns
    pieces = [
        [
            make_product(n, width, a_row, a_step, stride, stride, accumulate, pairs)
            for width in (WIDTH, columns // LANES % WIDTH)
            if width
        ]
        for n in (CHUNK, rows % CHUNK)
        if n
    ]
    full, last = pieces[0], pieces[-1]
    whole_rows = rows // CHUNK * CHUNK
    whole_columns = columns // (LANES * WIDTH) * LANES * WIDTH
    full_wide, full_narrow = full[0], full[-1]
    last_wide, last_narrow = last[0], last[-1]

    @_jit
    def product(a, b, c, steps):
        for column in range(0, whole_columns, LANES * WIDTH):
            for row in range(0, whole_rows, CHUNK):
                full_wide((a + row * a_row, b + 4 * column, c + row * stride + 4 * column, steps))
            if whole_rows < rows:
                last_wide((a + whole_rows * a_row, b + 4 * column, c + whole_rows * stride + 4 * column, steps))
        if whole_columns < columns:
            for row in range(0, whole_rows, CHUNK):
                full_narrow((a + row * a_row, b + 4 * whole_columns, c + row * stride + 4 * whole_columns, steps))
            if whole_rows < rows:
                at = c + whole_rows * stride + 4 * whole_columns
                last_narrow((a + whole_rows * a_row, b + 4 * whole_columns, at, steps))

    return product


# ---- jobs ------------------------------------------------------------------------------------------------------------


@intrinsic
def next_number(typingctx, counter):
    """Takes the next number of a counter (an address) that all threads share."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], I64.as_pointer()), I64(1), "monotonic")

    return types.int64(types.int64), codegen


@_jit
def bound_offsets(left, right):
    """From a row's diagonal to the first key that it sees, and to the one after the last; far out without a bound."""
    return (-left if left >= 0 else -(1 << 40)), (right + 1 if right >= 0 else 1 << 40)
