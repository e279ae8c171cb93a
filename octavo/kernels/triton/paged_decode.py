"""Decode over a paged cache: few query tokens a sequence, any lengths, keys and values in 16 bits, fp8 or int8.

The keys of all sequences, laid end to end in blocks, are cut into `parts` of equal size, as many as the GPU runs at
once; each program takes one part of one key head and walks the sequences that fall into it. So every processor reads
the same number of bytes however ragged the lengths are, in one wave. The plan is computed on the device from the
lengths: nothing waits for the GPU, and a CUDA graph replays it for other lengths and tables. A sequence that falls into
several parts leaves pieces (output in fp32 and LSE), which `combine_kernel` weighs by exp(LSE_piece − LSE).

A quantised cache holds x / scale, one scale a key head: the scale of the keys goes into that of the softmax, that of
the values into the output, and the products run on fp16, which holds every e4m3 and int8 number exactly.
"""

from functools import lru_cache

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor
from octavo.kernels.triton.decode_launch import (
    VARYING,
    DecodeCall,
    DecodePlan,
    Tile,
    decode,
    decode_call,
    is_hopper,
    max_queries,
    note_pieces,
    num_parts,
    plan_decode,
    power_of_2,
    refuses_decode,
)
from octavo.kernels.triton.flash_fwd import num_processors
from octavo.kernels.triton.scores import LN2, LOG2E, sequence, tanh

PROGRAMS = 2  # that run on a processor at a time
MIN_PAGE = 8  # tokens; smaller ones would cost a look-up for every few keys
MAX_ROWS = 64  # query tokens × heads of one key head that a program holds


@triton.jit
def widen(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """x in `dtype`. int8 by bytes, as conversions are slow: 128 + n under the exponent of 1024 is 1152 + n in fp16."""
    if x.dtype == tl.int8 and not INTERPRETED:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 z, m; xor.b32 z, $2, 0x80808080; mov.b32 m, 0x64806480; prmt.b32 $0, z, 0x64646464, 0x4140;
            prmt.b32 $1, z, 0x64646464, 0x4342; sub.f16x2 $0, $0, m; sub.f16x2 $1, $1, m; }""",
            "=&r,=&r,r", [x], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return x.to(dtype)


@triton.jit
def first_key(length_k, length_q, window_left):
    """First key that any of the sequence's queries sees."""
    if window_left is None:
        return length_k * 0
    else:
        return tl.maximum(length_k - length_q - window_left, 0)


@triton.jit
def costs(b, batch, capacity, cu_seqlens_q, seqused, max_q, window_left, BLOCK_N: tl.constexpr):
    """Blocks of work of sequences `b`; at least one each, so that each is visited."""
    used = b < batch
    keys = tl.minimum(tl.load(seqused + b, mask=used, other=0), capacity)
    blocks = tl.cdiv(keys, BLOCK_N)
    if window_left is not None:
        length_q = max_q
        if cu_seqlens_q is not None:
            length_q = tl.load(cu_seqlens_q + b + 1, mask=used, other=0) - tl.load(cu_seqlens_q + b, mask=used, other=0)
        blocks -= first_key(keys, length_q, window_left) // BLOCK_N
    return tl.where(used, tl.maximum(blocks, 1), 0)


