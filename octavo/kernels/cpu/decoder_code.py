"""The code of decoder.py: imported only to compile it, so that a warm start needs no Numba."""

from llvmlite import ir
from numba import njit
from numba.core import cgutils

from octavo.kernels.cpu.decoder import LAYER_FIELDS
from octavo.kernels.cpu.jit import HEADER
from octavo.kernels.cpu.paged_attention_code import make_attention, make_store_row
from octavo.kernels.cpu.quant_linear_code import make_multiply, make_quantize, tile_size
from octavo.kernels.cpu.simd import (
    F32,
    I64,
    LANES,
    barrier,
    emitted,
    f32,
    float_argument,
    i64,
    int_argument,
    num_threads,
    share,
    thread,
    vector,
)

_jit = njit(error_model="numpy")


def _emit_rms_norm(code, source, weight, width, eps, target):
    """target = source / √(mean(source²) + eps) · weight; `eps` is its address."""
    b = code.b
    squares = code.variable(code.constant(0.0))
    steps = b.sdiv(width, I64(LANES))
    with cgutils.for_range(b, steps) as loop:
        x = code.load(code.offset(source, (loop.index, 64)), vector(F32))
        b.store(code.fma(x, x, b.load(squares)), squares)
    mean = b.fdiv(code.reduce("add", b.load(squares)), b.sitofp(width, F32))
    root = code.call("llvm.sqrt.f32", F32, b.fadd(mean, code.load(eps, F32)))
    factor = code.splat(b.fdiv(ir.Constant(F32, 1.0), root))
    with cgutils.for_range(b, steps) as loop:
        at = b.mul(loop.index, I64(64))
        x = code.load(b.add(source, at), vector(F32))
        w = code.load(b.add(weight, at), vector(F32))
        code.store(b.fmul(b.fmul(x, factor), w), b.add(target, at))


def _emit_swiglu(code, gate, up, width, target):
    """target = silu(gate) · up."""
    b = code.b
    with cgutils.for_range(b, b.sdiv(width, I64(LANES))) as loop:
        at = b.mul(loop.index, I64(64))
        g, u = (code.load(b.add(x, at), vector(F32)) for x in (gate, up))
        grown = b.fadd(code.constant(1.0), code.exp(b.fneg(g)))
        code.store(b.fmul(b.fdiv(g, grown), u), b.add(target, at))


def _emit_rotate(code, x, cos, sin, half):
    """x[i], x[half + i] turned by angle i, in place."""
    b = code.b
    with cgutils.for_range(b, b.sdiv(half, I64(LANES))) as loop:
        at = b.mul(loop.index, I64(64))
        first, second = b.add(x, at), b.add(code.offset(x, (half, 4)), at)
        a, c = code.load(first, vector(F32)), code.load(second, vector(F32))
        turn_cos, turn_sin = (code.load(b.add(table, at), vector(F32)) for table in (cos, sin))
        code.store(b.fsub(b.fmul(a, turn_cos), b.fmul(c, turn_sin)), first)
        code.store(b.fadd(b.fmul(c, turn_cos), b.fmul(a, turn_sin)), second)


rms_norm, swiglu, rotate = (emitted(emit) for emit in (_emit_rms_norm, _emit_swiglu, _emit_rotate))


def make_rotate_and_store(head_dim, kv_type):
    """q and k of a thread's tokens: their norms where there are any, the rotation; k and v into the cache."""
    store_row, width = make_store_row(head_dim, kv_type), 4 * head_dim

    @_jit
    def rotate_and_store(p, layer, attention, row, me, threads):
        heads, kv_heads, half = int_argument(p, 8), int_argument(p, 9), int_argument(p, 13)
        one = row - 60
        f32(one)[0] = 1.0
        block_size = int_argument(attention, 12)
        first, last = share(int_argument(p, 1), me, threads)
        for t in range(first, last):
            q = int_argument(p, 15) + t * (heads + 2 * kv_heads) * width
            cos, sin = int_argument(p, 11) + 4 * t * half, int_argument(p, 12) + 4 * t * half
            for h in range(heads + kv_heads):
                norm = i64(layer)[2] if h < heads else i64(layer)[3]
                if norm != 0:
                    rms_norm((q + h * width, norm, head_dim, row - 64, q + h * width))
                rotate((q + h * width, cos, sin, half))
            slot = i64(int_argument(p, 14))[t]
            if slot < 0:
                continue
            block, offset = slot // block_size, slot % block_size
            k_to = i64(layer)[20] + block * int_argument(attention, 13) + offset * int_argument(attention, 14)
            v_to = i64(layer)[21] + block * int_argument(attention, 16) + offset * int_argument(attention, 17)
            for h in range(kv_heads):
                k = q + (heads + h) * width
                store_row((k, one, k_to + h * int_argument(attention, 15)))
                store_row((k + kv_heads * width, one, v_to + h * int_argument(attention, 18)))

    return rotate_and_store


