"""The dropout mask as a function of (seed, batch, head, row, column): Philox-4x32-10, bit for bit Triton's `tl.rand`.

A counter-based generator lets every backend, in forward and backward and whatever its tiling, draw the same mask
without storing it (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

import torch

from octavo.kernels.spec import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_TO_UNIT = 4.6566127342e-10  # the largest float for which (2**31 - 1) · x < 1


def _multiply(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 × 32 bit product; int64 wraps, and both words survive that."""
    product = x * multiplier
    return (product >> 32) & _WORD, product & _WORD


def uniform(seed: int, offset: Tensor) -> Tensor:
    """`tl.rand(seed, offset)`: fp32 in [0, 1) for each int64 offset."""
    c0, c1 = offset & _WORD, (offset >> 32) & _WORD
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high_a, low_a = _multiply(c0, _MULTIPLIER_A)
        high_b, low_b = _multiply(c2, _MULTIPLIER_B)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _WEYL_A) & _WORD, (k1 + _WEYL_B) & _WORD
    folded = torch.where(c0 > 0x7FFFFFFF, _WORD - c0, c0)  # −x − 1 of a negative int32
    return folded.to(torch.float32) * _TO_UNIT


def dropout_keep(
    seed: int, p: float, heads: Tensor, rows: Tensor, columns: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> Tensor:
    """True where the probability is kept; `heads` holds b · Hq + h; the three int64 index tensors broadcast."""
    return uniform(seed, (heads * max_seqlen_q + rows) * max_seqlen_k + columns) >= p
