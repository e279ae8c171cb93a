"""What a request does to its logits before a token is drawn: bias, allowed tokens, bad words, min_tokens, penalties.

`TokenRules` holds the rules that few requests have, one object per sequence, applied row by row. `PenaltyTable` holds
what many may have at once, in arrays: it is updated by the one token per step that changed, never rebuilt.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.engine.sampling_params import SamplingParams
from octavo.engine.transfer import to_device

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
        forbidden = list(self._ending) if seq.num_sampled_tokens < self._min_tokens else []
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


def _with_pending(tokens: Tensor, counts: Tensor, pending: Tensor) -> tuple[Tensor, Tensor]:
    """One occurrence more of `pending` (N, 1), in a column of its own beside those of tokens and counts (N, W). A token
    that stands in two columns has the same count in both."""
    counts = counts + (tokens == pending)
    known = torch.where(tokens == pending, counts, 0).amax(1, keepdim=True)
    none = pending < 0
    tokens = torch.cat((tokens, torch.where(none, tokens[:, :1], pending)), 1)
    return tokens, torch.cat((counts, torch.where(none, counts[:, :1], known.clamp(min=1))), 1)


class PenaltyTable:
    """The distinct tokens of the sequences that have penalties, a row each, with their occurrences in the output.

    A penalty touches the few hundred tokens that a sequence holds, so only their logits are gathered, changed and put
    back; going over a whole vocabulary would take 30 times as long. A row knows how many outputs it counted; a sequence
    that moved otherwise (fork, failed step) is counted afresh. Lives on the host, in NumPy.
    """

    def __init__(self, vocab_size: int) -> None:
        self._column = np.empty((0, vocab_size), dtype=np.int32)  # where a token stands in its row, −1 nowhere
        self._tokens = np.empty((0, 256), dtype=np.int64)
        self._counts = np.empty((0, 256), dtype=np.int32)  # occurrences in the output; 0 of prompt tokens
        self._lengths = np.empty(0, dtype=np.int64)
        self._counted = np.empty(0, dtype=np.int64)
        self._owner: list[SequenceState | None] = []
        self._free: list[int] = []

    def add(self, seq: "SequenceState") -> int:
        """A row for the sequence; give it back with `remove`."""
        if not self._free:
            self._add_rows()
        row = self._free.pop()
        self._owner[row], self._counted[row] = seq, -1
        return row

    def remove(self, row: int) -> None:
        self._owner[row] = None
        self._free.append(row)

    def apply(
        self,
        logits: Tensor,
        batch_rows: Tensor,
        rows: NDArray[np.int64],
        penalties: Tensor,
        pending: Tensor | None = None,
    ) -> None:
        """Changes rows `batch_rows` (N,) of `logits`; `penalties` (N, 3): presence, frequency, repetition. `pending`
        (N,) int64: each sequence's newest token, when only the device knows it and it is not counted yet; −1: none."""
        for row in rows:
            seq = self._owner[row]
            assert seq is not None
            if self._counted[row] != len(seq.token_ids) - seq.num_prompt_tokens:
                self._count_afresh(row, seq)
        width = np.arange(self._lengths[rows].max())
        columns = np.where(width < self._lengths[rows, None], width, 0)  # the first token again, with the same result
        tokens = to_device(self._tokens[rows[:, None], columns], logits.device)
        counts = to_device(self._counts[rows[:, None], columns], logits.device)
        if pending is not None:
            tokens, counts = _with_pending(tokens, counts, pending[:, None])
        presence, frequency, repetition = penalties[:, :, None].unbind(1)
        x = logits[batch_rows[:, None], tokens]
        x = torch.where(x > 0, x / repetition, x * repetition)
        logits[batch_rows[:, None], tokens] = x - frequency * counts - presence * (counts > 0)

    def record(self, rows: NDArray[np.int64], sequences: "list[SequenceState]", token_ids: NDArray[np.int64]) -> None:
        """Counts the one new token (N,) of each row, if it is still that sequence's: a row may have been given on while
        the step was in flight."""
        still = np.fromiter([self._owner[row] is seq for row, seq in zip(rows, sequences, strict=True)], np.bool_)
        rows, token_ids = rows[still], token_ids[still]
        columns = self._column[rows, token_ids].astype(np.int64)
        new = columns < 0
        if new.any():
            fresh = rows[new]
            columns[new] = self._lengths[fresh]
            self._reserve(int(columns.max()) + 1)
            self._column[fresh, token_ids[new]] = columns[new]
            self._tokens[fresh, columns[new]] = token_ids[new]
            self._counts[fresh, columns[new]] = 0
            self._lengths[fresh] += 1
        self._counts[rows, columns] += 1
        self._counted[rows] += 1

    def _count_afresh(self, row: int, seq: "SequenceState") -> None:
        tokens = np.unique(np.array(seq.token_ids, dtype=np.int64))
        output = np.array(seq.output_token_ids, dtype=np.int64)
        self._reserve(len(tokens))
        self._column[row] = -1
        self._column[row, tokens] = np.arange(len(tokens))
        self._tokens[row, : len(tokens)] = tokens
        self._counts[row, : len(tokens)] = np.bincount(self._column[row, output], minlength=len(tokens))
        self._lengths[row], self._counted[row] = len(tokens), len(output)

    def _add_rows(self) -> None:
        old, new = len(self._owner), max(4, len(self._owner))
        for name in ("_column", "_tokens", "_counts", "_lengths", "_counted"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.zeros((new, *array.shape[1:]), dtype=array.dtype)]))
        self._owner += [None] * new
        self._free += range(old + new - 1, old - 1, -1)

    def _reserve(self, width: int) -> None:
        """Room for `width` distinct tokens in each row."""
        if width > (old := self._tokens.shape[1]):
            extra = max(width, 2 * old) - old
            self._tokens = np.pad(self._tokens, ((0, 0), (0, extra)))
            self._counts = np.pad(self._counts, ((0, 0), (0, extra)))