def make_mlp_and_rows(bits, has_mins, wide_scales):
    """(normalize, gate_and_up, round_rows, product): what ends in rounded rows, and the product that takes them."""
    quantize, (multiply_tile, multiply) = make_quantize(has_mins), make_multiply(bits, has_mins, wide_scales)

    @_jit
    def normalize(p, weight, row, me, threads):
        """The norm of this thread's rows of hidden."""
        tokens, width = int_argument(p, 1), int_argument(p, 6)
        first, last = share(tokens, me, threads)
        for t in range(first, last):
            rms_norm((int_argument(p, 0) + 4 * t * width, weight, width, row - 64, row))
            quantize(row, width // 32, t, 0, tokens, width // 32, int_argument(p, 10), int_argument(p, 18))

    @_jit
    def round_rows(p, x, width, me, threads):
        """This thread's rows of x."""
        tokens = int_argument(p, 1)
        first, last = share(tokens, me, threads)
        for t in range(first, last):
            row = x + 4 * t * width
            quantize(row, width // 32, t, 0, tokens, width // 32, int_argument(p, 10), int_argument(p, 18))

    @_jit
    def gate_and_up(p, linear, row, me, threads):
        """SwiGLU of this thread's groups of 32 columns, tile by tile of tokens: gate and up stay in the L1 cache."""
        w, tokens, inner, source = i64(linear), int_argument(p, 1), int_argument(p, 7), int_argument(p, 18)
        groups = int_argument(p, 6) // 32
        first, last = share(inner // 32, me, threads)
        for group in range(first, last):
            t = 0
            while t < tokens:
                size = tile_size(tokens - t)
                for half in range(2):
                    block = 2 * group + half * inner // 16
                    out = row + 128 * half
                    multiply_tile(t, size, source, tokens, groups, block, w[0], w[1], w[2], w[3], out, 256, 0)
                for i in range(size):
                    gate = row + 256 * i
                    swiglu((gate, gate + 128, 32, gate))
                    quantize(gate, 1, t + i, group, tokens, inner // 32, int_argument(p, 10), int_argument(p, 17))
                t += size

    @_jit
    def product(p, linear, workspace, in_features, out_features, out, accumulate, me, threads):
        """out (+)= the rounded activations times the linear whose four addresses are at `linear`."""
        w, tokens, groups, blocks = i64(linear), int_argument(p, 1), in_features // 32, out_features // 16
        multiply(me, threads, workspace, tokens, groups, blocks, w[0], w[1], w[2], w[3], out, accumulate)

    return normalize, round_rows, gate_and_up, product


def make_run_layer(head_dim, bits, has_mins, wide_scales, kv_type):
    """One layer, a barrier after each phase."""
    normalize, round_rows, gate_and_up, product = make_mlp_and_rows(bits, has_mins, wide_scales)
    attend_items = make_attention(head_dim, head_dim, "f32", kv_type)
    rotate_and_store = make_rotate_and_store(head_dim, kv_type)

    @_jit
    def attend(p, layer, attention, me, threads):
        i64(attention)[HEADER + 10] = i64(layer)[20]
        i64(attention)[HEADER + 11] = i64(layer)[21]
        i64(attention)[HEADER + 23] = i64(layer)[22]
        attend_items(attention, me, threads, False)
        barrier(p)
        attend_items(attention, me, threads, True)

    @_jit
    def run_layer(p, layer, attention, row, me, threads):
        hidden, width, inner, rounded = int_argument(p, 0), int_argument(p, 6), int_argument(p, 7), int_argument(p, 18)
        heads, kv_heads = int_argument(p, 8), int_argument(p, 9)
        qkv, attended, activated = int_argument(p, 15), int_argument(p, 16), int_argument(p, 17)
        attended_width = heads * head_dim
        normalize(p, i64(layer)[0], row, me, threads)
        barrier(p)
        qkv_width = attended_width + 2 * kv_heads * head_dim
        product(p, layer + 8 * 4, rounded, width, qkv_width, qkv, 0, me, threads)
        barrier(p)
        rotate_and_store(p, layer, attention, row, me, threads)
        barrier(p)
        attend(p, layer, attention, me, threads)
        barrier(p)
        round_rows(p, attended, attended_width, me, threads)
        barrier(p)
        product(p, layer + 8 * 8, rounded, attended_width, width, hidden, 1, me, threads)
        barrier(p)
        normalize(p, i64(layer)[1], row, me, threads)
        barrier(p)
        gate_and_up(p, layer + 8 * 12, row, me, threads)
        barrier(p)
        product(p, layer + 8 * 16, activated, inner, width, hidden, 1, me, threads)
        barrier(p)

    return run_layer


def make_kernel(head_dim, bits, has_mins, wide_scales, kv_type):
    run_layer = make_run_layer(head_dim, bits, has_mins, wide_scales, kv_type)

    def kernel(p):
        me, threads = thread(p), num_threads(p)
        mine = int_argument(p, 19) + me * int_argument(p, 20)
        row = mine + 512  # before it: a copy of the attention's arguments, eps, and the factor of stores
        f32(row - 64)[0] = float_argument(p, 24)
        for i in range(int_argument(p, 22)):
            i64(mine)[i] = i64(int_argument(p, 21))[i]
        for index in range(int_argument(p, 2)):
            run_layer(p, int_argument(p, 3) + 8 * LAYER_FIELDS * index, mine, row, me, threads)
        hidden, out, width = int_argument(p, 0), int_argument(p, 5), int_argument(p, 6)
        first, last = share(int_argument(p, 1), me, threads)
        for t in range(first, last):
            rms_norm((hidden + 4 * t * width, int_argument(p, 4), width, row - 64, out + 4 * t * width))

    return kernel
