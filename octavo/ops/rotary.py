"""Rotary position embedding of the tokens of a decode call, in both layouts (Su et al., "RoFormer", 2021)."""

import torch

from octavo.kernels.spec import Tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
    """x (…, H, D) with its first 2·cos.shape[1] channels rotated by the angles of each token's position (…,).

    cos, sin: (max_position, rotary_dim / 2). `interleaved` pairs channels 0 and 1, 2 and 3, … (GPT-J); otherwise the
        first half
    with the second (GPT-NeoX). Computed in fp32, returned in x's dtype.
    """
    cos_x, sin_x = (table[positions.to(torch.int64)].to(torch.float32) for table in (cos, sin))
    return rotate(x, cos_x, sin_x, interleaved)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x (…, H, D) with its first 2·cos.shape[-1] channels turned by the angles of cos and sin (…, rotary_dim / 2) fp32.

    Computed in fp32 (fp64 for fp64 inputs), rounded once to x's dtype.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    rotary_dim = 2 * cos.shape[-1]
    turned = x[..., :rotary_dim]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    out = out.to(x.dtype)
    return out if rotary_dim == x.shape[-1] else torch.cat((out, x[..., rotary_dim:]), dim=-1)
