"""All layers of a Llama-like decoder in one parallel region, for weights that stay quantised.

A layer is a dozen small operations; through torch each costs 5 to 20 µs of dispatch, which for one token is more than
the arithmetic. Here the whole stack is one kernel call: its phases are those of quant_linear.py and
paged_attention.py plus the small ones between (norm, rotary embedding and cache write, SwiGLU), each ended by a
barrier of about 0.3 µs. Norm and SwiGLU round their results for the product that follows, so those never go
through memory in fp32; nor do gate and up, which are multiplied and activated tile by tile.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from octavo.kernels.cpu.jit import Kernel, lacks
from octavo.kernels.cpu.paged_attention import TYPES, attention_arguments, scratch_bytes
from octavo.kernels.cpu.quant_linear import GROUP, MAX_TOKENS, workspace_bytes
from octavo.kernels.spec import AttentionSpec, AttentionTensors, Tensor

LAYER_FIELDS = 24  # int64 slots of one layer: 4 norms, 4 linears of 4, keys, values, window, 1 spare


class LinearParts(NamedTuple):
    """A `QuantizedWeight`'s tensors and a bias (row_blocks · 16,) fp32."""

    codes: Tensor
    scales: Tensor
    mins: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class DecoderShape:
    """What all layers have in common. Sizes are multiples of 16, of groups 32; zero_point as in `QuantizedWeight`."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    softmax_scale: float
    bits: int
    has_mins: bool
    wide_scales: bool
    zero_point: int


class DecoderLayerParts(NamedTuple):
    """Weights of one layer: norms fp32, the qk norms (head_dim,) or None; window_left as in `AttentionSpec`."""

    attn_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: LinearParts
    o: LinearParts
    gate_up: LinearParts
    down: LinearParts
    window_left: int


def cache_dtypes() -> tuple[torch.dtype, ...]:
    """What keys and values may be kept in on this CPU, the cheapest first."""
    return (torch.float32,) if lacks("f16c") else (torch.float16, torch.float32)


def layer_table(layers: Sequence[DecoderLayerParts]) -> Tensor:
    """(layers, LAYER_FIELDS) int64 of addresses, valid as long as the tensors live; `set_caches` adds the caches'."""
    rows = []
    for layer in layers:
        linears = [_address(part) for linear in (layer.qkv, layer.o, layer.gate_up, layer.down) for part in linear]
        norms = [_address(norm) for norm in layer[:4]]
        rows.append([*norms, *linears, 0, 0, layer.window_left, 0])
    return torch.tensor(rows, dtype=torch.int64)


def set_caches(table: Tensor, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor]) -> None:
    """Puts every layer's cache into its row of the table."""
    table[:, 20] = torch.tensor([k.data_ptr() for k in k_caches])
    table[:, 21] = torch.tensor([v.data_ptr() for v in v_caches])


def decoder_stack(
    hidden: Tensor,
    shape: DecoderShape,
    table: Tensor,
    final_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    t: AttentionTensors,
) -> Tensor:
    """hidden (T, hidden_size) fp32 is used up; returns the normalised output (T, hidden_size).

    `k_cache` and `v_cache` are any layer's (num_blocks, block_size, Hkv, head_dim) fp32 or fp16: all have the
    same strides.
    cos and sin are (T, rotary_dim / 2) fp32, slot_mapping (T,) int64 with negative slots not stored.
    """
    tokens, threads = hidden.shape[0], torch.get_num_threads()
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    out = torch.empty_like(hidden)
    qkv = torch.empty(tokens, heads + 2 * kv_heads, head_dim)
    attended = torch.zeros(tokens, heads, head_dim)
    widths = shape.intermediate_size, max(shape.hidden_size, heads * head_dim)
    activated, rounded = (torch.empty(workspace_bytes(tokens, w // GROUP), dtype=torch.uint8) for w in widths)
    # of each thread: a copy of the attention's arguments, one row in fp32 or a tile of gate and up, attention's scratch
    row_bytes = 512 + 4 * max(shape.hidden_size, MAX_TOKENS * 2 * GROUP)
    scratch = torch.empty(threads, row_bytes + scratch_bytes(head_dim, head_dim), dtype=torch.uint8)
    spec = AttentionSpec(shape.softmax_scale, -1, 0)
    q = qkv[:, :heads]
    attention, keep = attention_arguments(q, k_cache, v_cache, spec, t, attended, None, scratch[:, row_bytes:])
    packed = torch.frombuffer(bytearray(attention), dtype=torch.int64)
    assert len(packed) * 8 <= 448
    kernel = _kernel(head_dim, shape.bits, shape.has_mins, shape.wide_scales, TYPES[k_cache.dtype])
    kernel(
        *(hidden.data_ptr(), tokens, len(table), table.data_ptr(), final_norm.data_ptr(), out.data_ptr()),
        *(shape.hidden_size, shape.intermediate_size, heads, kv_heads, shape.zero_point),
        *(cos.data_ptr(), sin.data_ptr(), cos.shape[1], slot_mapping.data_ptr()),
        *(qkv.data_ptr(), attended.data_ptr(), activated.data_ptr(), rounded.data_ptr()),
        *(scratch.data_ptr(), scratch.stride(0), packed.data_ptr(), len(packed), row_bytes),
        float(shape.rms_norm_eps),
        threads=threads,
    )
    del keep
    return out


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def _kernel(head_dim: int, bits: int, has_mins: bool, wide_scales: bool, kv_type: str) -> Kernel:
    def build():
        from octavo.kernels.cpu.decoder_code import make_kernel

        return make_kernel(head_dim, bits, has_mins, wide_scales, kv_type)

    weights = f"{bits}{'m' if has_mins else 'z'}{'32' if wide_scales else '16'}"
    return Kernel(f"decoder-{head_dim}-{weights}-{kv_type}", build)
