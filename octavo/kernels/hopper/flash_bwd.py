"""Backward attention for Hopper (sm_90): dense and varlen, grouped heads, causal, sliding window, softcap, sinks.

A call takes three launches: δ and zeros for the sums of dQ; the products, with dK and dV in registers and dQ summed in
fp32 by TMA (`backward_kernel`, above head size 128 `backward_wide_kernel`); dQ scaled and in order. The sums of dQ come
in any order, so its last bits differ between runs. Beside the gradients it needs dQ in fp32 and one fp32 number for
each query and head (δ).

With `deterministic` each query block's sums come in a fixed order. Above 128 there are no sums then: dK and dV have a
kernel (`dkdv_kernel`) and dQ has the Triton backend's, which computes S and dP once more. Values of up to 128 beside
larger keys go that way too, where it is the faster one.
"""

import math
from typing import Any, NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.hopper.backward_kernel import backward_kernel
from octavo.kernels.hopper.backward_rows import finish_kernel, prepare_kernel
from octavo.kernels.hopper.backward_wide_kernel import backward_wide_kernel
from octavo.kernels.hopper.descriptors import make_descriptor
from octavo.kernels.hopper.dkdv_kernel import dkdv_kernel
from octavo.kernels.hopper.flash_fwd import (
    LOG2E,
    WG_ROWS,
    _descriptor,
    _readable_by_tma,
    _sizes,
    _width,
    refuses_inputs,
)
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Gradients, Tensor
from octavo.kernels.triton import flash_bwd as portable
from octavo.kernels.triton.launch import Constants, integer_key, launch, pointer_key
from octavo.kernels.triton.tiles import backward_tiles


class Tile(NamedTuple):
    """What one thread block works on at a time, and with how many registers."""

    kernel: Any
    block_n: int  # keys that stay
    block_m: int  # queries of one block
    q_stages: int  # blocks in the rings of Q and of dO, up to 3
    g_stages: int
    sums_rows: int  # rows of 32 in one TMA box of dQ's sums; 0: dQ is computed by a kernel of its own
    registers: int = 240  # of a consumer's thread
    max_registers: int = 168  # of all threads on average, which is what the launch asks for


TWO_PASSES = Tile(dkdv_kernel, 64, 64, 2, 2, 0)  # above 128: the same bits at every run
# by the widths of q and v in shared memory; measured on an H100, see docs/kernels/hopper_flash_bwd.md
TILES = {
    (64, 64): Tile(backward_kernel, 128, 128, 2, 2, 128),
    (128, 128): Tile(backward_kernel, 128, 64, 2, 2, 128),
    (256, 128): TWO_PASSES,
    (256, 256): Tile(backward_wide_kernel, 64, 64, 2, 2, 64),
}
_SUMS_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)


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
    reason = refuses_inputs(q, v, spec, t)
    if reason is not None:
        return reason
    if (t.cu_seqlens_q is None) != (t.cu_seqlens_k is None):
        return "it takes cu_seqlens_q and cu_seqlens_k together"
    if q.numel() == 0 or k.numel() == 0:
        return "there are no queries or no keys"
    return None


