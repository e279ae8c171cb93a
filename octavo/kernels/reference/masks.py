"""Which keys a query sees, and the additive terms of its scores, as dense tensors over (B, Hq, Sq, Sk)."""

import torch

from octavo.kernels.spec import AttentionSpec, Tensor


def offsets_from_diagonal(seqlens_q: Tensor, seqlens_k: Tensor, sq: int, sk: int) -> Tensor:
    """`j − (i + Sk − Sq)` of each query i and key j, (B, 1, sq, sk) int64: 0 on the bottom-right aligned diagonal."""
    rows = torch.arange(sq, device=seqlens_q.device)[:, None]
    columns = torch.arange(sk, device=seqlens_q.device)[None, :]
    shift = (seqlens_k - seqlens_q).to(torch.int64)
    return (columns - rows) - shift[:, None, None, None]


def visible(spec: AttentionSpec, diagonal: Tensor, rows_used: Tensor, keys_used: Tensor) -> Tensor:
    """(B, 1, sq, sk) bool: key j of the used keys (B, sk) is in the window of row i of the used rows (B, sq)."""
    mask = rows_used[:, None, :, None] & keys_used[:, None, None, :]
    if spec.window_left >= 0:
        mask = mask & (diagonal >= -spec.window_left)
    if spec.window_right >= 0:
        mask = mask & (diagonal <= spec.window_right)
    return mask


def alibi(slopes: Tensor, diagonal: Tensor) -> Tensor:
    """`−slope · |i + Sk − Sq − j|`, (B or 1, Hq, sq, sk), from slopes (Hq,) or (B, Hq)."""
    slopes = slopes.reshape(-1, slopes.shape[-1])[:, :, None, None]
    return -slopes * diagonal.abs().to(slopes.dtype)
