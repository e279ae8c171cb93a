"""Forward attention by the one forward kernel: which calls it takes, and how a call becomes a launch."""

import functools
from dataclasses import replace

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor
from octavo.kernels.triton.forward_kernel import forward_kernel
from octavo.kernels.triton.split_kv import combine_kernel
from octavo.kernels.triton.tiles import Tile, forward_tile, packed_tile, split_head_dim

MAX_HEAD_DIM = 576  # an MLA latent of 512 and its rotary 64
MAX_HEAD_DIM_V = 512
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WAVES = 4  # splits in all, in units of the programs that the GPU runs at once
_NO_LIMIT = 2**31 - 1


def refuses_flash_fwd(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> str | None:
    """Why this backend cannot take the call, or None."""
    if q.dtype not in _DTYPES:
        return f"it takes float16, bfloat16 and float32, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] > MAX_HEAD_DIM or v.shape[-1] > MAX_HEAD_DIM_V:
        limits = f"up to {MAX_HEAD_DIM}, and up to {MAX_HEAD_DIM_V} for v"
        return f"it takes head_dim {limits}, not {q.shape[-1]} and {v.shape[-1]}"
    if q.shape[-1] % 8 or v.shape[-1] % 8:
        return f"it takes head_dim in multiples of 8, not {q.shape[-1]} and {v.shape[-1]}"
    if spec.softmax_scale <= 0:
        return f"it takes a positive softmax_scale, not {spec.softmax_scale}"
    if q.is_cuda and capability(q.device) < (8, 0):
        return f"it needs compute capability 8.0, {q.device} has {capability(q.device)}"
    return None


def flash_fwd(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors) -> tuple[Tensor, Tensor]:
    """`(out, softmax_lse)`: out as q with v's last axis, LSE fp32 (B, Hq, Sq) or (Hq, Tq). See `kernels/spec.py`."""
    return launch_forward(q, k, v, spec, t)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def lacks_fp8(cache: Tensor) -> str | None:
    """Why the GPU cannot convert this quantised cache, or None."""
    if cache.dtype == torch.float8_e4m3fn and cache.is_cuda and capability(cache.device) < (8, 9):
        return f"fp8 needs compute capability 8.9, {cache.device} has {capability(cache.device)}"
    return None


@functools.cache
def num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter: few, so that tests see several splits
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_hopper(x: Tensor) -> bool:
    """True on sm_90; False in the interpreter."""
    return x.is_cuda and capability(x.device)[0] == 9


def contiguous_rows(x: Tensor) -> Tensor:
    """x itself when its last axis is contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def sequence_strides(x: Tensor | None, packed: bool) -> tuple[int, int, int]:
    """(batch, row, head) strides; a packed tensor (T, H, D) has no batch axis. A paged cache: (block, slot, head)."""
    if x is None:
        return 0, 0, 0
    return (0, x.stride(0), x.stride(1)) if packed else (x.stride(0), x.stride(1), x.stride(2))


def window_bounds(spec: AttentionSpec) -> tuple[int | None, int | None]:
    """(left, right) with None for no bound, which compiles no mask for it."""
    return spec.window_left if spec.window_left >= 0 else None, spec.window_right if spec.window_right >= 0 else None


def bias_strides(bias: Tensor | None, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Strides of the bias expanded to (B, Hq, Sq, Sk); 0 along broadcast axes."""
    return (0, 0, 0, 0) if bias is None else bias.expand(shape).stride()  # type: ignore[return-value]


def slope_stride(slopes: Tensor | None) -> int:
    """Batch stride of ALiBi slopes (Hq,) or (B, Hq)."""
    return slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0


def empty_outputs(q: Tensor, head_dim_v: int, t: AttentionTensors) -> tuple[Tensor, Tensor]:
    """Output and LSE; preset to 0 and −inf where rows may belong to no sequence or be unused."""
    out_shape = (*q.shape[:-1], head_dim_v)
    if t.cu_seqlens_q is not None:
        lse_shape: tuple[int, ...] = (q.shape[1], q.shape[0])
    else:
        lse_shape = (q.shape[0], q.shape[2], q.shape[1])
    if t.cu_seqlens_q is None and t.seqused_q is None:
        return q.new_empty(out_shape), q.new_empty(lse_shape, dtype=torch.float32)
    return q.new_zeros(out_shape), q.new_full(lse_shape, -torch.inf, dtype=torch.float32)


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, t: AttentionTensors, num_splits: int = 0, v_is_k: bool = False
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel, over splits of the keys where that fills the GPU; `num_splits` 0 lets the shapes decide.

    With `v_is_k` the value is the first part of the key (an MLA latent), and `v` a view of it. Grid and memory depend
    on shapes alone: nothing here waits for the GPU.
    """
    q, k, v = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v)
    packed_q, packed_k, paged = t.cu_seqlens_q is not None, t.cu_seqlens_k is not None, t.block_table is not None
    batch, max_q = (t.cu_seqlens_q.shape[0] - 1, t.max_seqlen_q) if t.cu_seqlens_q is not None else q.shape[:2]
    max_k = t.max_seqlen_k if packed_k or paged else k.shape[1]
    heads_q, heads_k = q.shape[-2], k.shape[-2]
    out, lse = empty_outputs(q, v.shape[-1], t)
    if out.numel() == 0 or batch == 0 or max_q == 0:
        return out, lse

    block_d, block_tail = (v.shape[-1], q.shape[-1] - v.shape[-1]) if v_is_k else split_head_dim(q.shape[-1])
    block_dv = max(16, triton.next_power_of_2(v.shape[-1]))
    queries_per_key = heads_q // heads_k
    group_rows = queries_per_key if paged or max_q <= 8 else 1
    heads, rows = heads_q // group_rows, max_q * group_rows
    hopper = is_hopper(q)
    if group_rows > 1 or rows <= 64:
        tile = packed_tile(rows, block_d + block_tail, block_dv, q.element_size(), hopper, k.shape[1] if paged else 0)
    else:
        more_inputs = t.attn_bias is not None or t.qv is not None
        tile = forward_tile(block_d + block_tail, block_dv, q.element_size(), hopper, more_inputs)
    m_tiles = triton.cdiv(rows, tile.block_m)

    slots, target = split_slots(batch, heads * m_tiles, max_k, num_splits, paged, tile, num_processors(q.device))
    if slots and t.seqused_k is None:
        t = replace(t, seqused_k=key_lengths(t, batch, k))
    partials: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if slots:
        partials = (
            q.new_empty(slots * heads * rows * v.shape[-1], dtype=torch.float32),
            q.new_empty(slots * heads * rows, dtype=torch.float32),
            q.new_empty(2 * batch, dtype=torch.int32),
        )
    left, right = window_bounds(spec)
    whole_tiles = not (packed_k or paged or t.seqused_k is not None or right is not None or k.shape[1] % tile.block_n)
    seen = _NO_LIMIT if left is None else left + max(right or 0, 0) + max_q + tile.block_n  # keys of a query
    capacity = _NO_LIMIT if t.block_table is None else min(t.block_table.shape[1] * k.shape[1], _NO_LIMIT)
    out_strides = sequence_strides(out, packed_q)
    lse_strides = (0, lse.stride(0)) if packed_q else (lse.stride(0), lse.stride(1))
    descriptors: tuple[TensorDescriptor | None, TensorDescriptor | None] = (None, None)
    if not (paged or block_tail or v_is_k):
        descriptors = row_descriptors((k, v), packed_k, tile.block_n, (block_d, block_dv))
    forward_kernel[((slots or batch) * heads * m_tiles,)](
        q, k, v, t.qv, out, lse, *descriptors,
        t.cu_seqlens_q, t.cu_seqlens_k, t.seqused_q, t.seqused_k, t.leftpad_k, t.block_table,
        t.alibi_slopes, t.learnable_sink, t.attn_bias, *partials,
        *sequence_strides(q, packed_q), *sequence_strides(k, packed_k), *sequence_strides(v, packed_k),
        *sequence_strides(t.qv, packed_q), *out_strides, *lse_strides,
        t.block_table.stride(0) if t.block_table is not None else 0, slope_stride(t.alibi_slopes),
        *bias_strides(t.attn_bias, (batch, heads_q, max_q, max_k)),
        spec.softmax_scale, spec.softcap or None, left, right, spec.dropout_p or None, t.dropout_seed,
        batch, heads, max_q, max_k, t.max_seqlen_q or max_q, t.max_seqlen_k or max_k, m_tiles, target,
        num_splits or None, min(capacity, seen), capacity,
        GROUP_ROWS=group_rows, QUERIES_PER_KEY=queries_per_key, PAGE_SIZE=k.shape[1] if paged else 0,
        HEAD_DIM=q.shape[-1], HEAD_DIM_V=v.shape[-1], BLOCK_D=block_d, BLOCK_TAIL=block_tail, BLOCK_DV=block_dv,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_B=128 if batch <= 128 else 1024,
        V_IS_K=v_is_k, SPLIT=slots > 0, WHOLE_TILES=whole_tiles,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if slots:
        combine_kernel[(batch * heads * rows,)](
            *partials, out, lse, t.cu_seqlens_q, t.seqused_q, max_q, heads, rows, *out_strides, *lse_strides,
            GROUP_ROWS=group_rows, HEAD_DIM_V=v.shape[-1], BLOCK_DV=block_dv, BLOCK_SPLITS=8, num_warps=1,
        )  # fmt: skip
    return out, lse


def split_slots(
    batch: int, programs: int, max_k: int, num_splits: int, paged: bool, tile: Tile, processors: int
) -> tuple[int, int]:
    """(slots of the grid, slots to aim at); 0 slots: one program a sequence. `programs` are those of one sequence."""
    if num_splits:
        return (batch * num_splits, 1) if num_splits > 1 else (0, 0)
    key_tiles = triton.cdiv(max_k, tile.block_n)
    if paged:
        split = key_tiles > 4 and (programs * batch < 2 * processors or programs <= 16)
    else:
        split = key_tiles > 8 and 2 * programs * batch <= processors
    if not split:
        return 0, 0
    target = max(1, _WAVES * processors // programs)
    return target + batch, target


def key_lengths(t: AttentionTensors, batch: int, k: Tensor) -> Tensor:
    """(B,) int32 lengths of the keys."""
    if t.cu_seqlens_k is not None:
        return t.cu_seqlens_k[1:] - t.cu_seqlens_k[:-1]
    return torch.full((batch,), k.shape[1], dtype=torch.int32, device=k.device)


def row_descriptors(
    tensors: tuple[Tensor, Tensor], packed: bool, block_rows: int, widths: tuple[int, int]
) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """TMA descriptors of k and v (or of q and dout), both or neither: see `row_descriptor`."""
    first, second = (row_descriptor(x, packed, block_rows, width) for x, width in zip(tensors, widths, strict=True))
    return (None, None) if first is None or second is None else (first, second)


def row_descriptor(x: Tensor, packed: bool, block_rows: int, width: int) -> TensorDescriptor | None:
    """x (B, S, H, D) or (T, H, D) as the matrix (rows, columns of all heads) that TMA reads in tiles (block_rows, D).

    None where x is no such matrix: D padded, batches not adjacent, heads not inside a row; or where the GPU has no TMA.
    """
    if not is_hopper(x) or x.element_size() != 2 or x.shape[-1] != width:
        return None
    stride_row, stride_head = x.stride()[-3:-1]
    rows = x.shape[0] if packed else x.shape[0] * x.shape[1]
    columns = (x.shape[-2] - 1) * stride_head + width
    adjacent = packed or x.shape[0] == 1 or x.stride(0) == x.shape[1] * stride_row
    aligned = x.data_ptr() % 16 == 0 and stride_row % 8 == 0 and stride_head % 8 == 0
    if not (adjacent and aligned and columns <= stride_row and rows > 0):
        return None
    return TensorDescriptor(x, [rows, columns], [stride_row, 1], [block_rows, width])
