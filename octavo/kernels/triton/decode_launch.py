"""What the decode kernels over pages share: launches planned once for each shape, and the combination of pieces.

A decode kernel deals out the keys of all sequences in equal parts; a sequence that falls into several leaves pieces,
which `combine_kernel` weighs by exp(LSE_piece − LSE). All that a call's launches need but its tensors follows from
shapes, strides and options, and is computed on the first call with these: a call from Python then costs three
allocations and two launches.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor
from octavo.kernels.triton.early_launch import early_launch_options
from octavo.kernels.triton.flash_fwd import capability, contiguous_rows, lacks_fp8, num_processors
from octavo.kernels.triton.launch import Constants, integer_key, launch, profiled
from octavo.kernels.triton.scores import sequence

DTYPES = (torch.float16, torch.bfloat16)
# integers that change from step to step, or may be 1 by chance: nothing is compiled for their value
VARYING = [
    "batch", "parts", "max_q", "capacity", "window_left", "stride_table", "stride_lb", "stride_lh", "tokens", "each",
    "entries",
]  # fmt: skip
MIN_COLUMNS, MAX_COMBINING = 64, 1056  # of an output that one program combines, and such programs
_UNSUPPORTED = ("seqused_q", "leftpad_k", "qv", "alibi_slopes", "attn_bias")


@triton.jit
def note_pieces(notes, part, b, at, count, BY_SEQUENCE: tl.constexpr):
    """Note where the pieces of sequence b are: `count` of them, the first in place `at`."""
    entry = notes + 4 * (b if BY_SEQUENCE else part)
    tl.store(entry, at)
    tl.store(entry + 1, count)
    tl.store(entry + 2, b)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=["cu_seqlens_q"])
def combine_kernel(
    out, lse, cu_seqlens_q, scratch, stride_os, stride_oh, stride_lb, stride_lh,
    batch, heads, heads_q, max_q, tokens, each, entries, at_lse, at_out,
    GROUP: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
    PIECES: tl.constexpr, BY_SEQUENCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of a sequence in several pieces, COLUMNS of every `each`-th (query, head): Σ exp(LSE_piece − LSE) · piece."""
    entry = tl.program_id(0) // each
    first_item = tl.program_id(0) % each
    notes = scratch.to(tl.pointer_type(tl.int32))
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if entry == entries:
        clear_rows(out, lse, cu_seqlens_q, first_item, each, batch, tokens, heads_q, stride_os, stride_oh, stride_lh,
                   HEAD_DIM_V, COLUMNS)  # fmt: skip
        return
    first = tl.load(notes + 4 * entry)
    count = tl.load(notes + 4 * entry + 1)
    b = tl.load(notes + 4 * entry + 2)
    start_q, length_q = sequence(b, cu_seqlens_q, None, max_q)
    chunks: tl.constexpr = (HEAD_DIM_V + COLUMNS - 1) // COLUMNS
    items = tl.where(count > 1, length_q * heads_q * chunks, 0)
    for item in range(first_item, items, each):
        i = item // chunks // heads_q
        head = (item // chunks % heads_q).to(tl.int64)
        chunk = item % chunks
        dv = chunk * COLUMNS + tl.arange(0, COLUMNS)
        place = head // GROUP * BLOCK_M + i * GROUP + head % GROUP
        m = tl.full((), float("-inf"), tl.float32)
        l = tl.zeros((), tl.float32)
        acc = tl.zeros((COLUMNS,), tl.float32)
        for p0 in range(0, count, PIECES):
            p = p0 + tl.arange(0, PIECES)
            at = tl.where(p == 0, first, (first // 2 + p) * 2).to(tl.int64) * heads * BLOCK_M + place
            part = tl.load(scratch + at_lse + at, mask=p < count, other=float("-inf"))
            values = tl.load(
                scratch + at_out + at[:, None] * HEAD_DIM_V + dv[None, :],
                mask=(p < count)[:, None] & (dv < HEAD_DIM_V)[None, :], other=0.0,
            )  # fmt: skip
            m_new = tl.maximum(m, tl.max(part, 0))
            safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            weight = tl.exp(part - safe)
            alpha = tl.exp(m - safe)
            acc = acc * alpha + tl.sum(weight[:, None] * values, 0)
            l = l * alpha + tl.sum(weight, 0)
            m = m_new
        l = tl.where(l == 0.0, 1.0, l)
        row = start_q + i
        lse_first = b.to(tl.int64) * stride_lb + i
        if cu_seqlens_q is None:
            row += b.to(tl.int64) * max_q
        else:
            lse_first += start_q
        to = out + row * stride_os + head * stride_oh + dv
        tl.store(to, (acc / l).to(out.dtype.element_ty), mask=dv < HEAD_DIM_V)
        if chunk == 0:
            tl.store(lse + lse_first + head * stride_lh, m + tl.log(l))


@triton.jit
def clear_rows(
    out, lse, cu_seqlens_q, first_item, each, batch, tokens, heads_q, stride_os, stride_oh, stride_lh,
    HEAD_DIM_V: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """0 and −inf for every `each`-th (query, head) of those that belong to no sequence."""
    if cu_seqlens_q is not None:
        first_row = tl.load(cu_seqlens_q + batch)
        for item in range(first_item, (tokens - first_row) * heads_q, each):
            row = (first_row + item // heads_q).to(tl.int64)
            head = (item % heads_q).to(tl.int64)
            for column in tl.static_range(0, HEAD_DIM_V, COLUMNS):
                dv = column + tl.arange(0, COLUMNS)
                to = out + row * stride_os + head * stride_oh + dv
                tl.store(to, tl.zeros_like(dv).to(out.dtype.element_ty), mask=dv < HEAD_DIM_V)
            tl.store(lse + head * stride_lh + row, float("-inf"))


def power_of_2(n: int) -> int:
    """The next power of two that the tensor cores take."""
    return max(16, 1 << (n - 1).bit_length())


def is_hopper(device: torch.device) -> bool:
    """True for sm_90; False in the interpreter."""
    return device.type == "cuda" and capability(device)[0] == 9


def max_queries(q: Tensor, t: AttentionTensors) -> int:
    return t.max_seqlen_q if t.cu_seqlens_q is not None else q.shape[1]


def num_parts(heads: int, programs: int) -> int:
    """Parts of the keys for each head, so that all heads' parts fill `programs` places in whole waves."""
    waves = 1
    while waves * programs % heads > waves * programs // 50:
        waves += 1
    return max(1, waves * programs // heads)


@dataclass(slots=True, eq=False)
class Launch:
    """A kernel's launch but for its tensors: what follows from shapes, strides and options alone."""

    kernel: Any
    programs: int
    scalars: tuple[Any, ...]
    constants: Constants
    key: Hashable
    options: dict[str, Any]
    compiled: tuple[Any, ...] | None = None

    def __call__(self, *tensors: Any) -> None:
        """Launch on tensors (and descriptors of them), on a GPU or interpreted."""
        if not tensors[-1].is_cuda:
            self.kernel[(self.programs,)](*tensors, *self.scalars, **dict(self.constants), **self.options)
        elif self.compiled is None or profiled():
            grid, arguments = (self.programs, 1, 1), (*tensors, *self.scalars)
            run, function, metadata, values = launch(
                self.kernel, grid, arguments, self.constants, self.key, **self.options
            )
            self.compiled = run, tensors[-1].get_device(), function, metadata, (*self.scalars, *values)
        else:
            run, device, function, metadata, rest = self.compiled
            stream = torch._C._cuda_getCurrentRawStream(device)
            # of an address the launcher does not ask the driver whether it is the GPU's
            addresses = [x.data_ptr() if type(x) is Tensor else x for x in tensors]
            run(self.programs, 1, 1, stream, function, metadata, None, None, None, *addresses, *rest)


class Scratch(NamedTuple):
    """Places in one fp32 buffer: notes of where the pieces are, as int32, then the pieces' LSE and output.

    A sequence in several pieces has a note (first piece, pieces, sequence). There are at most as many such sequences as
    parts: with more sequences than parts the notes are those of the parts in which one begins, else of the sequences.
    """

    by_sequence: bool
    notes: int
    at_lse: int
    at_out: int
    size: int


def scratch_of(batch: int, parts: int, rows: int, head_dim_v: int) -> Scratch:
    """Space for the pieces of `parts`, at most two each, of `rows` rows; each section begins on 64 bytes."""
    notes = min(batch, parts)
    at_lse = -(-4 * notes // 16) * 16
    at_out = at_lse + -(-2 * parts * rows // 16) * 16
    return Scratch(batch <= parts, notes, at_lse, at_out, at_out + 2 * parts * rows * head_dim_v)


def combine_launch(
    dtype: torch.dtype, shape: Sequence[int], strides: tuple[int, int, int, int], packed: bool, early: bool,
    sizes: tuple[int, int, int, int], scratch: Scratch,
) -> Launch:  # fmt: skip
    """The launch of `combine_kernel` into an output of `shape`; `strides` are of its rows and heads, of the LSE's
    sequences and heads, `sizes` the batch, the key heads, the longest query and the rows of a piece.
    """
    batch, heads, max_q, block_m = sizes
    heads_q, head_dim_v = shape[-2:]
    rows = max_q * heads_q
    entries = scratch.notes + packed
    # a program is one warp, and there are 8 to 16 a processor: more of them cost more than they overlap
    columns = power_of_2(head_dim_v)
    while columns > MIN_COLUMNS and entries * rows * 2 * head_dim_v <= MAX_COMBINING * columns:
        columns //= 2
    each = min(rows * -(-head_dim_v // columns), max(1, 2 * MAX_COMBINING // entries))
    scalars = (*strides, batch, heads, heads_q, max_q, shape[0], each, scratch.notes, scratch.at_lse, scratch.at_out)
    constants = (
        ("GROUP", heads_q // heads), ("HEAD_DIM_V", head_dim_v), ("BLOCK_M", block_m), ("COLUMNS", columns),
        ("PIECES", 2048 // columns), ("BY_SEQUENCE", scratch.by_sequence), ("PDL", early),
    )  # fmt: skip
    key = (dtype, integer_key((*strides[:2], heads, heads_q)), packed)
    return Launch(combine_kernel, entries * each, scalars, constants, key, {"num_warps": 1, "launch_pdl": early})


class DecodeCall(NamedTuple):
    """All of a call but its numbers."""

    device: torch.device
    dtype: torch.dtype
    q_shape: tuple[int, ...]
    q_strides: tuple[int, ...]
    cache_dtype: torch.dtype
    k_shape: tuple[int, ...]
    k_strides: tuple[int, ...]
    v_shape: tuple[int, ...]
    v_strides: tuple[int, ...]
    aligned: bool  # q and the caches begin on 16 bytes
    table_shape: tuple[int, ...]
    table_stride: int
    packed: bool
    max_q: int
    sink_dtype: torch.dtype | None
    spec: AttentionSpec

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.q_shape[-2] // self.k_shape[-2]


class DecodePlan(NamedTuple):
    """The two launches of a call, and what they write to."""

    decode: Launch
    combine: Launch
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    scratch_size: int  # fp32 numbers; 0: there is nothing to compute


class Tile(NamedTuple):
    """How a kernel takes a call: rows of one program, programs at a time on a processor, and what it is compiled by."""

    rows: int
    programs: int
    constants: Constants
    options: dict[str, Any]


def plan_decode(call: DecodeCall, kernel: Any, tile: Tile) -> DecodePlan:
    """The launches of `kernel`, which takes the arguments of `decode_kernel`."""
    heads, page, heads_q = call.k_shape[-2], call.k_shape[1], call.q_shape[-2]
    head_dim_v, batch = call.v_shape[-1], call.table_shape[0]
    early = early_launch_options(call.device)["PDL"]
    parts = num_parts(heads, tile.programs * num_processors(call.device))
    out_shape = (*call.q_shape[:-1], head_dim_v)
    lse_shape = (heads_q, call.q_shape[0]) if call.packed else (batch, heads_q, call.max_q)
    lse_strides = (0, lse_shape[1]) if call.packed else (heads_q * call.max_q, call.max_q)
    scratch = scratch_of(batch, parts, heads * tile.rows, head_dim_v)
    out_strides = (heads_q * head_dim_v, head_dim_v)
    strides = (*call.q_strides[-3:-1], *call.k_strides[:3], *call.v_strides[:3], *out_strides)
    window = None if call.spec.window_left < 0 else call.spec.window_left
    softcap = call.spec.softcap or None
    capacity = min(call.table_shape[1] * page, 2**31 - 1)
    scalars = (
        *strides, *lse_strides, call.table_stride, call.spec.softmax_scale, softcap, window,
        batch, parts, heads, call.max_q, capacity, scratch.at_lse, scratch.at_out,
    )  # fmt: skip
    key = (
        call.dtype, call.cache_dtype, call.aligned, call.sink_dtype, call.packed, integer_key((*strides, heads)),
        window is None, softcap is None,
    )  # fmt: skip
    constants = (
        *tile.constants, ("BY_SEQUENCE", scratch.by_sequence), ("BLOCK_B", 128 if batch <= 128 else 1024),
        ("PDL", early),
    )  # fmt: skip
    decode = Launch(kernel, parts * heads, scalars, constants, key, {**tile.options, "launch_pdl": early})
    sizes = (batch, heads, call.max_q, tile.rows)
    combine = combine_launch(call.dtype, out_shape, (*out_strides, *lse_strides), call.packed, early, sizes, scratch)
    return DecodePlan(decode, combine, out_shape, lse_shape, 0 if 0 in (*out_shape, batch) else scratch.size)


def decode_call(q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors) -> DecodeCall:
    assert t.block_table is not None
    packed, sink = t.cu_seqlens_q is not None, t.learnable_sink
    return DecodeCall(
        q.device, q.dtype, q.shape, q.stride(), k_cache.dtype, k_cache.shape, k_cache.stride(), v_cache.shape,
        v_cache.stride(), (q.data_ptr() | k_cache.data_ptr() | v_cache.data_ptr()) % 16 == 0, t.block_table.shape,
        t.block_table.stride(0), packed, t.max_seqlen_q if packed else q.shape[1], None if sink is None else sink.dtype,
        spec,
    )  # fmt: skip


def decode(
    plan_of: Callable[[DecodeCall], DecodePlan], q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec,
    t: AttentionTensors,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the launches that `plan_of` has for this call: (output, LSE)."""
    assert t.seqused_k is not None
    q = contiguous_rows(q)
    plan = plan_of(decode_call(q, k_cache, v_cache, spec, t))
    out = torch.empty(plan.out_shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(plan.lse_shape, dtype=torch.float32, device=q.device)
    if plan.scratch_size == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    scratch = torch.empty(plan.scratch_size, dtype=torch.float32, device=q.device)
    tensors = (t.k_scale, t.v_scale, t.learnable_sink, out, lse, scratch, t.cu_seqlens_q, t.seqused_k, t.block_table)
    plan.decode(q, k_cache, v_cache, *tensors)
    plan.combine(out, lse, t.cu_seqlens_q, scratch)
    return out, lse


def refuses_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> str | None:
    """Why no decode kernel over pages can take the call, or None."""
    if q.dtype not in DTYPES:
        return f"it takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    given = [name for name in _UNSUPPORTED if getattr(t, name) is not None]
    # one query sees all keys with a causal mask and without
    causal = spec.window_right == 0 or max_queries(q, t) == 1
    if given or spec.dropout_p or num_splits or not causal:
        return f"it does not take {', '.join(given) or 'dropout, num_splits or masks that are not causal'}"
    if spec.softmax_scale <= 0:
        return f"it takes a positive softmax_scale, not {spec.softmax_scale}"
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        return "it takes caches whose last axis is contiguous"
    if q.is_cuda and capability(q.device) < (8, 0):
        return f"it needs compute capability 8.0, {q.device} has {capability(q.device)}"
    return lacks_fp8(k_cache)
