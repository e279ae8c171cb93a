"""The shape of one batch over a paged cache, as data: an argument of every attention layer, never a global."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """One step's packed batch: B sequences, T = sum of their new tokens, decode rows and prefill chunks mixed.

    The same object serves all layers of a step; a CUDA graph reuses one whose tensors are static.
    """

    cu_seqlens_q: torch.Tensor  # (B + 1,) int32, prefix sums of new tokens
    cache_seqlens: torch.Tensor  # (B,) int32, keys in the cache once this step's are stored (context + new tokens)
    block_table: torch.Tensor  # (B, max_blocks) int32; entries past a sequence's last block are never read
    slot_mapping: torch.Tensor  # (T,) int64, block · block_size + offset of each new token; negative: not stored
    max_seqlen_q: int
    max_seqlen_k: int
    starts_empty: bool = False  # known that no sequence had keys before this step; False is always allowed
