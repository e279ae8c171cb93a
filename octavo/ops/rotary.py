"""Rotary position embedding of the tokens of a decode call, in both layouts (Su et al., "RoFormer", 2021)."""

import torch

from octavo.kernels.reference.rotary_cache import rotate as rotate
from octavo.kernels.spec import Tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
    """x (…, H, D) with its first 2·cos.shape[1] channels rotated by the angles of each token's position (…,).

    cos, sin: (max_position, rotary_dim / 2). `interleaved` pairs channels 0 and 1, 2 and 3, … (GPT-J); otherwise the
        first half
    with the second (GPT-NeoX). Computed in fp32, returned in x's dtype.
    """
    cos_x, sin_x = (table[positions.to(torch.int64)].to(torch.float32) for table in (cos, sin))
    return rotate(x, cos_x, sin_x, interleaved)
