"""The code of quant_linear.py: imported only to compile it, so that a warm start needs no Numba."""

from llvmlite import ir
from numba import njit
from numba.core import cgutils

from octavo.kernels.cpu.quant_linear import GROUP, MAX_TOKENS, ROWS
from octavo.kernels.cpu.simd import (
    F32,
    I8,
    I32,
    I64,
    barrier,
    emitted,
    int_argument,
    num_threads,
    share,
    thread,
    vector,
)

ROUNDER, ROUNDER_BITS = 12582912.0, 0x4B400000
LARGEST = 127.0 * 256  # an activation's code: high byte up to 127, low byte signed


def _emit_quantize(code, x, count, codes, scales, sums, zero_point, has_mins):
    """One row of x, `count` groups: high and low bytes, fp32 scales, and the sums as the products need them."""
    b = code.b
    with cgutils.for_range(b, count) as loop:
        g = loop.index
        values = [code.load(code.offset(x, (g, 4 * GROUP), 64 * half), vector(F32)) for half in range(2)]
        largest = _largest(code, values)
        scale = b.fmul(largest, ir.Constant(F32, 1 / LARGEST))
        zero = b.fcmp_ordered("==", largest, ir.Constant(F32, 0.0))
        inverse = code.splat(b.select(zero, ir.Constant(F32, 0.0), b.fdiv(ir.Constant(F32, LARGEST), largest)))
        # adding 1.5 · 2^23 leaves the nearest integer in the low bits, whatever the value
        shifted = [b.bitcast(code.fma(value, inverse, code.constant(ROUNDER)), vector(I32)) for value in values]
        integers = [b.sub(x, code.constant(ROUNDER_BITS, I32)) for x in shifted]
        for half, x in enumerate(integers):
            high = b.ashr(b.add(x, code.constant(128, I32)), code.constant(8, I32))
            code.store(b.trunc(high, vector(I8)), code.offset(codes, (g, 2 * GROUP), 16 * half))
            code.store(b.trunc(x, vector(I8)), code.offset(codes, (g, 2 * GROUP), GROUP + 16 * half))
        total = code.reduce("add", b.add(*integers))
        code.store(scale, code.offset(scales, (g, 4)))
        with_mins = b.bitcast(b.fmul(b.sitofp(total, F32), scale), I32)
        without = b.neg(b.mul(total, b.trunc(zero_point, I32)))
        is_float = b.icmp_signed("!=", has_mins, I64(0))
        code.store(b.select(is_float, with_mins, without), code.offset(sums, (g, 4)))


def _largest(code, values):
    """The largest magnitude, compared as integers: a NaN is the largest of all there and spoils the scale."""
    bits = [code.b.and_(code.b.bitcast(v, vector(I32)), code.constant(0x7FFFFFFF, I32)) for v in values]
    pairs = code.b.select(code.b.icmp_signed(">", *bits), *bits)
    return code.b.bitcast(code.reduce("smax", pairs), F32)


quantize_row = emitted(_emit_quantize)


