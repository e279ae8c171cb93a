"""Backward attention: four kernels of `backward_kernels` in a row, no atomics, so that gradients repeat bit for bit.

Beside the gradients it allocates one fp32 number for each query and head (δ).
"""

from typing import Any, NamedTuple

import torch
import triton

from octavo.kernels.spec import AttentionSpec, AttentionTensors, Gradients, Tensor
from octavo.kernels.triton.backward_kernels import dbias_kernel, delta_kernel, dkdv_kernel, dq_kernel
from octavo.kernels.triton.flash_fwd import (
    bias_strides,
    contiguous_rows,
    is_hopper,
    refuses_flash_fwd,
    row_descriptors,
    sequence_strides,
    slope_stride,
    window_bounds,
)
from octavo.kernels.triton.tiles import backward_tiles


def refuses_flash_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    spec: AttentionSpec,
    t: AttentionTensors,
    dlse: Tensor | None = None,
) -> str | None:
    """Why this backend cannot take the call, or None."""
    if t.block_table is not None:
        return "it has no backward through a paged cache"
    return refuses_flash_fwd(q, k, v, spec, t)


class _Call(NamedTuple):
    """One backward call in the kernels' terms."""

    batch: int
    heads_q: int
    heads_k: int
    max_q: int
    max_k: int
    packed_q: bool
    packed_k: bool
    dense_q: bool  # every row of q is in use
    dense_k: bool
    inputs: tuple[Any, ...]  # q, k, v, qv, dout, lse, delta
    optional: tuple[Any, ...]  # from cu_seqlens_q to bias
    strides: tuple[int, ...]  # of the inputs
    bias_strides: tuple[int, ...]
    scalars: tuple[Any, ...]  # from softmax_scale to dropout_seed
    dropout_sizes: tuple[int, int]
    shapes: dict[str, int]  # the constants that all kernels share


def flash_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    spec: AttentionSpec,
    t: AttentionTensors,
    dlse: Tensor | None = None,
) -> Gradients:
    """Gradients in the dtypes of their tensors; `dlse` is the gradient that reached `softmax_lse`, if any did."""
    bias = t.attn_bias if spec.wants_dbias else None
    q, k, v, out, dout = (contiguous_rows(x) for x in (q, k, v, out, dout))
    call = _prepare(dout, q, k, v, softmax_lse, spec, t)
    dq = (torch.empty_like if call.dense_q else torch.zeros_like)(q, memory_format=torch.contiguous_format)
    dk, dv = (
        (torch.empty_like if call.dense_k else torch.zeros_like)(x, memory_format=torch.contiguous_format)
        for x in (k, v)
    )
    dqv = None if t.qv is None else torch.zeros_like(t.qv, memory_format=torch.contiguous_format)
    if not call.dense_q:
        call.inputs[-1].zero_()
    if q.numel() == 0 or call.max_q == 0:
        return Gradients(dq, dk.zero_(), dv.zero_(), dqv, *_no_gradients(t.learnable_sink, bias))
    _launch_delta(call, out, dout, dlse, t)
    more_inputs = t.attn_bias is not None or t.qv is not None
    widths = (call.shapes["BLOCK_D"], call.shapes["BLOCK_DV"])
    tiles = backward_tiles(*widths, q.element_size(), is_hopper(q), spec.window_right >= 0, more_inputs)
    if k.numel():
        _launch_dkdv(call, tiles.dkdv, dk, dv)
    _launch_dq(call, tiles.dq, dq, dqv)
    dbias = None if bias is None else _launch_dbias(call, bias)
    dsink = None if t.learnable_sink is None else _sink_gradient(t.learnable_sink, softmax_lse, call.inputs[-1])
    return Gradients(dq, dk, dv, dqv, dsink, dbias)


def _no_gradients(*options: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else torch.zeros_like(x) for x in options]


def _prepare(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, spec: AttentionSpec, t: AttentionTensors
) -> _Call:
    lse = lse.contiguous()
    packed_q, packed_k = t.cu_seqlens_q is not None, t.cu_seqlens_k is not None
    batch, max_q = (t.cu_seqlens_q.shape[0] - 1, t.max_seqlen_q) if t.cu_seqlens_q is not None else q.shape[:2]
    max_k = t.max_seqlen_k if packed_k else k.shape[1]
    heads_q, heads_k = q.shape[-2], k.shape[-2]
    lse_strides = (0, lse.stride(0)) if packed_q else (lse.stride(0), lse.stride(1))
    return _Call(
        batch, heads_q, heads_k, max_q, max_k, packed_q, packed_k,
        dense_q=not packed_q and t.seqused_q is None,
        dense_k=not packed_k and t.seqused_k is None and t.leftpad_k is None,
        inputs=(q, k, v, t.qv, dout, lse, torch.empty_like(lse)),
        optional=(
            t.cu_seqlens_q, t.cu_seqlens_k, t.seqused_q, t.seqused_k, t.leftpad_k, t.alibi_slopes, t.attn_bias,
        ),
        strides=(
            *sequence_strides(q, packed_q), *sequence_strides(k, packed_k), *sequence_strides(v, packed_k),
            *sequence_strides(t.qv, packed_q), *sequence_strides(dout, packed_q), *lse_strides,
        ),
        bias_strides=(slope_stride(t.alibi_slopes), *bias_strides(t.attn_bias, (batch, heads_q, max_q, max_k))),
        scalars=(
            spec.softmax_scale, spec.softcap or None, *window_bounds(spec), spec.dropout_p or None, t.dropout_seed,
        ),
        dropout_sizes=(t.max_seqlen_q or max_q, t.max_seqlen_k or max_k),
        shapes={
            "QUERIES_PER_KEY": heads_q // heads_k,
            "HEAD_DIM": q.shape[-1],
            "HEAD_DIM_V": v.shape[-1],
            "BLOCK_D": max(16, triton.next_power_of_2(q.shape[-1])),
            "BLOCK_DV": max(16, triton.next_power_of_2(v.shape[-1])),
        },
    )  # fmt: skip


