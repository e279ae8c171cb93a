"""Decode over a paged cache: few query tokens a sequence, any lengths, keys and values in 16 bits, fp8 or int8.

The keys of all sequences, laid end to end in blocks, are cut into `parts` of equal size, as many as the GPU runs at
once; each program takes one part of one key head and walks the sequences that fall into it. So every processor reads
the same number of bytes however ragged the lengths are, in one wave. The plan is computed on the device from the
lengths: nothing waits for the GPU, and a CUDA graph replays it for other lengths and tables. A sequence that falls into
several parts leaves pieces (output in fp32 and LSE), which `combine_kernel` weighs by exp(LSE_piece − LSE).

A quantised cache holds x / scale, one scale a key head: the scale of the keys goes into that of the softmax, that of
the values into the output, and the products run on fp16, which holds every e4m3 and int8 number exactly.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor
from octavo.kernels.triton.early_launch import early_launch_options
from octavo.kernels.triton.flash_fwd import capability, contiguous_rows, is_hopper, lacks_fp8, num_processors
from octavo.kernels.triton.launch import Constants, integer_key, launch, pointer_key
from octavo.kernels.triton.scores import LN2, LOG2E, sequence, tanh

PROGRAMS = 2  # that run on a processor at a time
MAX_ROWS = 64  # query tokens × heads of one key head that a program holds
_DTYPES = (torch.float16, torch.bfloat16)
_UNSUPPORTED = ("seqused_q", "leftpad_k", "qv", "alibi_slopes", "attn_bias")


@triton.jit
def first_key(length_k, length_q, window_left):
    """First key that any of the sequence's queries sees."""
    if window_left is None:
        return length_k * 0
    else:
        return tl.maximum(length_k - length_q - window_left, 0)


@triton.jit
def costs(b, batch, cu_seqlens_q, seqused, max_q, window_left, BLOCK_N: tl.constexpr):
    """Blocks of work of sequences `b`; at least one each, so that each is visited."""
    used = b < batch
    keys = tl.load(seqused + b, mask=used, other=0)
    blocks = tl.cdiv(keys, BLOCK_N)
    if window_left is not None:
        length_q = max_q
        if cu_seqlens_q is not None:
            length_q = tl.load(cu_seqlens_q + b + 1, mask=used, other=0) - tl.load(cu_seqlens_q + b, mask=used, other=0)
        blocks -= first_key(keys, length_q, window_left) // BLOCK_N
    return tl.where(used, tl.maximum(blocks, 1), 0)


