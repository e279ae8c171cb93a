"""Decode over a paged cache on Hopper (sm_90), in Gluon: keys and values go from memory straight into registers.

With few query rows each number of the cache is used by one product only, so a stop in shared memory buys nothing, and
for a cache in 8 bits it costs the most: there the numbers would pass through it three times. Here every warp takes keys
of its own, loads them in the very layout in which the tensor cores want them, turns them to 16 bits in registers and
multiplies: S^T = K·Q^T, O^T += V^T·P^T, 16 keys (or channels) by 8 rows at a time. Warps meet only at a sequence's end.
A product may sum over the channels in any order, as long as both sides agree, and its rows may come in any order too:
so a thread loads 16 neighbouring channels, and no number ever changes its thread.

Work is dealt as in `triton.paged_decode`: equal shares of all sequences' blocks, found on the device, pieces combined.
While a sequence's end is written, the first keys of the next one are under way.
"""

from functools import lru_cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from octavo.kernels.hopper.gluon_compat import tanh, wait_for_earlier_kernel
from octavo.kernels.hopper.mla_decode import note_pieces
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor
from octavo.kernels.triton.decode_launch import (
    VARYING,
    DecodeCall,
    DecodePlan,
    Tile,
    decode,
    decode_call,
    max_queries,
    num_parts,
    plan_decode,
    refuses_decode,
)
from octavo.kernels.triton.flash_fwd import num_processors

LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def _layout(warps, keys, words, registers, lanes):
    """Of (warps, keys / 16, 16, words), whose bases are given as (key below 16, word)."""
    registers = [[0, 0, *base] for base in registers] + [
        [0, 1 << i, 0, 0] for i in range((keys // 16).bit_length() - 1)
    ]
    by_warp = [[1 << i, 0, 0, 0] for i in range(warps.bit_length() - 1)]
    lanes = [[0, 0, *base] for base in lanes]
    return gl.DistributedLinearLayout(registers, lanes, by_warp, [], [warps, keys // 16, 16, words])


@gluon.constexpr_function
def keys_layout(warps, keys, words, per_word):
    """Thread t of a quad holds 16 neighbouring numbers in each 64; the eight quads are keys."""
    run = 16 // per_word
    registers = [[0, 1 << i] for i in range(run.bit_length() - 1)]
    registers += [[0, 4 * run << i] for i in range((words // (4 * run)).bit_length() - 1)] + [[8, 0]]
    return _layout(warps, keys, words, registers, [[0, run], [0, 2 * run], [1, 0], [2, 0], [4, 0]])


@gluon.constexpr_function
def values_layout(warps, keys, words):
    """The eight quads hold an eighth of a row each; thread t has keys 2t, 2t + 1, 2t + 8, 2t + 9."""
    run = words // 8
    registers = [[0, 1 << i] for i in range(run.bit_length() - 1)] + [[1, 0], [8, 0]]
    return _layout(warps, keys, words, registers, [[2, 0], [4, 0], [0, run], [0, 2 * run], [0, 4 * run]])


def _unpack_asm(kind: str, words: int) -> str:
    """PTX: one word of two or four numbers, or the words of two keys, interleaved, to 16-bit numbers in pairs."""
    outputs = (2 if kind == "16" else 4) * words
    first, second = f"${outputs}", f"${outputs + 1}"
    lines = [".reg .b32 x, y, z; .reg .b16 a, b;"]
    if kind == "16":
        pairs = [f"prmt.b32 x, {first}, {second}, {select};" for select in ("0x5410", "0x7632")]
        for i, pair in enumerate(pairs if words == 2 else [f"mov.b32 x, {first};"]):
            lines.append(f"{pair} mov.b32 {{${2 * i}, ${2 * i + 1}}}, x;")
        return "{ " + " ".join(lines) + " }"
    fours = [f"prmt.b32 z, {first}, {second}, {select};" for select in ("0x5140", "0x7362")]
    for i, four in enumerate(fours if words == 2 else [f"mov.b32 z, {first};"]):
        lines.append(four)
        if kind == "fp8":
            lines.append("mov.b32 {a, b}, z; cvt.rn.f16x2.e4m3x2 x, a; cvt.rn.f16x2.e4m3x2 y, b;")
        else:  # the bytes of 1024 + 128 + n in fp16, less 1152
            lines.append("xor.b32 z, z, 0x80808080; prmt.b32 x, z, 0x64646464, 0x4140;")
            lines.append("prmt.b32 y, z, 0x64646464, 0x4342; sub.f16x2 x, x, m; sub.f16x2 y, y, m;")
        lines.append(f"mov.b32 {{${4 * i}, ${4 * i + 1}}}, x; mov.b32 {{${4 * i + 2}, ${4 * i + 3}}}, y;")
    constant = ".reg .b32 m; mov.b32 m, 0x64806480; " if kind == "int8" else ""
    return "{ " + constant + " ".join(lines) + " }"


KEY_16, VALUE_16 = (gl.constexpr(_unpack_asm("16", words)) for words in (1, 2))
KEY_FP8, VALUE_FP8 = (gl.constexpr(_unpack_asm("fp8", words)) for words in (1, 2))
KEY_INT8, VALUE_INT8 = (gl.constexpr(_unpack_asm("int8", words)) for words in (1, 2))
TWO_OF_ONE, FOUR_OF_ONE = gl.constexpr("=h,=h,r"), gl.constexpr("=h,=h,=h,=h,r")
FOUR_OF_TWO, EIGHT_OF_TWO = gl.constexpr("=h,=h,=h,=h,r,r"), gl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r")


@gluon.jit
def keys_operand(x, DIM: gl.constexpr, DTYPE: gl.constexpr, ASM: gl.constexpr, LAYOUT: gl.constexpr):
    """Words (warps, keys, words) to the operand (warps, keys, DIM), its channels in the order of `channel_of`."""
    if x.shape[2] * 2 == DIM:
        a, b = gl.inline_asm_elementwise(ASM, TWO_OF_ONE, [x], (gl.int16, gl.int16), True, 1)
        y = gl.join(a, b)
    else:
        a, b, c, d = gl.inline_asm_elementwise(ASM, FOUR_OF_ONE, [x], (gl.int16, gl.int16, gl.int16, gl.int16), True, 1)
        y = gl.join(gl.join(a, c), gl.join(b, d))
    y = gl.reshape(y, [x.shape[0], x.shape[1], DIM // 64, 4, 4, 2, 2])
    y = gl.reshape(gl.permute(y, [0, 1, 2, 4, 5, 3, 6]), [x.shape[0], x.shape[1], DIM])
    return gl.convert_layout(y.to(DTYPE, bitcast=True), LAYOUT, assert_trivial=True)


@gluon.jit
def channel_of(k):
    """Channel that stands at place k of the product: thread k // 2 % 4 of a quad has 16 neighbours of each 64."""
    return k // 64 * 64 + k // 2 % 4 * 16 + k // 16 % 4 * 4 + k // 8 % 2 * 2 + k % 2


@gluon.jit
def values_operand(x, DIM: gl.constexpr, DTYPE: gl.constexpr, ASM: gl.constexpr, LAYOUT: gl.constexpr):
    """Words (warps, keys, words) to the operand (warps, DIM, keys); row 8 j + g is channel g · DIM / 8 + j."""
    WARPS: gl.constexpr = x.shape[0]
    KEYS: gl.constexpr = x.shape[1]
    WORDS: gl.constexpr = x.shape[2]
    even, odd = gl.split(gl.permute(gl.reshape(x, [WARPS, KEYS // 2, 2, WORDS]), [0, 1, 3, 2]))
    if WORDS * 2 == DIM:
        a0, a1, b0, b1 = gl.inline_asm_elementwise(
            ASM, FOUR_OF_TWO, [even, odd], (gl.int16, gl.int16, gl.int16, gl.int16), True, 1
        )
        y = gl.join(gl.join(a0, b0), gl.join(a1, b1))
    else:
        a0, a1, b0, b1, c0, c1, d0, d1 = gl.inline_asm_elementwise(
            ASM, EIGHT_OF_TWO, [even, odd],
            (gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16, gl.int16), True, 1,
        )  # fmt: skip
        y = gl.join(gl.join(gl.join(a0, c0), gl.join(b0, d0)), gl.join(gl.join(a1, c1), gl.join(b1, d1)))
    y = gl.reshape(y, [WARPS, KEYS // 2, 8, DIM // 8, 2])
    y = gl.reshape(gl.permute(y, [0, 3, 2, 1, 4]), [WARPS, DIM, KEYS])
    return gl.convert_layout(y.to(DTYPE, bitcast=True), LAYOUT, assert_trivial=True)


@gluon.jit
def pages_of(table, n, length, PAGE: gl.constexpr, LAYOUT: gl.constexpr):
    """Entries of the table for the keys from n on, one for each 16; past the end the last key's."""
    SIXTEENS: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))
    w = gl.arange(0, LAYOUT.shape[0], gl.SliceLayout(1, SIXTEENS))[:, None]
    h = gl.arange(0, LAYOUT.shape[1], gl.SliceLayout(0, SIXTEENS))[None, :]
    first = n + (w * LAYOUT.shape[1] + h) * 16
    return gl.load(table + gl.maximum(gl.minimum(first, length - 1), 0) // PAGE, mask=length > 0, other=0)


@gluon.jit
def load_words(base, pages, n, length, strides, PAGE: gl.constexpr, LAYOUT: gl.constexpr):
    """Words (warps, keys, words) of the keys from n on; past the end the last key again, of no keys nothing."""
    KEY: gl.constexpr = gl.SliceLayout(3, LAYOUT)
    SIXTEENS: gl.constexpr = gl.SliceLayout(2, KEY)
    w = gl.arange(0, LAYOUT.shape[0], gl.SliceLayout(1, SIXTEENS))[:, None]
    h = gl.arange(0, LAYOUT.shape[1], gl.SliceLayout(0, SIXTEENS))[None, :]
    i = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, KEY)))[None, None, :]
    word = gl.arange(0, LAYOUT.shape[3], gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))))
    first = n + (w * LAYOUT.shape[1] + h) * 16
    page_start = gl.minimum(first, length - 1) // PAGE * PAGE
    slot = gl.minimum(first[:, :, None] + i, length - 1) - page_start[:, :, None]
    if PAGE > 2**15:  # a dense cache: the offset within a row may not fit into 32 bits
        slot = slot.to(gl.int64)
    rows = (pages.to(gl.int64) * strides[0])[:, :, None] + slot * strides[1]
    words = gl.load(base + (rows[:, :, :, None] + word[None, None, None, :]), mask=length > 0)
    return gl.reshape(words, [LAYOUT.shape[0], LAYOUT.shape[1] * 16, LAYOUT.shape[3]])


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def first_block(length, length_q, window_left, BLOCK: gl.constexpr):
    """First block of keys that any of a sequence's queries sees."""
    if window_left is None:
        return length * 0
    else:
        return gl.maximum(length - length_q - window_left, 0) // BLOCK


@gluon.jit
def blocks_of(b, batch, capacity, cu_q, seqused, max_q, window_left, BLOCK: gl.constexpr):
    """Blocks of work of sequences `b`; at least one each, so that each is visited."""
    used = b < batch
    length = gl.minimum(gl.load(seqused + b, mask=used, other=0), capacity)
    blocks = gl.cdiv(length, BLOCK)
    if window_left is not None:
        length_q = max_q
        if cu_q is not None:
            length_q = gl.load(cu_q + b + 1, mask=used, other=0) - gl.load(cu_q + b, mask=used, other=0)
        blocks -= first_block(length, length_q, window_left, BLOCK)
    return gl.where(used, gl.maximum(blocks, 1), 0)


@gluon.jit
def share_of_part(
    part, parts, batch, capacity, cu_q, seqused, max_q, window_left,
    BLOCK: gl.constexpr, BLOCK_B: gl.constexpr,
):  # fmt: skip
    """(first block of this part, one past its last, blocks a part, the sequence it begins in, that one's first)."""
    layout: gl.constexpr = gl.BlockedLayout([BLOCK_B // 32], [32], [gl.num_warps()], [0])  # every warp for itself
    total = 0
    longest = 1
    for b0 in range(0, batch, BLOCK_B):
        cost = blocks_of(b0 + gl.arange(0, BLOCK_B, layout), batch, capacity, cu_q, seqused, max_q, window_left, BLOCK)
        total += gl.sum(cost, axis=0)
        longest = gl.maximum(longest, gl.max(cost, axis=0))
    share = gl.cdiv(total, parts)
    # sequences of one length: cut at their ends or into equal pieces, where that costs less than a sixteenth
    even = gl.cdiv(share, longest) * longest if share >= longest else gl.cdiv(longest, longest // share)
    share = gl.where(even <= share + share // 16, even, share)
    begin = part * share
    b = 0
    start = 0
    before = 0
    for b0 in range(0, batch, BLOCK_B):
        index = b0 + gl.arange(0, BLOCK_B, layout)
        cost = blocks_of(index, batch, capacity, cu_q, seqused, max_q, window_left, BLOCK)
        passed = (before + gl.associative_scan(cost, 0, _add) <= begin) & (index < batch)
        b += gl.sum(passed.to(gl.int32), axis=0)
        start += gl.sum(gl.where(passed, cost, 0), axis=0)
        before += gl.sum(cost, axis=0)
    return begin, gl.minimum(begin + share, total), share, b, start


@gluon.jit
def sequence_of(b, batch, capacity, cu_q, seqused, max_q):
    """(length, first row of q, query tokens) of sequence b; of none past the last."""
    used = b < batch
    length = gl.minimum(gl.load(seqused + b, mask=used, other=0), capacity)
    if cu_q is None:
        return length, b * max_q, gl.where(used, max_q, 0)
    else:
        start_q = gl.load(cu_q + b, mask=used, other=0)
        return length, start_q, gl.load(cu_q + b + 1, mask=used, other=0) - start_q


@gluon.jit
def load_q(
    q, start_q, length_q, head, stride_qs, stride_qh,
    GROUP: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Q^T of one key head, (DIM, ROWS), its channels in the order of the product."""
    SLICE: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    k = gl.arange(0, DIM, gl.SliceLayout(1, SLICE))[:, None]
    r = gl.arange(0, ROWS, gl.SliceLayout(0, SLICE))[None, :]
    rows = (start_q + r // GROUP).to(gl.int64) * stride_qs + (head * GROUP + r % GROUP) * stride_qh
    return gl.load(q + (rows + channel_of(k)), mask=r // GROUP < length_q, other=0.0)


@gluon.jit
def merge_warps(acc, m, l, sink_log2):
    """(O^T (DIM, ROWS) with its channels in order, LSE (ROWS,)) of what the warps have found, and of the sink."""
    WARPS: gl.constexpr = acc.shape[0]
    DIM: gl.constexpr = acc.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([8, 1], [DIM // 8, 32 // (DIM // 8)], [1, WARPS], [0, 1])
    top = gl.max(m, 0)
    if sink_log2 is not None:
        top = gl.maximum(top, sink_log2)
    safe = gl.where(top == float("-inf"), 0.0, top)
    weight = gl.exp2(m - safe[None, :])
    total = gl.sum(gl.sum(l, 1) * weight, 0)
    if sink_log2 is not None:
        total += gl.exp2(sink_log2 - safe)
    total = gl.where(total == 0.0, 1.0, total)  # a row that has seen nothing: 0 and −inf
    o = gl.reshape(gl.sum(acc * weight[:, None, :], 0), [DIM // 8, 8, acc.shape[2]])
    o = gl.convert_layout(gl.reshape(gl.permute(o, [1, 0, 2]), [DIM, acc.shape[2]]), LAYOUT)
    row_lse = gl.convert_layout((top + gl.log2(total)) * LN2, gl.SliceLayout(0, LAYOUT))
    return o / gl.convert_layout(total, gl.SliceLayout(0, LAYOUT))[None, :], row_lse


@gluon.jit
def write_rows(to_out, to_lse, o, row_lse, used):
    """Columns of o (DIM, ROWS) where `to_out` points, and their LSE."""
    d = gl.arange(0, o.shape[0], gl.SliceLayout(1, o.type.layout))[:, None]
    gl.store(to_out[None, :] + d, o, mask=used[None, :])
    gl.store(to_lse, row_lse, mask=used)


@gluon.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=["k_scale", "v_scale", "cu_q", "seqused", "table"])
def paged_decode_kernel(  # noqa: C901, PLR0915 (a kernel is one function)
    q, k, v, k_scale, v_scale, sink, out, lse, scratch, cu_q, seqused, table,
    stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_os, stride_oh,
    stride_lb, stride_lh, stride_table, softmax_scale, softcap, window_left, batch, parts, heads, max_q, capacity,
    at_lse, at_out,
    GROUP: gl.constexpr, ROWS: gl.constexpr, PAGE: gl.constexpr, DIM: gl.constexpr, KEYS: gl.constexpr,
    WARPS: gl.constexpr, KEY_ASM: gl.constexpr, VALUE_ASM: gl.constexpr, BY_SEQUENCE: gl.constexpr,
    BLOCK_B: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One part of the keys of one key head; row r is query r // GROUP of query head `head · GROUP + r % GROUP`."""
    BLOCK: gl.constexpr = WARPS * KEYS
    PER_WORD: gl.constexpr = 2 if k_scale is None else 4
    DTYPE: gl.constexpr = q.dtype.element_ty if k_scale is None else gl.float16
    ACC: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, ACC, 2)
    K_LAYOUT: gl.constexpr = keys_layout(WARPS, KEYS, DIM // PER_WORD, PER_WORD)
    V_LAYOUT: gl.constexpr = values_layout(WARPS, KEYS, DIM // PER_WORD)
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    if PDL:
        wait_for_earlier_kernel(batch)
    head = gl.program_id(0) % heads
    part = gl.program_id(0) // heads
    unit, unit_end, share, b, start = share_of_part(
        part, parts, batch, capacity, cu_q, seqused, max_q, window_left, BLOCK, BLOCK_B
    )
    scale = softmax_scale * LOG2E
    if softcap is not None:
        scale = softmax_scale / softcap
    if k_scale is not None:
        scale *= gl.load(k_scale + head)
    k_base = (k + head.to(gl.int64) * stride_kh).to(gl.pointer_type(gl.int32), bitcast=True)
    v_base = (v + head.to(gl.int64) * stride_vh).to(gl.pointer_type(gl.int32), bitcast=True)
    k_strides = (stride_kb // PER_WORD, stride_ks // PER_WORD)
    v_strides = (stride_vb // PER_WORD, stride_vs // PER_WORD)
    notes = scratch.to(gl.pointer_type(gl.int32), bitcast=True)
    if not BY_SEQUENCE and head == 0:
        note_pieces(notes, part, 0, 0, 0, False)
    r = gl.arange(0, ROWS, gl.SliceLayout(0, ROW))
    key = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, ACC)))[:, None] * KEYS
    key += gl.arange(0, KEYS, gl.SliceLayout(0, gl.SliceLayout(2, ACC)))[None, :]
    s_zero = gl.full([WARPS, KEYS, ROWS], 0.0, gl.float32, ACC)

    length, start_q, length_q = sequence_of(b, batch, capacity, cu_q, seqused, max_q)
    q_next = load_q(q, start_q, length_q, head, stride_qs, stride_qh, GROUP, ROWS, DIM, RIGHT)
    row_table = table + b.to(gl.int64) * stride_table
    lo = (unit - start + first_block(length, length_q, window_left, BLOCK)) * BLOCK
    here = gl.where(unit < unit_end, length, 0)
    pages = pages_of(row_table, lo, here, PAGE, K_LAYOUT)
    k_words = load_words(k_base, pages, lo, here, k_strides, PAGE, K_LAYOUT)
    pages = pages_of(row_table, lo, here, PAGE, V_LAYOUT)
    v_words = load_words(v_base, pages, lo, here, v_strides, PAGE, V_LAYOUT)
    while unit < unit_end:
        lo_block = first_block(length, length_q, window_left, BLOCK)
        end = start + gl.maximum(gl.cdiv(length, BLOCK) - lo_block, 1)
        stop = gl.minimum(end, unit_end)
        lo = (unit - start + lo_block) * BLOCK
        hi = gl.minimum((stop - start + lo_block) * BLOCK, length)
        next_length, next_start_q, next_length_q = sequence_of(b + 1, batch, capacity, cu_q, seqused, max_q)
        next_table = row_table + stride_table
        next_keys = gl.where(stop < unit_end, next_length, 0)
        next_lo = first_block(next_length, next_length_q, window_left, BLOCK) * BLOCK
        q_tile = gl.full([WARPS, DIM, ROWS], 0.0, DTYPE, RIGHT) + q_next.to(DTYPE)[None, :, :]
        last = length - length_q + r // GROUP
        m = gl.full([WARPS, ROWS], float("-inf"), gl.float32, ROW)
        l = s_zero
        acc = gl.full([WARPS, DIM, ROWS], 0.0, gl.float32, ACC)
        for n in range(lo, hi, BLOCK):
            more = n + BLOCK < hi
            n_load = gl.where(more, n + BLOCK, next_lo)
            keys_load = gl.where(more, length, next_keys)
            table_load = row_table + gl.where(more, 0, stride_table)
            k_pages = pages_of(table_load, n_load, keys_load, PAGE, K_LAYOUT)
            v_pages = pages_of(table_load, n_load, keys_load, PAGE, V_LAYOUT)
            s = mma_v2(keys_operand(k_words, DIM, DTYPE, KEY_ASM, LEFT), q_tile, s_zero)
            k_words = load_words(k_base, k_pages, n_load, keys_load, k_strides, PAGE, K_LAYOUT)
            s *= scale
            if softcap is not None:
                s = (softcap * LOG2E) * tanh(s)
            j = (n + key)[:, :, None]
            seen = j <= last[None, None, :]
            if window_left is not None:
                seen = seen & (j >= (last - window_left)[None, None, :])
            s = gl.where(seen, s, float("-inf"))
            m_new = gl.maximum(m, gl.max(s, 1))
            safe = gl.where(m_new == float("-inf"), 0.0, m_new)
            p = gl.exp2(s - safe[:, None, :])
            alpha = gl.exp2(m - safe)
            l = l * alpha[:, None, :] + p
            m = m_new
            p = gl.convert_layout(p.to(DTYPE), RIGHT)
            acc = mma_v2(values_operand(v_words, DIM, DTYPE, VALUE_ASM, LEFT), p, acc * alpha[:, None, :])
            v_words = load_words(v_base, v_pages, n_load, keys_load, v_strides, PAGE, V_LAYOUT)
        q_next = load_q(q, next_start_q, next_length_q, head, stride_qs, stride_qh, GROUP, ROWS, DIM, RIGHT)
        if (lo >= hi) & (next_keys > 0):  # no loop that would have asked for them
            k_pages = pages_of(next_table, next_lo, next_keys, PAGE, K_LAYOUT)
            k_words = load_words(k_base, k_pages, next_lo, next_keys, k_strides, PAGE, K_LAYOUT)
            v_pages = pages_of(next_table, next_lo, next_keys, PAGE, V_LAYOUT)
            v_words = load_words(v_base, v_pages, next_lo, next_keys, v_strides, PAGE, V_LAYOUT)
        sink_log2 = None
        if sink is not None:  # one piece of the sequence carries it
            sink_log2 = gl.load(sink + head * GROUP + r % GROUP).to(gl.float32) * LOG2E
            sink_log2 = gl.where(unit == start, sink_log2, float("-inf"))
        result, row_lse = merge_warps(acc, m, l, sink_log2)
        if v_scale is not None:
            result *= gl.load(v_scale + head)
        row = gl.arange(0, ROWS, row_lse.type.layout)
        i = row // GROUP
        h = head * GROUP + row % GROUP
        at = 2 * part + (unit != part * share).to(gl.int32)
        if (unit == start) & (head == 0) & (BY_SEQUENCE or unit_end < end):
            note_pieces(notes, part, b, at, (end - 1) // share - part + 1, BY_SEQUENCE)
        if (unit == start) & (unit_end >= end):
            to_out = out + ((start_q + i).to(gl.int64) * stride_os + h * stride_oh)
            to_lse = lse + (b.to(gl.int64) * stride_lb + h.to(gl.int64) * stride_lh + i)
            if cu_q is not None:
                to_lse += start_q
            write_rows(to_out, to_lse, result.to(out.dtype.element_ty), row_lse, i < length_q)
        else:
            place = (at.to(gl.int64) * heads + head) * ROWS + row
            write_rows(scratch + at_out + place * DIM, scratch + at_lse + place, result, row_lse, i < length_q)
        unit = stop
        start = end
        b += 1
        length, start_q, length_q, row_table = next_length, next_start_q, next_length_q, next_table


MAX_ROWS = 16  # query tokens × heads of one key head that a program holds
WARPS, PROGRAMS = 4, 2  # of a program, and programs on a processor at a time; one of 8 warps: 69 µs where these take 57
# keys of a warp at a time. µs at B=128 × 4096, 32/8 heads of 128, pages of 16 (H100, 2026-11-24): bf16 720 with 16 (32
# spill); fp8 375 with 32, 399 with 16; int8 378 with 32
KEYS_16_BITS, KEYS_8_BITS = 16, 32
_ASM = {torch.float8_e4m3fn: (KEY_FP8, VALUE_FP8), torch.int8: (KEY_INT8, VALUE_INT8)}


def refuses_paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> str | None:
    """Why this kernel cannot take the call, or None."""
    if q.shape[-1] != v_cache.shape[-1] or q.shape[-1] not in (64, 128):
        return f"it takes head_dim 64 and 128 for keys and values alike, not {q.shape[-1]} and {v_cache.shape[-1]}"
    if q.shape[-1] == 64 and k_cache.dtype != q.dtype:
        return "8-bit caches of head_dim 64 have not met a GPU on it yet"
    if k_cache.shape[1] % 16:
        return f"it takes pages in multiples of 16 tokens, not {k_cache.shape[1]}"
    rows = max_queries(q, t) * (q.shape[-2] // k_cache.shape[-2])
    if rows > MAX_ROWS:
        return f"it takes up to {MAX_ROWS} rows (query tokens × heads of a key head), not {rows}"
    if _unaligned(k_cache) or _unaligned(v_cache):
        return "it takes caches whose rows begin on 16 bytes"
    return refuses_decode(q, k_cache, v_cache, spec, t, num_splits)


def _unaligned(cache: Tensor) -> int:
    block, slot, head, _ = cache.stride()
    return ((block | slot | head) * cache.element_size() | cache.data_ptr()) % 16


@lru_cache(maxsize=4096)
def _plan(call: DecodeCall) -> DecodePlan:
    rows = 8 if call.max_q * call.group <= 8 else 16
    key_asm, value_asm = _ASM.get(call.cache_dtype, (KEY_16, VALUE_16))
    constants = (
        ("GROUP", call.group), ("ROWS", rows), ("PAGE", call.k_shape[1]), ("DIM", call.q_shape[-1]),
        ("KEYS", KEYS_16_BITS if call.cache_dtype == call.dtype else KEYS_8_BITS), ("WARPS", WARPS),
        ("KEY_ASM", key_asm.value), ("VALUE_ASM", value_asm.value),
    )  # fmt: skip
    return plan_decode(call, paged_decode_kernel, Tile(rows, PROGRAMS, constants, {"num_warps": WARPS}))


def plan_paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> dict[str, object]:
    """What `octavo.explain` shows of a call."""
    tile = dict(_plan(decode_call(q, k_cache, v_cache, spec, t)).decode.constants)
    parts = num_parts(k_cache.shape[-2], PROGRAMS * num_processors(q.device))
    return {"tile": f"{tile['ROWS']} rows × {tile['WARPS'] * tile['KEYS']} keys", "parts of each head": parts}


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> tuple[Tensor, Tensor]:
    """q (T, Hq, D) packed by `cu_seqlens_q` or (B, Sq, Hq, D) over caches (num_blocks, block_size, Hkv, D)."""
    return decode(_plan, q, k_cache, v_cache, spec, t)
