"""Dequantisation of ggml's tensor types, vectorised in torch so that it runs on any device and on all cores.

A quantised row is a run of blocks; a block holds a few scales and `block_elements` small integers. Each function takes
blocks (N, block_bytes) uint8 and gives (N, block_elements) fp32. Layouts: ggml-common.h and ggml-quants.c of ggml.
"""

from collections.abc import Callable

import torch

from octavo.models.ggml_types import GgmlType

Tensor = torch.Tensor
_CHUNK_ELEMENTS = 1 << 22  # dequantised at a time: temporaries stay near 100 MB whatever the tensor's size


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of each block, as fp32 (N, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """(…, b) bytes → (…, 2b) values 0…15: all low nibbles, then all high ones."""
    return torch.cat([packed & 0xF, packed >> 4], dim=-1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """(N, 4) bytes → (N, 32) values 0 or 16, from the 32 bits in order."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(1) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks[:, 2:]).float() - 8) * _half(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:]).float() * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    return ((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])).float() - 16) * _half(blocks, 0)


def _q5_1(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])).float() * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float() * _half(blocks, 0)


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 12) bytes → eight 6-bit scales and eight 6-bit minima, (N, 8) fp32 each.

    Bytes 0…3 and 4…7 hold the first four scales and minima in their low six bits and, in their top two, the top two
    bits of the last four; bytes 8…11 hold the low nibbles of those (scale low, minimum high).
    """
    low, mid, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([low & 63, (high & 0xF) | (low >> 6 << 4)], dim=1)
    minima = torch.cat([mid & 63, (high >> 4) | (mid >> 6 << 4)], dim=1)
    return scales.float(), minima.float()


def _k_affine(blocks: Tensor, quants: Tensor) -> Tensor:
    """d · scale · q − dmin · minimum over eight sub-blocks; `quants` (N, 8, 32)."""
    scales, minima = _k_scales(blocks[:, 4:16])
    scales, minima = scales * _half(blocks, 0), minima * _half(blocks, 2)
    return (quants.float() * scales.unsqueeze(-1) - minima.unsqueeze(-1)).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _k_affine(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).view(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(8, 1)
    high = ((blocks[:, 16:48].unsqueeze(1) >> shifts) & 1) << 4  # bit i of byte l belongs to element l of sub-block i
    return _k_affine(blocks, _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32) | high)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).view(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).view(4, 1)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    quants = (low | (high << 4)).float().sub_(32).view(-1, 16, 16)
    scales = blocks[:, 192:208].view(torch.int8).float() * _half(blocks, 208)
    return (quants * scales.unsqueeze(-1)).flatten(1)


def _f32(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float32)


def _f16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float16).float()


def _bf16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.bfloat16).float()


_DEQUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {  # by the type's name
    "F32": _f32,
    "F16": _f16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "BF16": _bf16,
}


def dequantize(raw: Tensor, ggml_type: GgmlType, dtype: torch.dtype = torch.float32) -> Tensor:
    """Raw rows (rows, row_bytes) uint8, on any device → (rows, columns) of `dtype`, computed in fp32."""
    rows, row_bytes = raw.shape
    dequantize_blocks = _DEQUANTIZE[ggml_type.name]
    blocks = raw.reshape(-1, ggml_type.block_bytes)
    out = torch.empty(blocks.shape[0], ggml_type.block_elements, dtype=dtype, device=raw.device)
    step = max(1, _CHUNK_ELEMENTS // ggml_type.block_elements)
    for begin in range(0, blocks.shape[0], step):
        part = slice(begin, begin + step)
        out[part] = dequantize_blocks(blocks[part].contiguous())
    return out.view(rows, row_bytes // ggml_type.block_bytes * ggml_type.block_elements)
