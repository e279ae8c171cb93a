"""From padded batches to packed tokens and back."""

import torch
from torch import Tensor


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` of x along its first axis."""
    return x[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros (first_axis_dim, …) with `values` at `indices`."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_put((indices,), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of hidden_states (B, S, …) that the masks select, packed.

    attention_mask (B, S): true or 1 for tokens in use; unused_mask (B, S): for tokens that keep their place unused.
    Returns tokens (T, …), their indices in (B · S), cu_seqlens (B + 1,) int32, the longest length, and the number of
    tokens in use of each sequence (B,) int32.
    """
    placed = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = placed.sum(dim=-1, dtype=torch.int32)
    indices = placed.flatten().nonzero().flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _prefix_sums(lengths), int(lengths.max()), attention_mask.sum(dim=-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """As `unpad_input` for rows that hold several short sequences one after another.

    attention_mask_in_length (B, S) holds the lengths of a row's sequences, then zeros: [2, 3, 0, 0, 0, 0] is a
    sequence of 2 tokens, one of 3, and a token of padding. Returns tokens, indices, cu_seqlens and the longest length.
    """
    lengths = attention_mask_in_length[attention_mask_in_length > 0].to(torch.int32)
    columns = torch.arange(attention_mask_in_length.shape[-1], device=attention_mask_in_length.device)
    used = columns < attention_mask_in_length.sum(dim=-1, keepdim=True)
    indices = used.flatten().nonzero().flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _prefix_sums(lengths), int(lengths.max())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The tokens (T, …) back at their indices in (batch, seqlen, …); 0 elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).view(batch, seqlen, *hidden_states.shape[1:])


def _prefix_sums(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))
