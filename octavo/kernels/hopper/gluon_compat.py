"""The part of Gluon whose names move between Triton releases, under one name each, and the PTX that Gluon cannot spell.

Written for Triton 3.6 (the GPU machine's) and 3.9. The aliases are looked up while a kernel is compiled, so kernels are
written once. Triton itself uses named barriers 0 to 1 + (number of worker partitions); ours start at `FIRST_BARRIER`.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

FIRST_BARRIER = 6

if hasattr(tma, "async_load"):
    tma_load, tma_store = tma.async_load, tma.async_store
else:  # Triton 3.6
    tma_load, tma_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait
warps_sync = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of one partition

if hasattr(tma, "async_atomic_add"):
    tma_add = tma.async_atomic_add
else:  # Triton 3.6 has the operation, but no name for it

    @builtin
    def tma_add(tensor_desc, coord, src, _semantic=None):
        """Start adding a block in shared memory to global memory."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


# over a loop, the assembler of Triton 3.9 copies operands that stay in registers at every turn; that of 3.6 does not
KEEPS_LOOP_OPERANDS = not hasattr(tma, "async_load")
FITS_THREE_PRODUCTS = gl.constexpr(KEEPS_LOOP_OPERANDS)  # and that of 3.9 wants more registers for products in flight


@builtin
def reinterpret(memory, shape, layout, _semantic=None):
    """Shared memory in another shape and layout; a method with a leading underscore until 3.6, without in 3.9."""
    shape = [_unwrap_if_constexpr(size) for size in _unwrap_if_constexpr(shape)]
    return _semantic.memdesc_reinterpret(memory, memory.dtype, shape, _unwrap_if_constexpr(layout))


@gluon.jit
def barrier_sync(index, THREADS: gl.constexpr):
    """Wait at named barrier `index` until THREADS threads have synced with it or arrived at it."""
    gl.inline_asm_elementwise(
        f"bar.sync $1, {THREADS}; mov.u32 $0, 0;", "=r,r", [index], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def barrier_arrive(index, THREADS: gl.constexpr):
    """Arrive at named barrier `index` without waiting."""
    gl.inline_asm_elementwise(
        f"bar.arrive $1, {THREADS}; mov.u32 $0, 0;", "=r,r", [index], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def barrier_sync_if(condition, index, THREADS: gl.constexpr):
    """`barrier_sync` when the scalar condition, the same in all threads, holds."""
    gl.inline_asm_elementwise(
        f"{{ .reg .pred p; setp.ne.s32 p, $2, 0; @p bar.sync $1, {THREADS}; mov.u32 $0, 0; }}",
        "=r,r,r",
        [index, condition.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def wait_for_earlier_kernel(x):
    """Wait for the kernel before this one and let the next one start: see `triton.early_launch`; x is any int32."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r,r", [x],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def tma_written_wait():
    """Wait until this thread's TMA stores are in global memory; `tma_store_wait` waits only until they left shared."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.u32 $0, 0;", "=r,r", [gl.program_id(0)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def finish_before_next_wait(x):
    """Return x (fp32, at least 0), computed before whatever waits next.

    The assembler may move a wait for asynchronous products above arithmetic that does not need them, which serialises
    the two. It keeps the order of a sleep and a wait, so x becomes the condition of a sleep that never happens.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .f32 t; add.f32 t, $2, $3; setp.lt.f32 p, t, 0f00000000;"
        " mov.b32 $0, $2; mov.b32 $1, $3; @p nanosleep.u32 1; }",
        "=r,=r,r,r",
        [x],
        dtype=gl.float32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def tanh(x):
    """tanh by the hardware's approximation (relative error 2^-11)."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def pack_pairs(x, dtype: gl.constexpr):
    """x (m, n) fp32 → (m, n / 2) int32, two neighbours of a row as 16-bit floats in one register.

    As 16-bit values the compiler would carry each half through a loop by itself and copy the pairs together again.
    """
    low, high = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )


@gluon.jit
def unpack_pairs(x, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """What `pack_pairs` packed, (m, n) in `dtype`, in LAYOUT, which must need no exchange between threads."""
    low = gl.inline_asm_elementwise("{ .reg .b16 t; mov.b32 {$0, t}, $1; }", "=h,r", [x], gl.int16, True, 1)
    high = gl.inline_asm_elementwise("{ .reg .b16 t; mov.b32 {t, $0}, $1; }", "=h,r", [x], gl.int16, True, 1)
    pairs = gl.join(low, high).to(dtype, bitcast=True)
    return gl.convert_layout(gl.reshape(pairs, [x.shape[0], x.shape[1] * 2]), LAYOUT, assert_trivial=True)


def _scale_asm(n: int) -> str:
    """x·a for n values of one thread's accumulator (two rows, in turns of two), skipped by warps where every a is 1."""
    differs = f"setp.neu.f32 p, ${2 * n}, 0f3F800000; setp.neu.or.f32 p, ${2 * n + 2}, 0f3F800000, p;"
    copy = " ".join(f"mov.b32 ${i}, ${i + n};" for i in range(n))
    scale = " ".join(f"mul.f32 ${i}, ${i}, ${i + 2 * n};" for i in range(n))
    return f"{{ .reg .pred p; {differs} vote.sync.any.pred p, p, -1; {copy} @!p bra DONE; {scale} DONE: }}"


_SCALE_32, _SCALE_64 = gl.constexpr(_scale_asm(32)), gl.constexpr(_scale_asm(64))
_SCALE_OPERANDS_32, _SCALE_OPERANDS_64 = (gl.constexpr(",".join(["=r"] * n + ["r"] * (2 * n))) for n in (32, 64))


@gluon.jit
def scale_unless_one(x, a):
    """x·a, x a wgmma accumulator of 64 rows and a column a (64, 1); warps whose a are all 1 pass on."""
    if x.shape[1] == 64:
        return gl.inline_asm_elementwise(_SCALE_32, _SCALE_OPERANDS_32, [x, a], gl.float32, False, 32)
    else:
        return gl.inline_asm_elementwise(_SCALE_64, _SCALE_OPERANDS_64, [x, a], gl.float32, False, 64)
