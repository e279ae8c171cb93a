"""One step on the device: the scheduler's decision as tensors, the model, the logits of the rows that sample, the
tokens.

The block tables live in one array with a row per sequence; a step writes only the entries that are new. Everything else
of a batch is computed with NumPy over all sequences at once, since a decode step has no time for Python per sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.engine.kv_cache import PagedKVCache
from octavo.engine.outputs import Logprob
from octavo.engine.request import Sequence
from octavo.engine.sampler import Sampler, token_logprobs, top_logprobs
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import PromptChunkLogprobs, ScheduledSequence, SchedulerOutput, StepResult
from octavo.models.causal_lm import CausalLM
from octavo.ops.metadata import AttentionMetadata

_PROMPT_LOGPROB_ROWS = 128  # positions whose logits exist at a time: 128 · 150k · 4 bytes = 77 MB


class BlockTables:
    """The block table of every sequence in the batch, as rows of one int32 array that is updated by differences."""

    def __init__(self, max_num_seqs: int, max_blocks: int) -> None:
        self._table = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._filled = np.zeros(max_num_seqs, dtype=np.int64)  # leading entries of each row that are right
        self._row_of: dict[int, int] = {}
        self._free = list(range(max_num_seqs - 1, -1, -1))
        self._sequences: list[Sequence] = []
        self._rows = np.empty(0, dtype=np.int64)

    def update(self, sequences: list[Sequence], rewritten: bool) -> NDArray[np.int32]:
        """(B, most blocks) for these sequences in order. `rewritten`: entries that were right may have changed."""
        if sequences != self._sequences:
            self._change_batch(sequences)
        if rewritten:
            self._filled[self._rows] = 0
        lengths = np.fromiter([len(seq.block_table) for seq in sequences], np.int64, len(sequences))
        for i in np.flatnonzero(self._filled[self._rows] != lengths):
            row, filled = self._rows[i], self._filled[self._rows[i]]
            self._table[row, filled : lengths[i]] = sequences[i].block_table[filled:]
            self._filled[row] = lengths[i]
        return self._table[self._rows, : lengths.max()]

    def grow(self, indices: NDArray[np.int64], num_columns: int) -> NDArray[np.int32]:
        """The same batch again, where only the sequences at `indices` took another block."""
        for i in indices:
            row, blocks = self._rows[i], self._sequences[i].block_table
            self._table[row, self._filled[row] : len(blocks)] = blocks[self._filled[row] :]
            self._filled[row] = len(blocks)
        return self._table[self._rows, :num_columns]

    def _change_batch(self, sequences: list[Sequence]) -> None:
        """Keeps the rows of those that stay; nothing is kept for the others, so a preempted sequence is read afresh."""
        old = self._row_of
        new: dict[int, int] = {}
        arrived = []
        for seq in sequences:
            row = old.pop(seq.seq_id, None)
            if row is None:
                arrived.append(seq.seq_id)
            else:
                new[seq.seq_id] = row
        self._free += old.values()
        for seq_id in arrived:
            new[seq_id] = row = self._free.pop()
            self._filled[row] = 0
        self._row_of = new
        self._sequences = sequences
        self._rows = np.fromiter([new[seq.seq_id] for seq in sequences], np.int64, len(sequences))


def _new_tokens(entry: ScheduledSequence) -> list[int]:
    start = entry.seq.num_computed_tokens
    return entry.seq.token_ids[start : start + entry.num_new_tokens]


@dataclass(slots=True)
class _SteadyBatch:
    """A step that only decoded. If the next schedules the same sequences, it follows from this one."""

    scheduled: tuple[ScheduledSequence, ...]
    starts: NDArray[np.int64]  # (B,) position of the step's token
    token_ids: NDArray[np.int64]  # (B,) of the step; once it is sampled, of the next


class ModelRunner:
    """Executes steps. Owns model, cache, sampler; not thread-safe: one step at a time.

    Args:
        max_num_seqs, max_model_len: bounds of the scheduler's steps.
    """

    def __init__(
        self, model: CausalLM, kv_cache: PagedKVCache, sampler: Sampler, *, max_num_seqs: int, max_model_len: int
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.sampler = sampler
        self._device = kv_cache.layers[0].tensors[0].device
        self._tables = BlockTables(max_num_seqs, -(-max_model_len // kv_cache.block_size))
        self._steady: _SteadyBatch | None = None

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput, token_bitmasks: Mapping[int, torch.Tensor] | None = None) -> StepResult:
        """Runs one step as `octavo.engine.step` tells it. `token_bitmasks`: see `Sampler.sample`."""
        scheduled = output.scheduled
        if not scheduled:
            return StepResult([])
        self.kv_cache.copy_blocks(output.block_copies)
        token_ids, positions, metadata = self._batch(output)
        steady, self._steady = self._steady, None  # what a step that fails leaves behind is not to be built upon
        hidden = self.model(token_ids, positions, self.kv_cache.layers, metadata)
        if steady is not None:
            tokens = self.sampler.sample(self.model.compute_logits(hidden), scheduled, token_bitmasks)
            steady.token_ids = np.array(tokens.token_ids, dtype=np.int64)
            self._steady = steady
            return StepResult(tokens.token_ids, tokens.logprobs, tokens.top_logprobs)
        prompt_logprobs = self._prompt_logprobs(scheduled, hidden)
        sampling = [entry for entry in scheduled if entry.num_samples]
        if not sampling:
            return StepResult([], prompt_logprobs=prompt_logprobs)
        if len(sampling) < len(hidden):
            hidden = hidden[self._last_rows(scheduled)]
        tokens = self.sampler.sample(self.model.compute_logits(hidden), sampling, token_bitmasks)
        return StepResult(tokens.token_ids, tokens.logprobs, tokens.top_logprobs, prompt_logprobs)

    def _batch(self, output: SchedulerOutput) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
        """token_ids, positions and metadata of a step; sets `_steady` when the next one may build upon it."""
        steady = self._steady
        if steady is not None and steady.scheduled == output.scheduled and not output.block_copies:
            return self._next_batch(steady)
        sequences = [entry.seq for entry in output.scheduled]
        table = self._tables.update(sequences, rewritten=bool(output.block_copies))
        size = len(sequences)
        starts = np.fromiter([seq.num_computed_tokens for seq in sequences], np.int64, size)
        counts = np.fromiter([entry.num_new_tokens for entry in output.scheduled], np.int64, size)
        token_ids = np.array(list(chain.from_iterable(_new_tokens(entry) for entry in output.scheduled)))
        rows = np.repeat(np.arange(size), counts)
        ends = counts.cumsum()
        positions = np.arange(ends[-1]) + (starts - ends + counts)[rows]
        decodes = all(entry is entry.seq.decode_entry for entry in output.scheduled)
        beams = any(seq.request.is_beam_search for seq in sequences)  # their next tokens are chosen elsewhere
        self._steady = _SteadyBatch(output.scheduled, starts, token_ids) if decodes and not beams else None
        return self._tensors(token_ids, positions, table, rows, starts, counts)

    def _next_batch(self, steady: "_SteadyBatch") -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
        """Each sequence goes on by the token that it was given."""
        steady.starts = starts = steady.starts + 1
        assert starts[0] == steady.scheduled[0].seq.num_computed_tokens, "a steady batch advances by one token"
        block_size = self.kv_cache.block_size
        crossing = np.flatnonzero(starts % block_size == 0)
        table = self._tables.grow(crossing, int(starts.max()) // block_size + 1)
        return self._tensors(steady.token_ids, starts, table, np.arange(len(starts)), starts, np.ones_like(starts))

    def _tensors(
        self,
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        table: NDArray[np.int32],
        rows: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
        """Per token (T,): token_ids, positions, rows (its sequence); per sequence (B,): table, starts, counts."""
        block_size = self.kv_cache.block_size
        slots = table[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size
        cu_seqlens = np.zeros(len(counts) + 1, dtype=np.int32)
        counts.cumsum(out=cu_seqlens[1:])
        cache_seqlens = starts + counts
        metadata = AttentionMetadata(
            cu_seqlens_q=self._put(cu_seqlens),
            cache_seqlens=self._put(cache_seqlens.astype(np.int32)),
            block_table=self._put(table),
            slot_mapping=self._put(slots),
            max_seqlen_q=int(counts.max()),
            max_seqlen_k=int(cache_seqlens.max()),
        )
        return self._put(token_ids), self._put(positions), metadata

    def _put(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def _last_rows(self, scheduled: tuple[ScheduledSequence, ...]) -> torch.Tensor:
        """The packed row of the last token of each entry that samples."""
        ends = np.fromiter([entry.num_new_tokens for entry in scheduled], np.int64, len(scheduled)).cumsum()
        samples = np.fromiter([entry.num_samples > 0 for entry in scheduled], np.bool_, len(scheduled))
        return self._put(ends[samples] - 1)

    def _prompt_logprobs(
        self, scheduled: tuple[ScheduledSequence, ...], hidden: torch.Tensor
    ) -> tuple[PromptChunkLogprobs, ...]:
        """Position p of a prompt predicts its token p + 1; position 0 is predicted by nothing."""
        chunks = []
        row = 0
        for entry in scheduled:
            seq, params = entry.seq, entry.seq.request.params
            wanted = params.prompt_logprobs if isinstance(params, SamplingParams) else None
            if wanted is not None and entry is not seq.decode_entry:
                first = seq.num_computed_tokens
                targets = seq.token_ids[first + 1 : min(first + 1 + entry.num_new_tokens, seq.num_prompt_tokens)]
                found = self._logprobs_of(hidden[row : row + len(targets)], targets, wanted)
                chunks.append(
                    PromptChunkLogprobs(seq, first + 1, found) if first else PromptChunkLogprobs(seq, 0, [None, *found])
                )
            row += entry.num_new_tokens
        return tuple(chunks)

    def _logprobs_of(self, hidden: torch.Tensor, targets: list[int], count: int) -> list[dict[int, Logprob] | None]:
        """For each row (N, d), the log probabilities of its target and of the `count` likeliest tokens."""
        result: list[dict[int, Logprob] | None] = []
        for start in range(0, len(targets), _PROMPT_LOGPROB_ROWS):
            logits = self.model.compute_logits(hidden[start : start + _PROMPT_LOGPROB_ROWS])
            for logprobs, token in zip(logits.log_softmax(-1), targets[start:], strict=False):
                result.append(token_logprobs(token, *top_logprobs(logprobs, token, min(count, len(logprobs)))))
        return result
