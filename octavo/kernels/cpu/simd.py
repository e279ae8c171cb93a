"""What kernels are written with: pointers and threads for Numba code, and vectors of 16 lanes emitted as LLVM code.

Inner loops that auto-vectorisation misses are emitted by Python that unrolls itself with a `Code` (an LLVM builder
with the few operations we need). It is portable vector code, which LLVM lowers to AVX-512, AVX2 or NEON; only the
int8 dot product names the instruction of the CPU.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from octavo.kernels.cpu.jit import HEADER, cpu, lacks

LANES = 16
I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


def vector(dtype, lanes=LANES):
    return ir.VectorType(dtype, lanes)


# ---- pointers and threads, for Numba code ----------------------------------------------------------------------------


def _pointer_to(dtype):
    pointer = types.CPointer(dtype)

    @intrinsic
    def cast(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(pointer))

        return pointer(types.int64), codegen

    return cast


f32, f64, i64, i32, i8 = (_pointer_to(t) for t in (types.float32, types.float64, types.int64, types.int32, types.int8))
"""From an address (int64) to a pointer that can be indexed."""


@intrinsic
def _call(typingctx, address):
    """Calls int f(void) at an address."""

    def codegen(context, builder, signature, args):
        function = builder.inttoptr(args[0], ir.FunctionType(I32, []).as_pointer())
        return builder.sext(builder.call(function, []), I64)

    return types.int64(types.int64), codegen


@register_jitable
def thread(p):
    """This thread's number; p is the kernel's argument."""
    return _call(i64(p)[0]) if i64(p)[0] != 0 else 0


@register_jitable
def num_threads(p):
    return _call(i64(p)[1]) if i64(p)[1] != 0 else 1


@register_jitable
def barrier(p):
    """Waits for all threads of the region."""
    if i64(p)[2] != 0:
        _call(i64(p)[2])


@register_jitable
def int_argument(p, index):
    return i64(p)[HEADER + index]


@register_jitable
def float_argument(p, index):
    return f64(p)[HEADER + index]


@intrinsic
def exp(typingctx, x):
    """e^x in fp32, without the C library."""

    def codegen(context, builder, signature, args):
        return Code(builder).exp(args[0])

    return types.float32(types.float32), codegen


@register_jitable
def share(count, part, parts):
    """The bounds of one of `parts` nearly equal pieces of range(count)."""
    return count * part // parts, count * (part + 1) // parts


# ---- vectors, emitted ------------------------------------------------------------------------------------------------


class Code:
    """An LLVM builder with the vector operations of our kernels. Addresses are int64 values."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def offset(self, address, *terms):
        """address + the terms, each a value, a constant or a (value, constant factor)."""
        for term in terms:
            value = self.b.mul(term[0], I64(term[1])) if isinstance(term, tuple) else term
            address = self.b.add(address, I64(value) if isinstance(value, int) else value)
        return address

    def load(self, address, dtype):
        return self.b.load(self.b.inttoptr(address, dtype.as_pointer()), align=1)

    def store(self, value, address):
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=1)

    def call(self, name, result, *args, fastmath=()):
        function_type = ir.FunctionType(result, [a.type for a in args])
        function = cgutils.get_or_insert_function(self.b.module, function_type, name)
        return self.b.call(function, args, fastmath=fastmath)

    def prefetch(self, address, count):
        """Asks for `count` bytes that will be read soon."""
        for i in range(0, count, 64):
            pointer = self.b.inttoptr(self.offset(address, i), I8.as_pointer())
            # for reading, data, into the L2 cache: a tile of keys and values and the next one do not fit the L1
            self.call("llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(2), I32(1))

    def splat(self, scalar, lanes=LANES):
        one = self.b.insert_element(ir.Constant(vector(scalar.type, lanes), ir.Undefined), scalar, I32(0))
        return self.b.shuffle_vector(one, one, ir.Constant(vector(I32, lanes), [0] * lanes))

    def splat_load(self, address, dtype):
        return self.splat(self.load(address, dtype))

    def constant(self, value, dtype=F32, lanes=LANES):
        return ir.Constant(vector(dtype, lanes), [value] * lanes)

    def fma(self, a, b, c):
        if lacks("fma"):  # LLVM would call the C library for each lane
            return self.b.fadd(self.b.fmul(a, b), c)
        return self.call(f"llvm.fma.{_suffix(a.type)}", a.type, a, b, c)

    def variable(self, value):
        """A mutable value (LLVM keeps it in a register)."""
        slot = cgutils.alloca_once(self.b, value.type)
        self.b.store(value, slot)
        return slot

    def reduce(self, op, values):
        """max or add over the lanes."""
        if isinstance(values.type.element, ir.IntType):
            return self.call(f"llvm.vector.reduce.{op}.{_suffix(values.type)}", values.type.element, values)
        flags = ("reassoc", "nnan") if op == "max" else ("reassoc",)
        args = (values,) if op == "max" else (ir.Constant(F32, 0.0), values)
        return self.call(f"llvm.vector.reduce.f{op}.{_suffix(values.type)}", F32, *args, fastmath=flags)

    def load_floats(self, address, dtype):
        """16 fp32, fp16 or bf16 numbers as fp32."""
        if dtype == "f32":
            return self.load(address, vector(F32))
        if dtype == "f16":
            return self._widen_fp16(address)
        assert dtype == "bf16"
        wide = self.b.zext(self.load(address, vector(I16)), vector(I32))
        return self.b.bitcast(self.b.shl(wide, self.constant(16, I32)), vector(F32))

    def _widen_fp16(self, address):
        if not lacks("f16c"):
            return self.b.fpext(self.load(address, vector(F16)), vector(F32))
        bits = self.b.zext(self.load(address, vector(I16)), vector(I32))
        sign = self.b.shl(self.b.and_(bits, self.constant(0x8000, I32)), self.constant(16, I32))
        rest = self.b.shl(self.b.and_(bits, self.constant(0x7FFF, I32)), self.constant(13, I32))
        finite = self.b.fmul(self.b.bitcast(rest, vector(F32)), self.constant(2.0**112))  # the exponents' biases differ
        special = self.b.or_(rest, self.constant(0x7F800000, I32))
        is_special = self.b.icmp_unsigned(">=", rest, self.constant(0x7C00 << 13, I32))
        magnitude = self.b.select(is_special, special, self.b.bitcast(finite, vector(I32)))
        return self.b.bitcast(self.b.or_(magnitude, sign), vector(F32))

    def exp(self, x):
        """e^x, within 2 ulp; 0 below −87 and clamped at 88."""
        x = self.call(f"llvm.minnum.{_suffix(x.type)}", x.type, x, ir.Constant(x.type, _like(x.type, 88.0)))
        n = self.b.fmul(x, ir.Constant(x.type, _like(x.type, 1.4426950408889634)))
        n = self.call(f"llvm.rint.{_suffix(x.type)}", x.type, n)
        n = self.call(f"llvm.maxnum.{_suffix(x.type)}", x.type, n, ir.Constant(x.type, _like(x.type, -127.0)))
        r = self.fma(n, ir.Constant(x.type, _like(x.type, -0.693145751953125)), x)
        r = self.fma(n, ir.Constant(x.type, _like(x.type, -1.428606765330187e-06)), r)
        r = self.call(f"llvm.maxnum.{_suffix(x.type)}", x.type, r, ir.Constant(x.type, _like(x.type, -0.5)))
        y = ir.Constant(x.type, _like(x.type, 1 / 5040))
        for factorial in (720, 120, 24, 6, 2, 1, 1):
            y = self.fma(y, r, ir.Constant(x.type, _like(x.type, 1 / factorial)))
        integer = vector(I32, x.type.count) if isinstance(x.type, ir.VectorType) else I32
        exponent = self.b.add(self.b.fptosi(n, integer), ir.Constant(integer, _like(integer, 127)))
        power = self.b.bitcast(self.b.shl(exponent, ir.Constant(integer, _like(integer, 23))), x.type)
        return self.b.fmul(y, power)

    def tanh(self, x):
        """Cephes' tanhf: an odd polynomial below 0.625, by e^2x above."""
        kind, constant = x.type, lambda value: ir.Constant(x.type, _like(x.type, value))
        square = self.b.fmul(x, x)
        y = constant(-5.70498872745e-3)
        for c in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
            y = self.fma(y, square, constant(c))
        near = self.fma(self.b.fmul(y, square), x, x)
        doubled = self.exp(self.b.fmul(x, constant(2.0)))
        far = self.b.fsub(constant(1.0), self.b.fdiv(constant(2.0), self.b.fadd(doubled, constant(1.0))))
        magnitude = self.call(f"llvm.fabs.{_suffix(kind)}", kind, x)
        return self.b.select(self.b.fcmp_ordered("<", magnitude, constant(0.625)), near, far)

    def store_floats(self, value, address, dtype):
        """16 fp32 numbers as fp32, fp16 or bf16 (rounded to nearest even)."""
        if dtype == "f16":
            value = self.b.fptrunc(value, vector(F16))
        elif dtype == "bf16":
            bits = self.b.bitcast(value, vector(I32))
            odd = self.b.and_(self.b.lshr(bits, self.constant(16, I32)), self.constant(1, I32))
            rounded = self.b.add(self.b.add(bits, self.constant(0x7FFF, I32)), odd)
            value = self.b.trunc(self.b.lshr(rounded, self.constant(16, I32)), vector(I16))
        self.store(value, address)

    def transpose(self, rows):
        """16 vectors to the 16 vectors of their lanes: four perfect shuffles."""
        low = [i // 2 + LANES * (i % 2) for i in range(LANES)]
        masks = [ir.Constant(vector(I32), [i + 8 * half for i in low]) for half in range(2)]
        for _ in range(4):
            rows = [self.b.shuffle_vector(rows[i], rows[i + 8], mask) for i in range(8) for mask in masks]
        return rows

    def add_halves(self, x, y, parts):
        """x and y hold 16 / parts sums in parts each; the sums of both, in half as many parts."""
        first = [i for i in range(2 * LANES) if i % parts < parts // 2]
        halves = [ir.Constant(vector(I32), [i + shift for i in first]) for shift in (0, parts // 2)]
        return self.b.fadd(*(self.b.shuffle_vector(x, y, half) for half in halves))

    def dot4(self, acc, u, s, bits):
        """acc + Σ over each lane's 4 bytes of u (unsigned, below 2^bits) times s (signed): int32 in 16 lanes."""
        _, features = cpu()
        if "avx512vnni" in features:
            words = [self.b.bitcast(x, vector(I32)) for x in (u, s)]
            return self.call("llvm.x86.avx512.vpdpbusd.512", acc.type, acc, *words)
        if "avx2" in features:
            return self._dot4_avx2(acc, u, s, bits)
        return self._dot4_portable(acc, u, s)

    def _dot4_portable(self, acc, u, s):
        u, s = (self.b.bitcast(x, vector(I32)) for x in (u, s))
        for byte in range(4):
            wide_u = self.b.and_(self.b.lshr(u, self.constant(8 * byte, I32)), self.constant(255, I32))
            wide_s = self.b.ashr(self.b.shl(s, self.constant(24 - 8 * byte, I32)), self.constant(24, I32))
            acc = self.b.add(acc, self.b.mul(wide_u, wide_s))
        return acc

    def _dot4_avx2(self, acc, u, s, bits):
        """Pairs are added in int16, which 8 bits would overflow: those go nibble by nibble."""
        if bits > 5:
            low = self.b.and_(u, self.constant(15, I8, 64))
            high = self.b.lshr(u, self.constant(4, I8, 64))
            acc = self._dot4_avx2(acc, low, s, 4)
            times16 = self._dot4_avx2(self.constant(0, I32), high, s, 4)
            return self.b.add(acc, self.b.shl(times16, self.constant(4, I32)))
        halves = []
        for half in range(2):
            u8, s8 = (self._half(x, half, 32) for x in (u, s))
            pairs = self.call("llvm.x86.avx2.pmadd.ub.sw", vector(I16), u8, s8)
            halves.append(self.call("llvm.x86.avx2.pmadd.wd", vector(I32, 8), pairs, self.constant(1, I16)))
        both = ir.Constant(vector(I32), list(range(LANES)))
        return self.b.add(acc, self.b.shuffle_vector(halves[0], halves[1], both))

    def _half(self, x, half, lanes):
        return self.b.shuffle_vector(
            x, x, ir.Constant(vector(I32, lanes), list(range(half * lanes, (half + 1) * lanes)))
        )


def _suffix(dtype):
    if isinstance(dtype, ir.VectorType):
        return f"v{dtype.count}{_suffix(dtype.element)}"
    return f"i{dtype.width}" if isinstance(dtype, ir.IntType) else "f32"


def _like(dtype, value):
    return [value] * dtype.count if isinstance(dtype, ir.VectorType) else value


def emitted(emit: Callable[..., None]):
    """A function for Numba code whose body `emit(code, *addresses_and_counts)` writes; its arguments are int64."""
    import inspect

    names = list(inspect.signature(emit).parameters)[1:]

    def typer(typingctx, arguments):
        def codegen(context, builder, signature, args):
            values = [builder.extract_value(args[0], i) for i in range(len(names))]
            emit(Code(builder), *values)
            return context.get_dummy_value()

        return types.void(types.UniTuple(types.int64, len(names))), codegen

    return intrinsic(typer)
