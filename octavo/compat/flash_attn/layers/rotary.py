"""`flash_attn.layers.rotary`: rotary embedding of q, of packed qkv and kv, and the module that keeps its tables."""

import torch
from torch import Tensor

from octavo.ops.rotary import apply_rotary


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x (B, S, H, D), or (T, H, D) packed by cu_seqlens, with its first 2·cos.shape[1] channels rotated.

    cos, sin: (max_position, rotary_dim / 2). seqlen_offsets: int or (B,), the position of each sequence's first token.
    With `inplace` x itself holds the result. Differentiable.
    """
    if cu_seqlens is None:
        steps = torch.arange(x.shape[1], device=x.device)
        positions = _offsets(seqlen_offsets, x.shape[0], x.device)[:, None] + steps
    else:
        tokens = torch.arange(x.shape[0], device=x.device)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens.to(cu_seqlens.dtype), right=True)
        starts = cu_seqlens[:-1] - _offsets(seqlen_offsets, cu_seqlens.shape[0] - 1, x.device)
        positions = tokens - starts[sequence]
    rotated = apply_rotary(x, cos, sin, positions, interleaved)
    return x.copy_(rotated) if inplace else rotated


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """qkv (B, S, 3, H, D), or (B, S, Hq + 2·Hkv, D) with num_heads_q, its q and k rotated in place."""
    if qkv.dim() == 5:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    elif num_heads_q is not None:
        num_heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + num_heads_k]
    else:
        raise ValueError("num_heads_q: expected the number of query heads with a 4-dimensional qkv, got None")
    apply_rotary_emb(q, cos, sin, interleaved, True, seqlen_offsets)
    cos_k, sin_k = (cos if cos_k is None else cos_k), (sin if sin_k is None else sin_k)
    apply_rotary_emb(k, cos_k, sin_k, interleaved, True, seqlen_offsets)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """kv (B, S, 2, H, D), its k rotated in place."""
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv


class RotaryEmbedding(torch.nn.Module):
    """Rotates qkv, or q and kv, in place by tables as long as the call needs.

    dim: channels that rotate. base: of the frequencies. interleaved: the layout. scale_base: XPos (Sun et al., "A
    Length-Extrapolatable Transformer", 2022): q grows and k shrinks by ((channel + 0.4·dim) / (1.4·dim)) raised to
    (position − half the tables' length) / scale_base, so that scores decay with distance. With a cache of keys give
    every call the same max_seqlen, which fixes that length.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        channels = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", self.base ** -(channels / dim), persistent=False)
        self.scale: Tensor | None
        scale = None if scale_base is None else (channels + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """qkv as `apply_rotary_emb_qkv_` takes it; with kv (B, S, 2, H, D), qkv is q (B, S, H, D) alone."""
        (cos, sin), (cos_k, sin_k) = self._tables(
            max_seqlen or qkv.shape[1] + int(torch.as_tensor(seqlen_offset).max()), qkv.device
        )
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q=num_heads_q
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)

    def _tables(self, length: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """(cos, sin), each (length, dim / 2), for q and for k."""
        positions = torch.arange(length, device=device, dtype=torch.float32)
        angles = torch.outer(positions, self.inv_freq)
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None or self.scale_base is None:
            return [(cos, sin), (cos, sin)]
        growth = self.scale ** ((positions - length // 2) / self.scale_base)[:, None]
        return [(cos * growth, sin * growth), (cos / growth, sin / growth)]


def _offsets(seqlen_offsets: int | Tensor, batch: int, device: torch.device) -> Tensor:
    return torch.as_tensor(seqlen_offsets, device=device).expand(batch)
