"""What one attention layer keeps of the past: paged keys and values, or paged latents, behind one small protocol.

A layer writes its new tokens with `store` and reads everything with `attend`; both go through `octavo.ops`, so that the
same module runs on any backend. The tensors belong to whoever allocated them: the engine for all its sequences, or
`make_caches` for a library user with one sequence per batch row.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.ops.metadata import AttentionMetadata
from octavo.ops.rotary_cache import HeadNorm, Rotary


class LayerCache(Protocol):
    """What every layer's cache can say about itself."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The storage, each (num_blocks, block_size, …): what a copy-on-write has to copy block by block."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in this layer."""
        ...


@dataclass(frozen=True, slots=True)
class LayerKVCache:
    """Keys (num_blocks, block_size, Hkv, D) and values (num_blocks, block_size, Hkv, Dv) of one layer."""

    k: Tensor
    v: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.k, self.v

    @property
    def bytes_per_token(self) -> int:
        return _bytes_per_token(self.tensors)

    def store(self, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> None:
        """Write k (T, Hkv, D) and v (T, Hkv, Dv) of the step's new tokens into their slots."""
        ops.store_kv_cache(k, v, self.k, self.v, metadata.slot_mapping)

    def rotate_and_store(
        self, qkv: Tensor, num_heads: int, rotary: Rotary | None, norm: HeadNorm | None, metadata: AttentionMetadata
    ) -> Tensor:
        """From the merged projection (T, (Hq + 2·Hkv)·D): k and v go into their slots; returns q (T, Hq, D)."""
        return ops.rotate_and_store(qkv, num_heads, rotary, self.k, self.v, metadata.slot_mapping, norm=norm)

    def attend(
        self,
        q: Tensor,
        metadata: AttentionMetadata,
        *,
        softmax_scale: float,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        learnable_sink: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Causal attention of q (T, Hq, D) over each sequence's cache; returns (T, Hq, Dv)."""
        return ops.paged_attention(
            q,
            self.k,
            self.v,
            metadata,
            softmax_scale=softmax_scale,
            window_size=window_size,
            softcap=softcap,
            learnable_sink=learnable_sink,
            backend=backend,
        )


@dataclass(frozen=True, slots=True)
class LayerLatentCache:
    """Compressed latents and their rotary keys, (num_blocks, block_size, R + rope), of one MLA layer."""

    latent: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.latent,)

    @property
    def bytes_per_token(self) -> int:
        return _bytes_per_token(self.tensors)

    def store(self, latent: Tensor, metadata: AttentionMetadata) -> None:
        """Write latent (T, R + rope) of the step's new tokens into their slots."""
        ops.store_latent_cache(latent, self.latent, metadata.slot_mapping)

    def absorb_and_store(
        self,
        latent: Tensor,
        q: Tensor,
        up_k: Tensor,
        norm_weight: Tensor,
        norm_eps: float,
        rotary: Rotary,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """From the projections: latent (T, R + rope), normalised and turned, goes into its slots; of q (T, H, nope +
        rope) and up_k (H, nope, R) the absorbed queries (T, H, R + rope) come back."""
        slots = metadata.slot_mapping
        return ops.absorb_and_store(latent, q, up_k, norm_weight, rotary, self.latent, slots, eps=norm_eps)

    def attend(
        self,
        q: Tensor,
        metadata: AttentionMetadata,
        *,
        head_dim_v: int,
        softmax_scale: float,
        backend: str | None = None,
    ) -> Tensor:
        """Causal attention of absorbed queries (T, Hq, R + rope) over the latents; returns (T, Hq, head_dim_v = R)."""
        return ops.mla_attention(q, self.latent, head_dim_v, metadata, softmax_scale, backend=backend)


class HasCache(Protocol):
    """An attention module that can make its own cache."""

    def new_cache(
        self,
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LayerKVCache | LayerLatentCache: ...


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward pass over `PagedRows` needs beside its tokens."""

    positions: Tensor  # (T,) int64
    metadata: AttentionMetadata


class PagedRows:
    """One growing sequence per batch row over paged caches: the block table of generation without the engine.

    Row b owns blocks b·n … b·n + n − 1, n = ceil(max_length / block_size). `append` says where the next tokens go.
    """

    def __init__(
        self, batch_size: int, max_length: int, *, block_size: int = 16, device: torch.device | str | None = None
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_length", max_length), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.max_length = max_length
        self.block_size = block_size
        self.lengths = [0] * batch_size
        blocks_per_row = math.ceil(max_length / block_size)
        self.num_blocks = batch_size * blocks_per_row
        table = torch.arange(self.num_blocks, dtype=torch.int32, device=device)
        self.block_table = table.view(batch_size, blocks_per_row)

    def append(self, num_new: int | Sequence[int]) -> Step:
        """Make room for `num_new` tokens in every row (or one number per row); the rows' tokens are packed in order."""
        counts = [num_new] * len(self.lengths) if isinstance(num_new, int) else list(num_new)
        if len(counts) != len(self.lengths):
            raise ValueError(f"num_new must have one entry per row ({len(self.lengths)}), got {len(counts)}")
        lengths = [old + new for old, new in zip(self.lengths, counts, strict=True)]
        if max(lengths) > self.max_length:
            raise ValueError(
                f"num_new: a row would reach {max(lengths)} tokens, max_length is {self.max_length}; "
                "make the caches with a larger max_length"
            )
        device = self.block_table.device
        positions = torch.cat([torch.arange(a, b, device=device) for a, b in zip(self.lengths, lengths, strict=True)])
        first_slots = torch.arange(len(counts), device=device) * (self.block_table.shape[1] * self.block_size)
        offsets = torch.repeat_interleave(first_slots, torch.tensor(counts, device=device), output_size=len(positions))
        self.lengths = lengths
        return Step(
            positions,
            AttentionMetadata(
                cu_seqlens_q=torch.tensor([0, *counts], device=device).cumsum(0, dtype=torch.int32),
                cache_seqlens=torch.tensor(lengths, dtype=torch.int32, device=device),
                block_table=self.block_table,
                slot_mapping=positions + offsets,
                max_seqlen_q=max(counts),
                max_seqlen_k=max(lengths),
                starts_empty=lengths == counts,
            ),
        )


def make_caches(
    layers: nn.Module | Iterable[HasCache],
    batch_size: int,
    max_length: int,
    *,
    block_size: int = 16,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[PagedRows, list[LayerKVCache | LayerLatentCache]]:
    """Caches for generation without the engine: the rows' block table and one cache per attention layer.

    `layers` is a model (its attention layers are taken in order) or the attention layers themselves; dtype and device
    default to theirs. Use:

        rows, caches = make_caches(model, batch_size=2, max_length=128)
        step = rows.append(prompt.shape[1])
        hidden = attention(x.flatten(0, 1), step.positions, caches[0], step.metadata)
    """
    found = [m for m in layers.modules() if hasattr(m, "new_cache")] if isinstance(layers, nn.Module) else list(layers)
    if not found:
        raise ValueError("layers holds no attention layer with a cache (no module with `new_cache`)")
    num_blocks = max(1, math.ceil(max_length / block_size)) * batch_size
    caches = [layer.new_cache(num_blocks, block_size, dtype=dtype, device=device) for layer in found]  # type: ignore[operator]
    rows = PagedRows(batch_size, max_length, block_size=block_size, device=caches[0].tensors[0].device)
    return rows, caches


def _bytes_per_token(tensors: Iterable[Tensor]) -> int:
    return sum(math.prod(t.shape[2:]) * t.element_size() for t in tensors)
