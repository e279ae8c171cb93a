"""What a request does to its logits before a token is drawn: bias, allowed tokens, bad words, min_tokens, penalties.

`TokenRules` holds the rules that few requests have, one object per sequence, applied row by row. `PenaltyTable` holds
what many may have at once, in tensors: it is updated by the one token per step that changed, never rebuilt.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from octavo.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.engine.request import Sequence as SequenceState

Tensor = torch.Tensor
_NEVER = float("-inf")


def bad_word_ids(words: Sequence[str], encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Token sequences that spell each word, at the beginning of a text and after a space."""
    spellings = [encode(text) for word in words for text in (word, " " + word.lstrip())]
    return [list(ids) for ids in dict.fromkeys(map(tuple, spellings)) if ids]


class TokenRules:
    """The tokens that one sequence must not, or should rather, produce. Owned by the sampler."""

    def __init__(
        self,
        params: SamplingParams,
        ending_token_ids: frozenset[int],
        vocab_size: int,
        device: torch.device,
        encode: Callable[[str], list[int]] | None,
    ) -> None:
        self._bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            ids, values = zip(*params.logit_bias.items(), strict=True)
            self._bias = torch.tensor(ids, device=device), torch.tensor(values, dtype=torch.float32, device=device)
        self._forbidden: Tensor | None = None  # (V,) bool
        if params.allowed_token_ids is not None:
            self._forbidden = torch.ones(vocab_size, dtype=torch.bool, device=device)
            self._forbidden[torch.tensor(params.allowed_token_ids, device=device)] = False
        if params.bad_words and encode is None:
            raise ValueError("bad_words: expected none without a tokenizer; use logit_bias with token ids")
        self._bad_words = bad_word_ids(params.bad_words, encode) if encode else []
        self._min_tokens = params.min_tokens
        self._ending = sorted(ending_token_ids) if params.min_tokens else []

    def __bool__(self) -> bool:
        return bool(self._bias or self._forbidden is not None or self._bad_words or self._ending)

    def apply(self, logits: Tensor, seq: "SequenceState") -> None:
        """Edits one row (V,) in place."""
        if self._bias is not None:
            logits.index_add_(0, *self._bias)
        if self._forbidden is not None:
            logits.masked_fill_(self._forbidden, _NEVER)
        forbidden = list(self._ending) if seq.num_output_tokens < self._min_tokens else []
        for word in self._bad_words:
            begun = len(word) - 1
            if begun <= seq.num_output_tokens and seq.token_ids[seq.num_tokens - begun :] == word[:-1]:
                forbidden.append(word[-1])
        if forbidden:
            logits[torch.tensor(forbidden, device=logits.device)] = _NEVER


def apply_bitmask(logits: Tensor, bitmask: Tensor) -> None:
    """Forbids, in one row (V,), every token whose bit is 0 in `bitmask`: int32 (ceil(V / 32),), lowest bit first."""
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = (bitmask.to(logits.device)[:, None] >> bits) & 1
    logits.masked_fill_(allowed.view(-1)[: len(logits)] == 0, _NEVER)


class PenaltyTable:
    """Token occurrences of the sequences that have penalties, one row each, 8 bytes per vocabulary entry.

    A row knows how many outputs it counted; a sequence that moved otherwise (fork, failed step) is counted afresh.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._scale = torch.empty(0, vocab_size, device=device)  # repetition_penalty where the token occurred, else 1
        self._counts = torch.empty(0, vocab_size, dtype=torch.int32, device=device)  # occurrences in the output
        self._owner: list[SequenceState | None] = []
        self._counted: list[int] = []
        self._free: list[int] = []

    def add(self, seq: "SequenceState") -> int:
        """A row for the sequence; give it back with `remove`."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._owner[row], self._counted[row] = seq, -1
        return row

    def remove(self, row: int) -> None:
        self._owner[row] = None
        self._free.append(row)

    def _grow(self) -> None:
        old, new = len(self._owner), max(4, 2 * len(self._owner))
        for name in ("_scale", "_counts"):
            tensor = getattr(self, name)
            grown = tensor.new_empty(new, tensor.shape[1])
            grown[:old] = tensor
            setattr(self, name, grown)
        self._owner += [None] * (new - old)
        self._counted += [-1] * (new - old)
        self._free += range(new - 1, old - 1, -1)

    def _count_afresh(self, row: int, seq: "SequenceState", repetition_penalty: float) -> None:
        output = np.array(seq.output_token_ids, dtype=np.int64)
        counts = np.bincount(output, minlength=self._counts.shape[1]).astype(np.int32)
        self._counts[row] = torch.from_numpy(counts).to(self._device)
        self._scale[row] = 1.0
        self._scale[row, torch.tensor(seq.token_ids, device=self._device)] = repetition_penalty
        self._counted[row] = len(output)

    def apply(self, logits: Tensor, rows: list[int], penalties: np.ndarray) -> Tensor:
        """Penalised copy of `logits` (N, V); `penalties` (N, 3): presence, frequency, repetition."""
        for row, repetition in zip(rows, penalties[:, 2], strict=True):
            seq = self._owner[row]
            assert seq is not None
            if self._counted[row] != seq.num_output_tokens:
                self._count_afresh(row, seq, float(repetition))
        index = torch.tensor(rows, device=self._device)
        presence, frequency, _ = torch.from_numpy(penalties.astype(np.float32)).to(self._device)[:, :, None].unbind(1)
        if (penalties[:, 2] != 1).any():
            scale = self._scale[index]
            logits = torch.where(logits > 0, logits / scale, logits * scale)
        if penalties[:, :2].any():
            counts = self._counts[index]
            logits = logits - frequency * counts - presence * (counts > 0)
        return logits

    def record(self, rows: list[int], token_ids: Tensor, repetition_penalties: np.ndarray) -> None:
        """Counts the one new token (N,) of each row."""
        index = torch.tensor(rows, device=self._device)
        self._counts[index, token_ids] += 1
        self._scale[index, token_ids] = torch.from_numpy(repetition_penalties.astype(np.float32)).to(self._device)
        for row in rows:
            self._counted[row] += 1
