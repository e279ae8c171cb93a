"""Rotary position embedding of the tokens of a decode call, in both layouts (Su et al., "RoFormer", 2021)."""

import torch

from octavo.kernels.spec import Tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
    """x (…, H, D) with its first 2·cos.shape[1] channels rotated by the angles of each token's position (…,).

    cos, sin: (max_position, rotary_dim / 2). `interleaved` pairs channels 0 and 1, 2 and 3, … (GPT-J); otherwise the
        first half
    with the second (GPT-NeoX). Computed in fp32, returned in x's dtype.
    """
    rotary_dim = 2 * cos.shape[-1]
    cos_x, sin_x = (table[positions.to(torch.int64)].to(torch.float32).unsqueeze(-2) for table in (cos, sin))
    rotated = x[..., :rotary_dim].to(torch.float32)
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, dim=-1)
    pair = (first * cos_x - second * sin_x, second * cos_x + first * sin_x)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned.to(x.dtype), x[..., rotary_dim:]], dim=-1)
