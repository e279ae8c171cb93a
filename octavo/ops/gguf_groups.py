"""GGUF's quantised tensors read as groups: codes, scales and minimums, w = scale · (code − zero_point) + min.

Covers the types whose groups have 32 inputs, which one kernel serves: the plain ones (one scale a group, with a zero
point or a minimum) and Q4_K and Q5_K (super-blocks of 256 with 6-bit scales of fp16 scales, multiplied out to fp32).
Layouts: ggml's `block_*` structs.
"""

from dataclasses import dataclass

import numpy as np
import torch

GROUP = 32  # inputs that share one scale

_SUPER = 256  # inputs of a K type's super-block
_BYTES = {
    "Q4_0": 18,
    "Q4_1": 20,
    "Q5_0": 22,
    "Q5_1": 24,
    "Q8_0": 34,
    "Q4_K": 144,
    "Q5_K": 176,
}  # of a group or super-block
QTYPES = frozenset(_BYTES)


@dataclass(frozen=True, slots=True)
class Groups:
    """codes (rows, groups, 32) uint8; scales and mins (rows, groups) fp16 or fp32."""

    codes: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None
    zero_point: int

    def dense(self) -> torch.Tensor:
        """The values, (rows, groups · 32) fp32."""
        values = (self.codes.float() - self.zero_point) * self.scales.float().unsqueeze(-1)
        if self.mins is not None:
            values += self.mins.float().unsqueeze(-1)
        return values.flatten(1)


def read_groups(raw: np.ndarray, qtype: str, shape: tuple[int, int]) -> Groups:
    """Reads a tensor's bytes (uint8, any shape) of `qtype` and `shape` (out, in); ValueError when they do not fit."""
    if qtype not in QTYPES:
        raise ValueError(f"qtype: expected one of {sorted(QTYPES)}, got {qtype!r}; dequantise this tensor instead")
    rows, columns = shape
    unit = _SUPER if qtype.endswith("_K") else GROUP
    if rows <= 0 or columns <= 0 or columns % unit:
        raise ValueError(f"shape: expected (out, in) with in a multiple of {unit} for {qtype}, got {tuple(shape)}")
    expected = rows * (columns // unit) * _BYTES[qtype]
    if raw.dtype != np.uint8 or raw.size != expected:
        raise ValueError(f"raw: expected {expected} uint8 for {qtype} {tuple(shape)}, got {raw.size} of {raw.dtype}")
    blocks = torch.tensor(raw.reshape(rows, -1, _BYTES[qtype]))
    return _read_super_blocks(blocks) if unit == _SUPER else _read_plain(blocks, qtype)


def _read_plain(blocks: torch.Tensor, qtype: str) -> Groups:
    """Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: scale, perhaps a minimum, perhaps 32 fifth bits, then the low bits."""
    scales, at = _fp16(blocks[..., 0:2]).squeeze(-1), 2
    mins = None
    if qtype.endswith("_1"):
        mins, at = _fp16(blocks[..., 2:4]).squeeze(-1), 4
    if qtype == "Q8_0":
        return Groups(blocks[..., at:] ^ 0x80, scales, None, 128)  # int8 to offset binary
    codes = _nibbles(blocks[..., -16:])
    if qtype.startswith("Q5"):
        fifth = blocks[..., at : at + 4].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
        codes |= fifth.flatten(-2) << 4
    zero_point = {"Q4_0": 8, "Q5_0": 16}.get(qtype, 0)
    return Groups(codes, scales, mins, zero_point)


def _read_super_blocks(blocks: torch.Tensor) -> Groups:
    """Q4_K and Q5_K: scale and minimum scale, 8 pairs of 6-bit factors, perhaps fifth bits, 4 × 32 nibble pairs."""
    factors = blocks[..., 4:16]
    low, high, mixed = factors[..., 0:4], factors[..., 4:8], factors[..., 8:12]
    scale_factors = torch.cat([low & 63, (mixed & 15) | (low >> 6 << 4)], dim=-1)
    min_factors = torch.cat([high & 63, (mixed >> 4) | (high >> 6 << 4)], dim=-1)
    codes = _nibbles(blocks[..., -128:].view(*blocks.shape[:2], 4, 32)).view(*blocks.shape[:2], 8, 32)
    if blocks.shape[-1] == _BYTES["Q5_K"]:
        fifth = blocks[..., 16:48].unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8).unsqueeze(-1) & 1
        codes |= fifth << 4
    scales = _fp16(blocks[..., 0:2]).float() * scale_factors
    mins = _fp16(blocks[..., 2:4]).float() * -min_factors.float()
    return Groups(codes.flatten(1, 2), scales.flatten(1), mins.flatten(1), 0)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _fp16(pair: torch.Tensor) -> torch.Tensor:
    return pair.contiguous().view(torch.float16)