@triton.jit
def share_of_part(
    part, parts, batch, cu_seqlens_q, seqused, max_q, window_left, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr
):
    """(first block of this part, one past its last, blocks a part, the sequence it begins in, that one's first)."""
    total = tl.zeros((), tl.int32)
    for b0 in range(0, batch, BLOCK_B):
        total += tl.sum(costs(b0 + tl.arange(0, BLOCK_B), batch, cu_seqlens_q, seqused, max_q, window_left, BLOCK_N))
    share = tl.cdiv(total, parts)
    begin = part * share
    found = tl.zeros((), tl.int32)
    start = tl.zeros((), tl.int32)
    before = tl.zeros((), tl.int32)
    for b0 in range(0, batch, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        cost = costs(b, batch, cu_seqlens_q, seqused, max_q, window_left, BLOCK_N)
        passed = (before + tl.cumsum(cost, 0) <= begin) & (b < batch)
        found += tl.sum(passed.to(tl.int32))
        start += tl.sum(tl.where(passed, cost, 0))
        before += tl.sum(cost)
    return begin, tl.minimum(begin + share, total), share, found, start


@triton.jit(do_not_specialize=["batch", "parts", "max_q", "window_left", "stride_table", "stride_lb", "stride_lh"])
def decode_kernel(  # noqa: C901, PLR0915 (a kernel is one function)
    q, k, v, k_scale, v_scale, sink, out, lse, partial_out, partial_lse, pieces, cu_seqlens_q, seqused, table,
    stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_os, stride_oh,
    stride_lb, stride_lh, stride_table, softmax_scale, softcap, window_left, batch, parts, heads, max_q,
    GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one key head; row r is query r // GROUP of query head `head · GROUP + r % GROUP`."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head = (tl.program_id(0) % heads).to(tl.int64)
    part = tl.program_id(0) // heads
    unit, unit_end, share, b, start = share_of_part(
        part, parts, batch, cu_seqlens_q, seqused, max_q, window_left, BLOCK_N, BLOCK_B
    )
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
        length = tl.load(seqused + b)
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
            s = tl.dot(q_tile, tl.trans(k_tile.to(q_tile.dtype))) * scale
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
            acc = tl.dot(p.to(q_tile.dtype), v_tile.to(q_tile.dtype), acc * alpha[:, None])
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
        if unit == start:
            tl.store(pieces + 2 * b, at)  # every head writes the same
            tl.store(pieces + 2 * b + 1, (end - 1) // share - part + 1)
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


@triton.jit(do_not_specialize=["batch", "max_q", "stride_lb", "stride_lh", "tokens", "blocks"])
def combine_kernel(  # noqa: PLR0915 (a kernel is one function)
    out, lse, partial_out, partial_lse, pieces, cu_seqlens_q, stride_os, stride_oh, stride_lb, stride_lh,
    batch, heads, heads_q, max_q, tokens, blocks,
    GROUP: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS (query, head) of a sequence: Σ exp(LSE_piece − LSE) · piece; the last programs clear rows of no sequence."""
    b = tl.program_id(0) // blocks
    x = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    dv = tl.arange(0, BLOCK_DV)
    column_used = (dv < HEAD_DIM_V)[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if b == batch:
        if cu_seqlens_q is not None:
            first_row = tl.load(cu_seqlens_q + batch)
            for x0 in range(0, (tokens - first_row) * heads_q, ROWS * blocks):
                row = first_row + (x + x0) // heads_q
                head = ((x + x0) % heads_q).to(tl.int64)
                at = out + row.to(tl.int64)[:, None] * stride_os + head[:, None] * stride_oh + dv[None, :]
                zeros = tl.zeros((ROWS, BLOCK_DV), out.dtype.element_ty)
                tl.store(at, zeros, mask=(row < tokens)[:, None] & column_used)
                tl.store(lse + head * stride_lh + row, tl.full((ROWS,), float("-inf"), tl.float32), mask=row < tokens)
        return
    count = tl.load(pieces + 2 * b + 1)
    if count > 1:
        first = tl.load(pieces + 2 * b)
        start_q, length_q = sequence(b, cu_seqlens_q, None, max_q)
        i = x // heads_q
        head = (x % heads_q).to(tl.int64)
        used = i < length_q
        place = head // GROUP * BLOCK_M + i * GROUP + head % GROUP
        m = tl.full((ROWS,), float("-inf"), tl.float32)
        l = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
        for p0 in range(0, count, PIECES):
            p = p0 + tl.arange(0, PIECES)
            slot = tl.where(p == 0, first, (first // 2 + p) * 2).to(tl.int64) * heads * BLOCK_M
            at = slot[:, None] + place[None, :]
            part_used = (p < count)[:, None] & used[None, :]
            part = tl.load(partial_lse + at, mask=part_used, other=float("-inf"))
            values = tl.load(
                partial_out + at[:, :, None] * HEAD_DIM_V + dv[None, None, :],
                mask=part_used[:, :, None] & column_used[None, :, :], other=0.0,
            )  # fmt: skip
            m_new = tl.maximum(m, tl.max(part, 0))
            safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            weight = tl.exp(part - safe[None, :])
            alpha = tl.exp(m - safe)
            acc = acc * alpha[:, None] + tl.sum(weight[:, :, None] * values, 0)
            l = l * alpha + tl.sum(weight, 0)
            m = m_new
        l = tl.where(l == 0.0, 1.0, l)
        row = start_q + i
        lse_first = b.to(tl.int64) * stride_lb + i
        if cu_seqlens_q is None:
            row += b.to(tl.int64) * max_q
        else:
            lse_first += start_q
        at = out + row[:, None] * stride_os + head[:, None] * stride_oh + dv[None, :]
        tl.store(at, (acc / l[:, None]).to(out.dtype.element_ty), mask=used[:, None] & column_used)
        tl.store(lse + lse_first + head * stride_lh, m + tl.log(l), mask=used)


def combine(
    out: Tensor, lse: Tensor, partials: tuple[Tensor, Tensor, Tensor], t: AttentionTensors, early: dict[str, bool],
    sizes: tuple[int, int, int, int], lse_strides: tuple[int, int],
) -> None:  # fmt: skip
    """Launch `combine_kernel`; `sizes` are the batch, the key heads, the longest query and the rows of a piece."""
    batch, heads, max_q, block_m = sizes
    heads_q = out.shape[-2]
    block_dv = power_of_2(out.shape[-1])
    # few sequences have many pieces each, many have few
    rows = 1 if batch * heads_q * max_q <= 2048 else 8
    blocks = -(-max_q * heads_q // rows)
    strides = (*out.stride()[-3:-1], *lse_strides)
    arguments = (out, lse, *partials, t.cu_seqlens_q, *strides, batch, heads, heads_q, max_q, out.shape[0], blocks)
    constants = (
        ("GROUP", heads_q // heads), ("HEAD_DIM_V", out.shape[-1]), ("BLOCK_DV", block_dv), ("BLOCK_M", block_m),
        ("ROWS", rows), ("PIECES", max(1, 4096 // (rows * block_dv))), ("PDL", early["PDL"]),
    )  # fmt: skip
    key = (pointer_key(out), integer_key(strides[:2]), t.cu_seqlens_q is None, heads, heads_q)
    run(combine_kernel, blocks * (batch + 1), arguments, constants, key, num_warps=4, launch_pdl=early["PDL"])


def refuses_paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> str | None:
    """Why this kernel cannot take the call, or None."""
    if q.dtype not in _DTYPES:
        return f"it takes float16 and bfloat16 queries, not {str(q.dtype).removeprefix('torch.')}"
    if max(q.shape[-1], v_cache.shape[-1]) > 256 or q.shape[-1] % 8 or v_cache.shape[-1] % 8:
        return f"it takes head_dim in multiples of 8 up to 256, not {q.shape[-1]} and {v_cache.shape[-1]}"
    page = k_cache.shape[1]
    if page < 8 or page & (page - 1):
        return f"it takes pages of 8 or more tokens, a power of two, not {page}"
    rows = max_queries(q, t) * (q.shape[-2] // k_cache.shape[-2])
    if rows > MAX_ROWS:
        return f"it takes up to {MAX_ROWS} rows (query tokens × heads of a key head), not {rows}"
    given = [name for name in _UNSUPPORTED if getattr(t, name) is not None]
    if given or spec.dropout_p or num_splits or spec.window_right != 0:
        return f"it does not take {', '.join(given) or 'dropout, num_splits or masks that are not causal'}"
    if spec.softmax_scale <= 0:
        return f"it takes a positive softmax_scale, not {spec.softmax_scale}"
    if q.is_cuda and capability(q.device) < (8, 0):
        return f"it needs compute capability 8.0, {q.device} has {capability(q.device)}"
    return lacks_fp8(k_cache)


def run(
    kernel: Any, programs: int, arguments: Sequence[Any], constants: Constants, key: Hashable, **options: Any
) -> None:
    """Launch on a GPU, or interpret."""
    if arguments[0].is_cuda:
        launch(kernel, (programs, 1, 1), arguments, constants, key, **options)
    else:
        kernel[(programs,)](*arguments, **dict(constants), **options)


def power_of_2(n: int) -> int:
    """The next power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(n))


def max_queries(q: Tensor, t: AttentionTensors) -> int:
    return t.max_seqlen_q if t.cu_seqlens_q is not None else q.shape[1]


def keys_of_block(q: Tensor, v_cache: Tensor, page: int) -> int:
    """Keys that a program loads at a time.

    µs on an H100, B=32 × 1024, 32/8 heads of 128, pages of 16 (2026-11-24, Triton 3.6): bf16 66 with any of 32 to 128
    keys and 3 to 5 stages; fp8 64 keys by 5 stages 44.9, by 3 or 4 53.7, 128 keys by 3 or 4 48.3; int8 48.8, 56.7, 53.
    """
    wide = max(q.shape[-1], v_cache.shape[-1]) > 128
    if wide and v_cache.dtype != q.dtype:
        return 32  # 64 spill
    return 128 if is_hopper(q) and page % 64 and not wide and v_cache.dtype == q.dtype else 64


def plan_paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> dict[str, object]:
    """What `octavo.explain` shows of a call."""
    heads = k_cache.shape[-2]
    rows = power_of_2(max_queries(q, t) * (q.shape[-2] // heads))
    parts = num_parts(heads, PROGRAMS * num_processors(q.device))
    return {"tile": f"{rows} rows × {keys_of_block(q, v_cache, k_cache.shape[1])} keys", "parts of each head": parts}


def num_parts(heads: int, programs: int) -> int:
    """Parts of the keys for each head, so that all heads' parts fill `programs` places in whole waves."""
    waves = 1
    while waves * programs % heads > waves * programs // 50:
        waves += 1
    return max(1, waves * programs // heads)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0
) -> tuple[Tensor, Tensor]:
    """q (T, Hq, D) packed by `cu_seqlens_q` or (B, Sq, Hq, D) over caches (num_blocks, block_size, Hkv, D or Dv)."""
    assert t.block_table is not None
    assert t.seqused_k is not None
    q = contiguous_rows(q)
    packed = t.cu_seqlens_q is not None
    batch, max_q = t.block_table.shape[0], max_queries(q, t)
    heads_q, heads, page = q.shape[-2], k_cache.shape[-2], k_cache.shape[1]
    out = q.new_empty(*q.shape[:-1], v_cache.shape[-1])
    lse_shape = (heads_q, q.shape[0]) if packed else (batch, heads_q, max_q)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    if out.numel() == 0 or batch == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    group = heads_q // heads
    block_m = power_of_2(max_q * group)
    early = early_launch_options(q.device)
    parts = num_parts(heads, PROGRAMS * num_processors(q.device))
    places = 2 * parts * heads * block_m
    partials = (
        torch.empty(places * v_cache.shape[-1], dtype=torch.float32, device=q.device),
        torch.empty(places, dtype=torch.float32, device=q.device),
        torch.empty(2 * batch, dtype=torch.int32, device=q.device),
    )
    lse_strides = (0, lse.stride(0)) if packed else (lse.stride(0), lse.stride(1))
    strides = (*q.stride()[-3:-1], *k_cache.stride()[:3], *v_cache.stride()[:3], *out.stride()[-3:-1])
    window = None if spec.window_left < 0 else spec.window_left
    softcap = spec.softcap or None
    arguments = (
        q, k_cache, v_cache, t.k_scale, t.v_scale, t.learnable_sink, out, lse, *partials, t.cu_seqlens_q, t.seqused_k,
        t.block_table, *strides, *lse_strides, t.block_table.stride(0), spec.softmax_scale, softcap, window,
        batch, parts, heads, max_q,
    )  # fmt: skip
    constants = (
        ("GROUP", group), ("PAGE_SIZE", page), ("HEAD_DIM", q.shape[-1]), ("HEAD_DIM_V", v_cache.shape[-1]),
        ("BLOCK_D", power_of_2(q.shape[-1])), ("BLOCK_DV", power_of_2(v_cache.shape[-1])), ("BLOCK_M", block_m),
        ("BLOCK_N", keys_of_block(q, v_cache, page)), ("BLOCK_B", 128 if batch <= 128 else 1024), ("PDL", early["PDL"]),
    )  # fmt: skip
    optional = (q, k_cache, v_cache, t.k_scale, t.v_scale, t.learnable_sink, t.cu_seqlens_q, t.seqused_k, t.block_table)
    pointers = tuple(None if x is None else pointer_key(x) for x in optional)
    key = (pointers, integer_key(strides), heads, window is None, softcap is None)
    run(
        decode_kernel,
        parts * heads,
        arguments,
        constants,
        key,
        num_warps=4,
        num_stages=3 if t.k_scale is None else 5,
        launch_pdl=early["PDL"],
    )
    combine(out, lse, partials, t, early, (batch, heads, max_q, block_m), lse_strides)
    return out, lse