def _launch_delta(call: _Call, out: Tensor, dout: Tensor, dlse: Tensor | None, t: AttentionTensors) -> None:
    delta = call.inputs[-1]
    lse_strides = call.strides[-2:]
    dlse_strides: tuple[int, ...] = (0, 0, 0)
    if dlse is not None:
        dlse_strides = (0, *dlse.stride()) if call.packed_q else dlse.stride()
    block_m = 32
    tiles = triton.cdiv(call.max_q, block_m)
    delta_kernel[(call.batch * call.heads_q * tiles,)](
        out, dout, dlse, delta, t.cu_seqlens_q, t.seqused_q, call.max_q, tiles, call.heads_q,
        *sequence_strides(out, call.packed_q), *sequence_strides(dout, call.packed_q), *lse_strides, *dlse_strides,
        HEAD_DIM_V=call.shapes["HEAD_DIM_V"], BLOCK_DV=call.shapes["BLOCK_DV"], BLOCK_M=block_m, num_warps=4,
    )  # fmt: skip


def _launch_dkdv(call: _Call, tile: Any, dk: Tensor, dv: Tensor) -> None:
    q, _, _, _, dout = call.inputs[:5]
    widths = (call.shapes["BLOCK_D"], call.shapes["BLOCK_DV"])
    descriptors = row_descriptors((q, dout), call.packed_q, tile.block_m, widths)
    n_tiles = triton.cdiv(call.max_k, tile.block_n)
    whole_tiles = call.dense_q and call.scalars[2] is None and call.max_q % tile.block_m == 0
    dkdv_kernel[(call.batch * call.heads_k * n_tiles,)](
        *call.inputs, *descriptors, dk, dv, *call.optional, *call.strides,
        *sequence_strides(dk, call.packed_k), *sequence_strides(dv, call.packed_k), *call.bias_strides, *call.scalars,
        call.heads_k, call.max_q, call.max_k, *call.dropout_sizes, n_tiles,
        **call.shapes, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, WHOLE_TILES=whole_tiles,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _launch_dq(call: _Call, tile: Any, dq: Tensor, dqv: Tensor | None) -> None:
    widths = (call.shapes["BLOCK_D"], call.shapes["BLOCK_DV"])
    descriptors = row_descriptors(call.inputs[1:3], call.packed_k, tile.block_n, widths)
    m_tiles = triton.cdiv(call.max_q, tile.block_m)
    whole_tiles = call.dense_k and call.scalars[3] is None and call.max_k % tile.block_n == 0
    dq_kernel[(call.batch * call.heads_q * m_tiles,)](
        *call.inputs, *descriptors, dq, dqv, *call.optional, *call.strides,
        *sequence_strides(dq, call.packed_q), *sequence_strides(dqv, call.packed_q), *call.bias_strides, *call.scalars,
        call.heads_q, call.max_q, call.max_k, *call.dropout_sizes, m_tiles,
        **call.shapes, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, WHOLE_TILES=whole_tiles,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _launch_dbias(call: _Call, bias: Tensor) -> Tensor:
    """The gradient in the bias's shape, summed over the axes along which it was broadcast."""
    full = (call.batch, call.heads_q, call.max_q, call.max_k)
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    sums = [own == 1 and size != 1 for own, size in zip(shape, full, strict=True)]
    dbias = torch.empty(shape, dtype=bias.dtype, device=bias.device)
    block = 32  # the tile of a gradient that few calls ask for; no speed was sought
    m_tiles, n_tiles = triton.cdiv(call.max_q, block), triton.cdiv(call.max_k, block)
    grid = shape[0] * shape[1] * (1 if sums[2] else m_tiles) * (1 if sums[3] else n_tiles)
    dbias_kernel[(grid,)](
        *call.inputs, dbias, *call.optional, *call.strides, *call.bias_strides, *call.scalars,
        call.batch, call.heads_q, call.max_q, call.max_k, *call.dropout_sizes, m_tiles, n_tiles,
        *sums, **call.shapes, BLOCK_M=block, BLOCK_N=block, num_warps=4, num_stages=1,
    )  # fmt: skip
    return dbias.reshape(bias.shape)


def _sink_gradient(sink: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """−Σ exp(sink − LSE) · δ over batch and rows: a sink is a key whose value is 0."""
    heads = (-1, 1)  # the head axis stands before the rows in (B, Hq, Sq) as in (Hq, Tq)
    weight = torch.exp(sink.float().reshape(heads) - lse)
    weighted = torch.where(torch.isneginf(lse), 0.0, weight * delta)
    return -weighted.sum(dim=(0, 2) if lse.dim() == 3 else 1).to(sink.dtype)