class _Sums(NamedTuple):
    """dQ in fp32, as `backward_rows` describes it."""

    data: Tensor
    batch_tiles: int  # tiles of block_m rows from one sequence to the next; 0 where they are ragged
    head_tiles: int


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
    q, k, v, out, dout = (_readable_by_tma(x) for x in (q, k, v, out, dout))
    lse = softmax_lse.contiguous()
    tile = TILES[_width(q.shape[-1]), _width(v.shape[-1])]
    if spec.deterministic and tile.kernel is backward_wide_kernel:
        tile = TWO_PASSES
    varlen = t.cu_seqlens_q is not None
    new = torch.zeros if varlen else torch.empty  # rows that belong to no sequence
    dq, dk, dv = (new(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    tensors = (dout, q, k, v, dk, dv)
    if tile.sums_rows:
        delta = torch.zeros_like(lse) if varlen else torch.empty_like(lse)
        sums = _allocate_sums(q, tile.block_m, _sizes(q, k, t)[0], varlen)
        _prepare(out, dout, dlse, delta, sums, tile, _width(q.shape[-1]), t)
        _multiply(tensors, lse, delta, sums, tile, spec, t)
        _finish(dq, sums, tile, spec.softmax_scale, t)
    else:
        call = portable._prepare(dout, q, k, v, lse, spec, t)
        delta = call.inputs[-1]
        if varlen:
            delta.zero_()
        portable._launch_delta(call, out, dout, dlse, t)
        _multiply(tensors, lse, delta, None, tile, spec, t)
        widths = (call.shapes["BLOCK_D"], call.shapes["BLOCK_DV"])
        causal = spec.window_right >= 0
        portable._launch_dq(call, backward_tiles(*widths, q.element_size(), True, causal, False).dq, dq, None)
    dsink = None if t.learnable_sink is None else _sink_gradient(t.learnable_sink, lse, delta)
    return Gradients(dq, dk, dv, dsink=dsink)


def _allocate_sums(q: Tensor, block_m: int, batch: int, varlen: bool) -> _Sums:
    heads = q.shape[-2]
    # ragged sequences begin at tile start // block_m + number of the sequence
    head_tiles = q.shape[0] // block_m + batch if varlen else math.ceil(q.shape[1] / block_m)
    shape = (1 if varlen else batch, heads, head_tiles * block_m, _width(q.shape[-1]))
    data = torch.empty(shape, dtype=torch.float32, device=q.device)
    return _Sums(data, 0 if varlen else heads * head_tiles, head_tiles)


def _prepare(
    out: Tensor, dout: Tensor, dlse: Tensor | None, delta: Tensor, sums: _Sums, tile: Tile, width: int,
    t: AttentionTensors,
) -> None:  # fmt: skip
    varlen = t.cu_seqlens_q is not None
    batch, heads, len_q = _grid_sizes(out, t)
    strides = (
        *_strides(out, varlen),
        *_strides(dout, varlen),
        *(_strides(dlse, varlen) if dlse is not None else (0,) * 3),
    )
    cu = delta if t.cu_seqlens_q is None else t.cu_seqlens_q
    pieces = math.ceil(len_q / tile.block_m) * (tile.block_m // 64)
    constants = (
        ("HEAD_DIM_V", out.shape[-1]),
        ("DV", _width(out.shape[-1])),
        ("D", width),
        ("BLOCK_M", tile.block_m),
        ("VARLEN", varlen),
    )
    arguments = (
        out, dout, dlse, delta, sums.data, cu, len_q, sums.batch_tiles, sums.head_tiles,
        0 if varlen else delta.stride(0), delta.stride(-2), *strides,
    )  # fmt: skip
    pointers = tuple(None if x is None else pointer_key(x) for x in (out, dout, dlse, cu))
    launch(prepare_kernel, (pieces, heads, batch), arguments, constants, (pointers, integer_key(strides)), num_warps=4)


def _multiply(
    tensors: tuple[Tensor, ...], lse: Tensor, delta: Tensor, sums: _Sums | None, tile: Tile, spec: AttentionSpec,
    t: AttentionTensors,
) -> None:  # fmt: skip
    dout, q, k, v, dk, dv = tensors
    varlen = t.cu_seqlens_q is not None
    batch, len_q, len_k = _sizes(q, k, t)
    heads_k = k.shape[-2]
    num_n = math.ceil(len_k / tile.block_n)
    descriptors = [_descriptor(x, rows, varlen) for rows, x in (
        (tile.block_m, q), (WG_ROWS.value, k), (WG_ROWS.value, v), (tile.block_m, dout), (WG_ROWS.value, dk),
        (WG_ROWS.value, dv),
    )]  # fmt: skip
    cu_q, cu_k = (lse if x is None else x for x in (t.cu_seqlens_q, t.cu_seqlens_k))
    pointers = [lse, delta, cu_q, cu_k]
    scalars = [
        len_q,
        len_k,
        num_n,
        heads_k,
        q.shape[-2] // heads_k,
        spec.window_left,
        spec.window_right,
        (spec.softcap or spec.softmax_scale) * LOG2E.value,
        spec.softmax_scale / spec.softcap if spec.softcap else 0.0,
        spec.softmax_scale,
        0 if varlen else lse.stride(0),
        lse.stride(-2),
    ]
    constants: Constants = (
        ("Q_STAGES", tile.q_stages),
        ("G_STAGES", tile.g_stages),
        ("RIGHT", spec.window_right >= 0),
        ("LEFT", spec.window_left >= 0),
        ("VARLEN", varlen),
        ("SOFTCAP", spec.softcap != 0),
    )
    if sums is not None:
        descriptors.append(_sums_descriptor(sums.data, tile.sums_rows))
        scalars += [sums.batch_tiles, sums.head_tiles]
    if tile.kernel is backward_kernel:
        pointers.append(_turns(sums, q.shape[-2]) if sums is not None and spec.deterministic else lse)
        constants = (*constants, ("IN_TURN", spec.deterministic))
    constants = (*constants, ("REGS", tile.registers))
    key = (q.dtype, _width(q.shape[-1]), _width(v.shape[-1]), *(pointer_key(x) for x in pointers))
    grid = (num_n * heads_k * batch, 1, 1)
    arguments = (*descriptors, *pointers, *scalars)
    launch(tile.kernel, grid, arguments, constants, key, num_warps=4, maxnreg=tile.max_registers)


def _turns(sums: _Sums, heads: int) -> Tensor:
    """Counters of the key blocks that have added to a query block, one for each warpgroup's share of it."""
    return torch.zeros(2 * sums.data.shape[0] * heads * sums.head_tiles, dtype=torch.int32, device=sums.data.device)


def _finish(dq: Tensor, sums: _Sums, tile: Tile, scale: float, t: AttentionTensors) -> None:
    varlen = t.cu_seqlens_q is not None
    batch, heads, len_q = _grid_sizes(dq, t)
    strides = _strides(dq, varlen)
    cu = sums.data if t.cu_seqlens_q is None else t.cu_seqlens_q
    constants = (
        ("HEAD_DIM", dq.shape[-1]),
        ("D", sums.data.shape[-1]),
        ("BLOCK_M", tile.block_m),
        ("VARLEN", varlen),
    )
    arguments = (sums.data, dq, cu, len_q, sums.batch_tiles, sums.head_tiles, scale, *strides)
    key = (dq.dtype, pointer_key(cu), integer_key(strides))
    launch(finish_kernel, (math.ceil(len_q / 64), heads, batch), arguments, constants, key, num_warps=4)


def _grid_sizes(q: Tensor, t: AttentionTensors) -> tuple[int, int, int]:
    """Sequences, query heads, rows of the longest sequence."""
    if t.cu_seqlens_q is None:
        return q.shape[0], q.shape[-2], q.shape[1]
    return len(t.cu_seqlens_q) - 1, q.shape[-2], t.max_seqlen_q


def _strides(x: Tensor, varlen: bool) -> tuple[int, ...]:
    """Strides of batch, row and head; of dlse (B, H, S): of batch, head and row."""
    return (0, *x.stride()[:2]) if varlen else x.stride()[:3]


def _sums_descriptor(sums: Tensor, rows: int) -> TensorDescriptor:
    return make_descriptor(sums, [sums.numel() // 32, 32], [32, 1], [rows, 32], _SUMS_LAYOUT)


def _sink_gradient(sink: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """−Σ exp(sink − LSE) · δ over batch and rows: a sink is a key whose value is 0."""
    heads = (-1, 1)  # the head axis stands before the rows in (B, Hq, Sq) as in (Hq, Tq)
    weight = torch.exp(sink.float().reshape(heads) - lse)
    weighted = torch.where(torch.isneginf(lse), 0.0, weight * delta)
    return -weighted.sum(dim=(0, 2) if lse.dim() == 3 else 1).to(sink.dtype)
