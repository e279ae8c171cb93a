"""Before and after the Hopper backward kernels, both bound by memory: δ and a dQ of zeros; dQ from its sums to rows.

The sums are fp32 and stand as the accumulators of `wgmma` hold them, four numbers of a thread together: each tile of 64
rows and 64 columns is 8 groups of 8 columns × 128 threads × (2 rows × 2 columns).
"""

import triton
import triton.language as tl


@triton.jit
def rows_of(batch, head, cu_q, len_q, batch_tiles, head_tiles, BLOCK_M: tl.constexpr, VARLEN: tl.constexpr):
    """First row and number of rows of a sequence, and its first tile of BLOCK_M rows in the sums of dQ."""
    start = 0
    tile = batch * batch_tiles
    if VARLEN:
        start = tl.load(cu_q + batch)
        len_q = tl.load(cu_q + batch + 1) - start
        tile = start // BLOCK_M + batch
    return start, len_q, (tile + head * head_tiles).to(tl.int64)


@triton.jit(do_not_specialize=["len_q", "batch_tiles", "head_tiles", "stat_b", "stat_h"])
def prepare_kernel(
    out, dout, dlse, delta, acc, cu_q, len_q, batch_tiles, head_tiles, stat_b, stat_h,
    stride_ob, stride_os, stride_oh, stride_gb, stride_gs, stride_gh, stride_lb, stride_lh, stride_ls,
    HEAD_DIM_V: tl.constexpr, DV: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """δ = rowsum(dout ∘ out) − dlse, in the layout of the LSE, and zeros for 64 rows of dQ."""
    m, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, len_q, tile = rows_of(batch, head, cu_q, len_q, batch_tiles, head_tiles, BLOCK_M, VARLEN)
    if m * 64 >= tl.cdiv(len_q, BLOCK_M) * BLOCK_M:
        return
    sums = acc + tile * (BLOCK_M * D) + m * (64 * D)
    tl.store(sums + tl.arange(0, 64 * D), tl.zeros([64 * D], tl.float32))
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    i = m * 64 + tl.arange(0, 64)
    d = tl.arange(0, DV)
    row = (start + i).to(tl.int64)
    used = (i < len_q)[:, None] & (d < HEAD_DIM_V)[None, :]
    o_rows = out + batch * stride_ob + head * stride_oh + row[:, None] * stride_os
    g_rows = dout + batch * stride_gb + head * stride_gh + row[:, None] * stride_gs
    o = tl.load(o_rows + d[None, :], mask=used, other=0.0).to(tl.float32)
    g = tl.load(g_rows + d[None, :], mask=used, other=0.0).to(tl.float32)
    result = tl.sum(o * g, 1)
    if dlse is not None:
        result -= tl.load(dlse + batch * stride_lb + head * stride_lh + row * stride_ls, mask=i < len_q, other=0.0)
    tl.store(delta + batch * stat_b + head * stat_h + row, result, mask=i < len_q)


@triton.jit(do_not_specialize=["len_q", "batch_tiles", "head_tiles"])
def finish_kernel(
    acc, dq, cu_q, len_q, batch_tiles, head_tiles, scale, stride_b, stride_s, stride_h,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """64 rows of dQ: scaled, in the order of rows, in dq's dtype."""
    m, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, len_q, tile = rows_of(batch, head, cu_q, len_q, batch_tiles, head_tiles, BLOCK_M, VARLEN)
    if m * 64 >= len_q:
        return
    x = tl.load(acc + tile * (BLOCK_M * D) + m * (64 * D) + tl.arange(0, 64 * D)) * scale
    # (64 columns, group, warp, row, quad, 8 rows, pair) → (warp, 8 rows, row) × (64 columns, group, quad, pair)
    x = tl.permute(tl.reshape(x, (D // 64, 8, 4, 8, 4, 2, 2)), (2, 5, 3, 0, 1, 4, 6))
    x = tl.reshape(x, (64, D))
    i = m * 64 + tl.arange(0, 64)
    d = tl.arange(0, D)
    rows = dq + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    rows += (start + i).to(tl.int64)[:, None] * stride_s
    tl.store(rows + d[None, :], x.to(dq.dtype.element_ty), mask=(i < len_q)[:, None] & (d < HEAD_DIM)[None, :])
