"""Packed (T, H, D) and padded (B, S, H, D) forms of the same sequences, and pages gathered into the padded form."""

import torch

from octavo.kernels.spec import Tensor


def lengths(cu_seqlens: Tensor) -> Tensor:
    """(B,) lengths from (B + 1,) prefix sums."""
    return cu_seqlens[1:] - cu_seqlens[:-1]


def used(seqlens: Tensor, size: int, leftpad: Tensor | None = None) -> Tensor:
    """(B, size) bool: positions before each length and, if given, from each leftpad on."""
    positions = torch.arange(size, device=seqlens.device)
    mask = positions < seqlens[:, None]
    return mask if leftpad is None else mask & (positions >= leftpad[:, None])


def pad(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """(T, …) to (B, max_seqlen, …); padding holds copies of some row, so mask it."""
    if x.shape[0] == 0:
        return x.new_zeros(cu_seqlens.shape[0] - 1, max_seqlen, *x.shape[1:])
    index = cu_seqlens[:-1, None].to(torch.int64) + torch.arange(max_seqlen, device=x.device)
    return x[index.clamp(max=x.shape[0] - 1)]


def unpad(x: Tensor, cu_seqlens: Tensor, total: int, outside: float = 0.0) -> Tensor:
    """(B, S, …) to (total, …); rows of no sequence, and those past S, hold `outside`."""
    if x.shape[0] == 0 or x.shape[1] == 0:
        return x.new_full((total, *x.shape[2:]), outside)
    token = torch.arange(total, device=x.device)
    batch = torch.searchsorted(cu_seqlens[1:].to(torch.int64).contiguous(), token, right=True)
    inside = batch < x.shape[0]
    batch = batch.clamp(max=x.shape[0] - 1)
    position = token - cu_seqlens[batch]
    inside = inside & (position < x.shape[1])
    rows = x[batch, position.clamp(0, x.shape[1] - 1)]
    return rows.masked_fill(~inside.reshape(-1, *[1] * (x.dim() - 2)), outside)


def gather_pages(cache: Tensor, block_table: Tensor, seqlens: Tensor) -> Tensor:
    """Pages (num_blocks, P, …) of each sequence side by side, (B, max_blocks · P, …); entries past a length are not
    read.
    """
    block_size = cache.shape[1]
    first_position = torch.arange(block_table.shape[1], device=cache.device) * block_size
    table = torch.where(first_position < seqlens[:, None], block_table, 0)
    return cache[table.to(torch.int64)].flatten(1, 2)
