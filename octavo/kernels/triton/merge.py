"""Attention over parts of the keys, merged: outputs weighted by exp(LSE_part − LSE), two at a time in one pass."""

from collections.abc import Sequence
from functools import reduce

import torch
import triton
import triton.language as tl

from octavo.kernels.spec import Tensor


@triton.jit
def merge_kernel(
    out_a, lse_a, out_b, lse_b, out, lse, rows, heads, total,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_R (row, head) pairs of contiguous outs (B, S, H, WIDTH) and LSEs (B, H, S)."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    used = r < total
    h = r % heads
    row = r // heads
    at_lse = (row // rows * heads + h) * rows + row % rows
    a = tl.load(lse_a + at_lse, mask=used, other=float("-inf"))
    b = tl.load(lse_b + at_lse, mask=used, other=float("-inf"))
    m = tl.maximum(a, b)
    m = tl.where(m == float("-inf"), 0.0, m)
    weight_a = tl.exp(a - m)
    weight_b = tl.exp(b - m)
    total_weight = weight_a + weight_b
    safe = tl.where(total_weight == 0.0, 1.0, total_weight)
    tl.store(lse + at_lse, tl.where(total_weight == 0.0, float("-inf"), m + tl.log(safe)), mask=used)
    d = tl.arange(0, BLOCK_D)[None, :]
    at = r[:, None] * WIDTH + d
    # a part that saw nothing may hold garbage, and 0 · NaN is NaN: it is not read
    part_a = tl.load(out_a + at, mask=(weight_a > 0)[:, None] & (d < WIDTH), other=0.0).to(tl.float32)
    part_b = tl.load(out_b + at, mask=(weight_b > 0)[:, None] & (d < WIDTH), other=0.0).to(tl.float32)
    merged = part_a * (weight_a / safe)[:, None] + part_b * (weight_b / safe)[:, None]
    tl.store(out + at, merged.to(out.dtype.element_ty), mask=used[:, None] & (d < WIDTH))


def refuses_merge_attention_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> str | None:
    """Why this backend cannot take the call, or None."""
    dtypes = {x.dtype for x in lses}
    return None if dtypes == {torch.float32} else f"it takes float32 LSEs, not {dtypes}"


def merge_attention_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Outs (…, S, H, D) with LSEs (…, H, S) → `(out, softmax_lse)`; parts that saw nothing (−inf) weigh 0."""
    dtype = outs[0].dtype
    states = list(zip(outs, lses, strict=True))
    if len(states) == 1:
        states.append((torch.zeros_like(outs[0]), torch.full_like(lses[0], -torch.inf)))
    elif len(states) > 2:  # rounded once: between steps the output stays in fp32
        states[0] = (outs[0].float(), lses[0])
    out, lse = reduce(_merge_two, states)
    return out.to(dtype), lse


def _merge_two(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    out_a, lse_a, out_b, lse_b = (x.contiguous() for x in (*a, *b))
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    rows, heads, width = out.shape[-3:]
    total = lse.numel()
    block_d = max(16, triton.next_power_of_2(width))
    block_r = max(1, 2048 // block_d)
    if total and width:
        merge_kernel[(triton.cdiv(total, block_r),)](
            out_a, lse_a, out_b, lse_b, out, lse, rows, heads, total,
            WIDTH=width, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out, lse
