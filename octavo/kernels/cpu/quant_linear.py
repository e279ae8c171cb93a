"""y = x · Wᵀ (+ bias) for a `QuantizedWeight`: x is rounded to 16 bits per group of 32, products are summed as
integers.

With w = scale · (code − zero_point) + min and x ≈ a_scale · a, a group of 32 inputs adds
    scale · a_scale · Σ (code − zero_point) · a  +  min · a_scale · Σ a
and with a = 256 · high + low, two signed bytes, the inner loop is an int8 dot product, once over the high and once
over the low bytes; each group ends with one or two fp32 multiply-adds. One instruction takes four inputs of 16 rows
(the weight's packing) times four inputs of one token (a broadcast).

A tile of 8 tokens × 16 rows keeps its sums in registers while it runs over all groups. Threads share the pairs of row
blocks; a pair's codes (9 KB for 576 inputs of 4 bits) stay in the L1 cache for all tokens. One or two tokens are bound
by memory: then a tile takes both row blocks, which keeps more loads in flight.
"""

import functools

import torch

from octavo.kernels.cpu.jit import Kernel
from octavo.kernels.spec import Tensor

GROUP = 32
ROWS = 16
MAX_TOKENS = 8  # of a tile: a group's 8 vectors of codes, 8 integer and 8 fp32 sums fill 24 of 32 registers


def quant_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    mins: Tensor | None,
    zero_point: int,
    bits: int,
    bias: Tensor | None = None,
) -> Tensor:
    """x (T, in) fp32 contiguous, codes (row_blocks, groups, 64 · bits) uint8, scales and mins (row_blocks, groups, 16)
    fp16 or fp32, bias (row_blocks · 16,) fp32: (T, row_blocks · 16) fp32."""
    tokens, groups, row_blocks = x.shape[0], codes.shape[1], codes.shape[0]
    out = torch.empty(tokens, row_blocks * ROWS)
    workspace = torch.empty(workspace_bytes(tokens, groups), dtype=torch.uint8)
    kernel = _kernel(bits, mins is not None, scales.dtype == torch.float32)
    kernel(
        x.data_ptr(),
        tokens,
        groups,
        row_blocks,
        codes.data_ptr(),
        scales.data_ptr(),
        0 if mins is None else mins.data_ptr(),
        zero_point,
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        workspace.data_ptr(),
    )
    return out


def workspace_bytes(tokens: int, groups: int) -> int:
    """Of the rounded activations: high and low bytes, scales, sums, each (tokens, groups)."""
    return tokens * groups * (2 * GROUP + 4 + 4)


@functools.cache
def _kernel(bits: int, has_mins: bool, wide_scales: bool) -> Kernel:
    name = f"quant-linear-{bits}{'m' if has_mins else 'z'}{'32' if wide_scales else '16'}"

    def build():
        from octavo.kernels.cpu.quant_linear_code import make_kernel

        return make_kernel(bits, has_mins, wide_scales)

    return Kernel(name, build)
