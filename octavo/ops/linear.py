"""Linear layers over weights that stay quantised in memory.

Decoding one token reads every weight once, so a 4-bit weight makes it up to six times cheaper than an fp32 one. A
`QuantizedWeight` keeps GGUF's groups of 32 along the input axis, w = scale · (code − zero_point) + min, with the file's
own codes, but reordered for the CPU's dot-product instructions: blocks of 16 rows, each row with 4 neighbouring inputs
side by side. Activations are rounded on the fly to 16 bits per group of 32, as two bytes: 8 bits (llama.cpp's Q8_1)
move the default model's logits by tenths and with them greedy tokens; 16 bits move them less than fp16 would.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F

from octavo.ops.gguf_groups import GROUP, QTYPES, Groups, read_groups

ROWS = 16  # outputs of one block: the 32-bit lanes of a 512-bit register
QUAD = 4  # neighbouring inputs of a row that one lane's dot-product instruction takes


class QuantizedWeight:
    """A weight (out_features, in_features) of 4- or 8-bit codes on the CPU; immutable, in_features a multiple of 32.

    `codes` is uint8 (row_blocks, groups, 64 · bits): step s of a group holds inputs 4s … 4s + 3 of the block's 16 rows;
    4-bit codes keep step s in the low and step s + 4 in the high nibbles. `scales` and `mins` (None if there are none)
    are (row_blocks, groups, 16), fp16 as in the file or fp32 for the K types. Rows past out_features have scale 0.
    """

    QTYPES = QTYPES

    def __init__(self, qtype: str, shape: tuple[int, int], groups: Groups) -> None:
        """Packs `groups`, whose tensors are row-major; use `from_gguf` or `cat`."""
        self.qtype = qtype
        self.shape = shape
        self.bits = 4 if qtype.startswith("Q4") else 8
        self.zero_point = groups.zero_point
        self.codes = _pack_codes(groups.codes, self.bits)
        self.scales = _pack_rows(groups.scales)
        self.mins = None if groups.mins is None else _pack_rows(groups.mins)

    @classmethod
    def from_gguf(cls, raw: np.ndarray, qtype: str, shape: tuple[int, int]) -> Self:
        """A GGUF tensor's bytes (uint8, any shape) as a weight of `shape` (out_features, in_features); exact.

        Raises ValueError for a type outside `QTYPES` (dequantise such a tensor instead) or a size that does not fit.
        """
        return cls(qtype, shape, read_groups(raw, qtype, shape))

    @classmethod
    def cat(cls, weights: Sequence["QuantizedWeight"]) -> "QuantizedWeight":
        """Stacks weights of one type along their outputs: merges q, k and v, or gate and up, into one matrix."""
        kinds = {(w.qtype, w.shape[1]) for w in weights}
        if len(kinds) != 1:
            raise ValueError(
                f"weights: expected one qtype and in_features, got {sorted(kinds)}; dequantise them to merge"
            )
        ((qtype, in_features),) = kinds
        parts = [w._groups() for w in weights]
        mins = [p.mins for p in parts if p.mins is not None]
        groups = Groups(
            torch.cat([p.codes for p in parts]),
            torch.cat([p.scales for p in parts]),
            torch.cat(mins) if mins else None,
            parts[0].zero_point,
        )
        return QuantizedWeight(qtype, (sum(w.shape[0] for w in weights), in_features), groups)

    def __repr__(self) -> str:
        return f"QuantizedWeight({self.qtype}, {self.shape[0]}×{self.shape[1]}, {self.nbytes} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.mins) if t is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dense weight (out_features, in_features)."""
        return self._groups().dense().to(dtype)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Dense rows (*ids.shape, in_features): an embedding lookup that touches only those rows."""
        flat = ids.reshape(-1)
        block, lane = flat // ROWS, flat % ROWS
        steps = self.codes.view(*self.codes.shape[:2], -1, ROWS, QUAD)[block, :, :, lane].flatten(2)
        picked = Groups(
            _split_nibbles(steps) if self.bits == 4 else steps,
            self.scales[block, :, lane],
            None if self.mins is None else self.mins[block, :, lane],
            self.zero_point,
        )
        return picked.dense().to(dtype).view(*ids.shape, self.shape[1])

    def _groups(self) -> Groups:
        steps = self.codes.view(*self.codes.shape[:2], -1, ROWS, QUAD).permute(0, 3, 1, 2, 4)
        codes = steps.flatten(3).flatten(0, 1)[: self.shape[0]]
        return Groups(
            _split_nibbles(codes) if self.bits == 4 else codes,
            _unpack_rows(self.scales, self.shape[0]),
            None if self.mins is None else _unpack_rows(self.mins, self.shape[0]),
            self.zero_point,
        )


def linear(x: torch.Tensor, weight: QuantizedWeight | torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., in_features) @ weightᵀ + bias, in x's dtype: (..., out_features).

    A quantised weight multiplies x rounded to 16 bits per group of 32, with fp32 scales and sums: each x moves by at
    most 1/65024 of the largest |x| of its group. No gradient flows to x through a quantised weight.
    """
    if isinstance(weight, torch.Tensor):
        return F.linear(x, weight, bias)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected a last axis of {weight.shape[1]} for {weight!r}, got shape {tuple(x.shape)}")
    if x.device.type != "cpu" or weight.codes.device.type != "cpu":
        raise ValueError(
            f"x: a {weight.qtype} weight multiplies on the CPU, got x on {x.device}; dequantize() the weight"
        )
    from octavo.kernels.cpu.quant_linear import quant_linear  # brings llvmlite

    rows = x.detach().reshape(-1, x.shape[-1]).float().contiguous()
    missing = -weight.shape[0] % ROWS
    if bias is not None:
        bias = F.pad(bias.detach().float(), (0, missing))
    out = quant_linear(rows, weight.codes, weight.scales, weight.mins, weight.zero_point, weight.bits, bias)
    return out[:, : weight.shape[0]].to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(out, groups, 32) codes to (row_blocks, groups, 64 · bits) bytes."""
    blocks = _pad_rows(codes).view(-1, ROWS, codes.shape[1], GROUP // QUAD, QUAD).permute(0, 2, 3, 1, 4)
    if bits == 4:
        blocks = blocks[:, :, :4] | blocks[:, :, 4:] << 4
    return blocks.reshape(*blocks.shape[:2], -1)


def _split_nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _pack_rows(t: torch.Tensor) -> torch.Tensor:
    """(out, groups) to (row_blocks, groups, 16)."""
    return _pad_rows(t).view(-1, ROWS, t.shape[1]).transpose(1, 2).contiguous()


def _unpack_rows(t: torch.Tensor, out_features: int) -> torch.Tensor:
    return t.transpose(1, 2).flatten(0, 1)[:out_features]


def _pad_rows(t: torch.Tensor) -> torch.Tensor:
    missing = -t.shape[0] % ROWS
    return t if missing == 0 else torch.cat([t, t.new_zeros(missing, *t.shape[1:])])