@triton.jit
def share_of_part(
    part, parts, batch, capacity, cu_seqlens_q, seqused, max_q, window_left,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """(first block of this part, one past its last, blocks a part, the sequence it begins in, that one's first)."""
    total = tl.zeros((), tl.int32)
    for b0 in range(0, batch, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        total += tl.sum(costs(b, batch, capacity, cu_seqlens_q, seqused, max_q, window_left, BLOCK_N))
    share = tl.cdiv(total, parts)
    begin = part * share
    found = tl.zeros((), tl.int32)
    start = tl.zeros((), tl.int32)
    before = tl.zeros((), tl.int32)
    for b0 in range(0, batch, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        cost = costs(b, batch, capacity, cu_seqlens_q, seqused, max_q, window_left, BLOCK_N)
        passed = (before + tl.cumsum(cost, 0) <= begin) & (b < batch)
        found += tl.sum(passed.to(tl.int32))
        start += tl.sum(tl.where(passed, cost, 0))
        before += tl.sum(cost)
    return begin, tl.minimum(begin + share, total), share, found, start


@triton.jit(
    do_not_specialize=VARYING, do_not_specialize_on_alignment=["k_scale", "v_scale", "cu_seqlens_q", "seqused", "table"]
)
def decode_kernel(  # noqa: C901, PLR0915 (a kernel is one function)
    q, k, v, k_scale, v_scale, sink, out, lse, scratch, cu_seqlens_q, seqused, table,
    stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_os, stride_oh,
    stride_lb, stride_lh, stride_table, softmax_scale, softcap, window_left, batch, parts, heads, max_q, capacity,
    at_lse, at_out,
    GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr, BY_SEQUENCE: tl.constexpr, BLOCK_B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one key head; row r is query r // GROUP of query head `head · GROUP + r % GROUP`."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head = (tl.program_id(0) % heads).to(tl.int64)
    part = tl.program_id(0) // heads
    unit, unit_end, share, b, start = share_of_part(
        part, parts, batch, capacity, cu_seqlens_q, seqused, max_q, window_left, BLOCK_N, BLOCK_B
    )
    notes = scratch.to(tl.pointer_type(tl.int32))
    if not BY_SEQUENCE and head == 0:
        note_pieces(notes, part, 0, 0, 0, False)
    partial_lse = scratch + at_lse
    partial_out = scratch + at_out
    r = tl.arange(0, BLOCK_M)
    i = r // GROUP
    h = head * GROUP + r % GROUP
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    rows: tl.constexpr = BLOCK_M
    scale = softmax_scale * LOG2E
    if softcap is not None:
        scale = softmax_scale / softcap
    if k_scale is not None:
        scale *= tl.load(k_scale + head)
    k_base = k + head * stride_kh + d[None, :]
    v_base = v + head * stride_vh + dv[None, :]
    while unit < unit_end:
        start_q, length_q = sequence(b, cu_seqlens_q, None, max_q)
        length = tl.minimum(tl.load(seqused + b), capacity)
        first = first_key(length, length_q, window_left)
        lo_block = first // BLOCK_N
        end = start + tl.maximum(tl.cdiv(length, BLOCK_N) - lo_block, 1)
        stop = tl.minimum(end, unit_end)
        lo = (unit - start + lo_block) * BLOCK_N
        hi = tl.minimum((stop - start + lo_block) * BLOCK_N, length)
        row_table = table + b.to(tl.int64) * stride_table
        if cu_seqlens_q is None:
            start_q += b.to(tl.int64) * max_q
        q_rows = q + (start_q + i)[:, None] * stride_qs + h[:, None] * stride_qh
        row_used = i < length_q
        q_tile = tl.load(q_rows + d[None, :], mask=row_used[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        if k_scale is not None:
            q_tile = q_tile.to(tl.float16)
        last = length - length_q + i
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        l = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
        for n in tl.range(lo, hi, BLOCK_N):
            n = tl.multiple_of(n, BLOCK_N)
            j = n + tl.arange(0, BLOCK_N)
            read = tl.minimum(j, length - 1)  # past the end the last key again: its page is known to be valid
            if PAGE_SIZE > 2**15:  # a dense cache: the offset within a row may not fit into 32 bits
                read = read.to(tl.int64)
            if PAGE_SIZE % BLOCK_N == 0:
                page = tl.load(row_table + n // PAGE_SIZE).to(tl.int64)
                slot = read - n // PAGE_SIZE * PAGE_SIZE
                k_rows = page * stride_kb + slot * stride_ks
                v_rows = page * stride_vb + slot * stride_vs
            else:
                page = tl.load(row_table + read // PAGE_SIZE).to(tl.int64)
                slot = read % PAGE_SIZE
                k_rows = page * stride_kb + slot * stride_ks
                v_rows = page * stride_vb + slot * stride_vs
            if HEAD_DIM == BLOCK_D:
                k_tile = tl.load(k_base + k_rows[:, None])
            else:
                k_tile = tl.load(k_base + k_rows[:, None], mask=(d < HEAD_DIM)[None, :], other=0.0)
            if HEAD_DIM_V == BLOCK_DV:
                v_tile = tl.load(v_base + v_rows[:, None])
            else:
                v_tile = tl.load(v_base + v_rows[:, None], mask=(dv < HEAD_DIM_V)[None, :], other=0.0)
            s = tl.dot(q_tile, tl.trans(widen(k_tile, q_tile.dtype, INTERPRETED))) * scale
            if softcap is not None:
                s = (softcap * LOG2E) * tanh(s)
            seen = j[None, :] <= last[:, None]
            if window_left is not None:
                seen = seen & (j[None, :] >= last[:, None] - window_left)
            s = tl.where(seen, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - safe[:, None])
            alpha = tl.exp2(m - safe)
            l = l * alpha + tl.sum(p, 1)
            acc = tl.dot(p.to(q_tile.dtype), widen(v_tile, q_tile.dtype, INTERPRETED), acc * alpha[:, None])
            m = m_new
        if sink is not None and unit == start:  # one piece of the sequence carries it
            sink_log2 = tl.load(sink + h).to(tl.float32) * LOG2E
            m_new = tl.maximum(m, sink_log2)
            alpha = tl.exp2(m - m_new)
            l = l * alpha + tl.exp2(sink_log2 - m_new)
            acc *= alpha[:, None]
            m = m_new
        l = tl.where(l == 0.0, 1.0, l)  # a row that has seen nothing: 0 and −inf
        result = acc / l[:, None]
        if v_scale is not None:
            result *= tl.load(v_scale + head)
        row_lse = (m + tl.log2(l)) * LN2
        used = row_used[:, None] & (dv < HEAD_DIM_V)[None, :]
        at = 2 * part + (unit != part * share).to(tl.int32)
        if (unit == start) & (head == 0) & (BY_SEQUENCE or unit_end < end):
            note_pieces(notes, part, b, at, (end - 1) // share - part + 1, BY_SEQUENCE)
        if (unit == start) & (unit_end >= end):
            out_rows = out + (start_q + i).to(tl.int64)[:, None] * stride_os + h[:, None] * stride_oh
            tl.store(out_rows + dv[None, :], result.to(out.dtype.element_ty), mask=used)
            lse_first = b.to(tl.int64) * stride_lb
            if cu_seqlens_q is not None:
                lse_first += start_q
            tl.store(lse + lse_first + h * stride_lh + i, row_lse, mask=row_used)
        else:
            place = (at.to(tl.int64) * heads + head) * rows + r
            tl.store(partial_out + place[:, None] * HEAD_DIM_V + dv[None, :], result, mask=used)
            tl.store(partial_lse + place, row_lse, mask=row_used)
        unit = stop
        start = end
        b += 1


def refuses_paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> str | None:
    """Why this kernel cannot take the call, or None."""
    if max(q.shape[-1], v_cache.shape[-1]) > 256 or q.shape[-1] % 8 or v_cache.shape[-1] % 8:
        return f"it takes head_dim in multiples of 8 up to 256, not {q.shape[-1]} and {v_cache.shape[-1]}"
    if k_cache.shape[1] < MIN_PAGE:
        return f"it takes pages of {MIN_PAGE} or more tokens, not {k_cache.shape[1]}"
    rows = max_queries(q, t) * (q.shape[-2] // k_cache.shape[-2])
    if rows > MAX_ROWS:
        return f"it takes up to {MAX_ROWS} rows (query tokens × heads of a key head), not {rows}"
    return refuses_decode(q, k_cache, v_cache, spec, t, num_splits)


def keys_of_block(call: DecodeCall) -> int:
    """Keys that a program loads at a time.

    µs on an H100, B=32 × 1024, 32/8 heads of 128, pages of 16 (2026-11-24, Triton 3.6): bf16 66 with any of 32 to 128
    keys and 3 to 5 stages; fp8 64 keys by 5 stages 44.9, by 3 or 4 53.7, 128 keys by 3 or 4 48.3; int8 48.8, 56.7, 53.
    """
    wide = max(call.q_shape[-1], call.v_shape[-1]) > 128
    quantised = call.cache_dtype != call.dtype
    if wide and quantised:
        return 32  # 64 spill
    return 128 if is_hopper(call.device) and call.k_shape[1] % 64 and not wide and not quantised else 64


@lru_cache(maxsize=4096)
def _plan(call: DecodeCall) -> DecodePlan:
    head_dim, head_dim_v = call.q_shape[-1], call.v_shape[-1]
    rows = power_of_2(call.max_q * call.group)
    constants = (
        ("GROUP", call.group), ("PAGE_SIZE", call.k_shape[1]), ("HEAD_DIM", head_dim), ("HEAD_DIM_V", head_dim_v),
        ("BLOCK_D", power_of_2(head_dim)), ("BLOCK_DV", power_of_2(head_dim_v)), ("BLOCK_M", rows),
        ("BLOCK_N", keys_of_block(call)), ("INTERPRETED", knobs.runtime.interpret),
    )  # fmt: skip
    options = {"num_warps": 4, "num_stages": 3 if call.cache_dtype == call.dtype else 5}
    return plan_decode(call, decode_kernel, Tile(rows, PROGRAMS, constants, options))


def plan_paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> dict[str, object]:
    """What `octavo.explain` shows of a call."""
    tile = dict(_plan(decode_call(q, k_cache, v_cache, spec, t)).decode.constants)
    parts = num_parts(k_cache.shape[-2], PROGRAMS * num_processors(q.device))
    return {"tile": f"{tile['BLOCK_M']} rows × {tile['BLOCK_N']} keys", "parts of each head": parts}


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> tuple[Tensor, Tensor]:
    """q (T, Hq, D) packed by `cu_seqlens_q` or (B, Sq, Hq, D) over caches (num_blocks, block_size, Hkv, D or Dv)."""
    return decode(_plan, q, k_cache, v_cache, spec, t)