def make_tile(tokens, blocks, bits, has_mins, wide_scales):
    """out[tokens, blocks · 16] (+)= activations · weights, over all groups."""
    code_bytes, scale_bytes = 64 * bits, ROWS * (4 if wide_scales else 2)
    scale_type = "f32" if wide_scales else "f16"
    cells = [(t, r) for t in range(tokens) for r in range(blocks)]

    def emit(code, codes, scales, mins, act_codes, act_scales, act_sums, groups, bias, out, out_stride, accumulate):
        b = code.b
        slots = {}
        for t, r in cells:
            slots[t, r] = code.variable(code.constant(0.0))
            with b.if_then(b.icmp_signed("!=", bias, I64(0))):
                b.store(code.load(code.offset(bias, 64 * r), vector(F32)), slots[t, r])
            with b.if_then(b.icmp_signed("!=", accumulate, I64(0))):
                before = code.load(code.offset(out, (out_stride, t), 64 * r), vector(F32))
                b.store(b.fadd(b.load(slots[t, r]), before), slots[t, r])
        with cgutils.for_range(b, groups) as loop:
            g = loop.index
            acts = [code.offset(act_codes, b.mul(groups, I64(2 * GROUP * t)), (g, 2 * GROUP)) for t in range(tokens)]
            factors = [code.offset(b.mul(b.add(b.mul(groups, I64(t)), g), I64(4)), 0) for t in range(tokens)]
            weights = [code.offset(codes, b.mul(groups, I64(code_bytes * r)), (g, code_bytes)) for r in range(blocks)]
            units = [_unpack(code, w, bits) for w in weights]
            sums = dict.fromkeys(cells, code.constant(0, I32))
            _add_products(code, sums, units, acts, bits)
            for t, r in cells:
                sums[t, r] = b.shl(sums[t, r], code.constant(8, I32))
                if not has_mins:
                    sums[t, r] = b.add(sums[t, r], code.splat_load(b.add(act_sums, factors[t]), I32))
            _add_products(code, sums, units, [code.offset(act, GROUP) for act in acts], bits)
            for r in range(blocks):
                at = b.add(b.mul(groups, I64(scale_bytes * r)), b.mul(g, I64(scale_bytes)))
                scale = code.load_floats(b.add(scales, at), scale_type)
                offset = code.load_floats(b.add(mins, at), scale_type) if has_mins else None
                for t in range(tokens):
                    product = b.fmul(
                        b.sitofp(sums[t, r], vector(F32)), code.splat_load(b.add(act_scales, factors[t]), F32)
                    )
                    value = code.fma(product, scale, b.load(slots[t, r]))
                    if has_mins:
                        value = code.fma(offset, code.splat_load(b.add(act_sums, factors[t]), F32), value)
                    b.store(value, slots[t, r])
        for t, r in cells:
            code.store(b.load(slots[t, r]), code.offset(out, (out_stride, t), 64 * r))

    return emitted(emit)


def _unpack(code, weights, bits):
    """A group of one row block: 8 vectors, each of 4 inputs of 16 rows, in the order of the inputs."""
    loaded = [code.load(code.offset(weights, 64 * step), vector(I8, 64)) for step in range(bits)]
    if bits == 8:
        return loaded
    words = [code.b.bitcast(x, vector(I32)) for x in loaded]  # LLVM shifts bytes by a slow instruction
    nibbles = code.constant(15, I8, 64)
    high = [code.b.bitcast(code.b.lshr(x, code.constant(4, I32)), vector(I8, 64)) for x in words]
    return [code.b.and_(x, nibbles) for x in loaded + high]


def _add_products(code, sums, units, acts, bits):
    for step in range(GROUP // 4):
        for t, act in enumerate(acts):
            quad = code.b.bitcast(code.splat_load(code.offset(act, 4 * step), I32), vector(I8, 64))
            for r, unit in enumerate(units):
                sums[t, r] = code.dot4(sums[t, r], unit[step], quad, bits)


def _make_pair_of_blocks(kind):
    """Two row blocks for 8, 4, 2 or 1 tokens. Many tokens take the blocks one by one: a group's unpacked codes and the
    sums of both would not fit the registers; few take them together, which keeps more loads in flight."""
    tile8, tile4, tile2, tile1 = (make_tile(t, b, *kind) for t, b in ((8, 1), (4, 1), (2, 2), (1, 2)))

    @njit(error_model="numpy")
    def multiply(size, first, second):
        """`first` and `second` are the arguments of either block's tile; those of the first serve for both."""
        if size == 8:
            tile8(first)
            tile8(second)
        elif size == 4:
            tile4(first)
            tile4(second)
        elif size == 2:
            tile2(first)
        else:
            tile1(first)

    return multiply


@njit(error_model="numpy")
def tile_size(tokens):
    """Of the next tile when so many tokens are left."""
    size = 1
    while 2 * size <= min(tokens, MAX_TOKENS):
        size *= 2
    return size


def make_quantize(has_mins):
    """quantize(row, count, token, group, tokens, groups, zero_point, workspace): `count` groups of a row of fp32 into
    the workspace, beginning at this token's `group`."""
    mins_flag = 1 if has_mins else 0

    @njit(error_model="numpy")
    def quantize(row, count, token, group, tokens, groups, zero_point, workspace):
        at = token * groups + group
        scales = workspace + tokens * groups * 2 * GROUP + at * 4
        sums = scales + tokens * groups * 4
        quantize_row((row, count, workspace + at * 2 * GROUP, scales, sums, zero_point, mins_flag))

    return quantize


def make_multiply(bits, has_mins, wide_scales):
    """(multiply_tile, multiply): a few tokens' products with a pair of row blocks; this thread's share of all."""
    code_bytes, scale_bytes = 64 * bits, ROWS * (4 if wide_scales else 2)
    kind = (bits, has_mins, wide_scales)
    pair_of_blocks, edge = _make_pair_of_blocks(kind), make_tile(1, 1, *kind)

    @njit(error_model="numpy")
    def multiply_tile(t, size, workspace, tokens, groups, block, codes, scales, mins, bias, out, stride, accumulate):
        """out (size, 32) of tokens t to t + size and of row blocks `block` and the next; or (1, 16) when size is 0."""
        act_scales = workspace + tokens * groups * 2 * GROUP + t * groups * 4
        act = (workspace + t * groups * 2 * GROUP, act_scales, act_scales + tokens * groups * 4, groups)
        w = codes + block * groups * code_bytes
        s = scales + block * groups * scale_bytes
        m = mins + block * groups * scale_bytes
        bias_at = bias + block * 64 if bias != 0 else 0
        first = (w, s, m, *act, bias_at, out, stride, accumulate)
        if size == 0:
            edge(first)
            return
        w, s, m = w + groups * code_bytes, s + groups * scale_bytes, m + groups * scale_bytes
        bias_at = bias_at + 64 if bias != 0 else 0
        pair_of_blocks(size, first, (w, s, m, *act, bias_at, out + 64, stride, accumulate))

    @njit(error_model="numpy")
    def multiply(me, threads, workspace, tokens, groups, row_blocks, codes, scales, mins, bias, out, accumulate):
        stride = row_blocks * ROWS * 4
        first, last = share((row_blocks + 1) // 2, me, threads)
        for block in range(2 * first, 2 * last, 2):
            t = 0
            while t < tokens:
                size = tile_size(tokens - t) if block + 1 < row_blocks else 0
                o = out + t * stride + block * 64
                multiply_tile(
                    t, size, workspace, tokens, groups, block, codes, scales, mins, bias, o, stride, accumulate
                )
                t += max(size, 1)

    return multiply_tile, multiply


def make_kernel(bits, has_mins, wide_scales):
    quantize, (_, multiply) = make_quantize(has_mins), make_multiply(bits, has_mins, wide_scales)

    def kernel(p):
        me, threads = thread(p), num_threads(p)
        x, tokens, groups, row_blocks = int_argument(p, 0), int_argument(p, 1), int_argument(p, 2), int_argument(p, 3)
        codes, scales, mins, zero_point = int_argument(p, 4), int_argument(p, 5), int_argument(p, 6), int_argument(p, 7)
        bias, out, workspace = int_argument(p, 8), int_argument(p, 9), int_argument(p, 10)
        first, last = share(tokens, me, threads)
        for t in range(first, last):
            quantize(x + t * groups * GROUP * 4, groups, t, 0, tokens, groups, zero_point, workspace)
        barrier(p)
        multiply(me, threads, workspace, tokens, groups, row_blocks, codes, scales, mins, bias, out, 0)

    return kernel
