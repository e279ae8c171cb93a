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

from octavo.engine.decode_graphs import NO_ENTRIES, DecodeGraphs, GraphOutput, PlainDraws, TableEntries
from octavo.engine.kv_cache import PagedKVCache
from octavo.engine.outputs import Logprob
from octavo.engine.request import Sequence
from octavo.engine.sampler import DrawnTokens, Sampler, token_logprobs, top_logprobs
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import PromptChunkLogprobs, ScheduledSequence, SchedulerOutput, StepResult
from octavo.engine.transfer import Readback, TokenReadbacks, to_device
from octavo.models.causal_lm import CausalLM
from octavo.nn.cache import LayerKVCache, LayerLatentCache
from octavo.ops.metadata import AttentionMetadata

_PROMPT_LOGPROB_ROWS = 128  # positions whose logits exist at a time: 128 · 150k · 4 bytes = 77 MB


class BlockTables:
    """The block table of every sequence in the batch, as rows of one int32 array that is updated by differences.

    A sequence keeps its row, its *slot*, as long as it is in every batch.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int) -> None:
        self.table = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self.slots = np.empty(0, dtype=np.int64)  # of the batch's sequences, in order
        self._filled = np.zeros(max_num_seqs, dtype=np.int64)  # leading entries of each row that are right
        self._sent = np.zeros(max_num_seqs, dtype=np.int64)  # and those of them that `unsent` has given out
        self._all_sent = True
        self._slot_of: dict[int, int] = {}
        self._free = list(range(max_num_seqs - 1, -1, -1))
        self._sequences: list[Sequence] = []

    def update(self, sequences: list[Sequence], rewritten: bool) -> None:
        """Makes the tables of these sequences right. `rewritten`: entries that were right may have changed."""
        if sequences != self._sequences:
            self._change_batch(sequences)
        if rewritten:
            self._filled[self.slots] = self._sent[self.slots] = 0
        lengths = np.fromiter([len(seq.block_table) for seq in sequences], np.int64, len(sequences))
        self.grow(np.flatnonzero(self._filled[self.slots] != lengths))

    def grow(self, indices: NDArray[np.int64]) -> None:
        """The same batch again, where only the sequences at `indices` took more blocks."""
        for i in indices.tolist():
            slot, blocks = self.slots[i], self._sequences[i].block_table
            self.table[slot, self._filled[slot] : len(blocks)] = blocks[self._filled[slot] :]
            self._filled[slot] = len(blocks)
            self._all_sent = False

    def unsent(self) -> TableEntries:
        """The entries of the batch that are new since the last call."""
        if self._all_sent:
            return NO_ENTRIES
        self._all_sent = True
        slots = self.slots[self._filled[self.slots] != self._sent[self.slots]]
        counts = self._filled[slots] - self._sent[slots]
        firsts = np.repeat(self._sent[slots] - (counts.cumsum() - counts), counts)
        rows, columns = np.repeat(slots, counts), firsts + np.arange(len(firsts))
        self._sent[slots] = self._filled[slots]
        return TableEntries(rows, columns, self.table[rows, columns].astype(np.int64))

    def _change_batch(self, sequences: list[Sequence]) -> None:
        """Keeps the rows of those that stay; nothing is kept for the others, so a preempted sequence is read afresh."""
        old = self._slot_of
        new: dict[int, int] = {}
        arrived = []
        for seq in sequences:
            slot = old.pop(seq.seq_id, None)
            if slot is None:
                arrived.append(seq.seq_id)
            else:
                new[seq.seq_id] = slot
        self._free += old.values()
        for seq_id in arrived:
            new[seq_id] = slot = self._free.pop()
            self._filled[slot] = self._sent[slot] = 0
        self._slot_of = new
        self._sequences = sequences
        self.slots = np.fromiter([new[seq.seq_id] for seq in sequences], np.int64, len(sequences))


_ON_DEVICE = -1  # in the place of a token id that only the device knows yet


@dataclass(slots=True)
class Batch:
    """A step on the host: B sequences with T new tokens."""

    scheduled: tuple[ScheduledSequence, ...]
    starts: NDArray[np.int64]  # (B,) position of each sequence's first new token
    counts: NDArray[np.int64]  # (B,) its new tokens
    token_ids: NDArray[np.int64]  # (T,)
    decodes: bool  # one token each, every one sampled from: the next step may follow from this one


class StepInFlight:
    """A step that was launched: the device computes it, or has."""

    def __init__(
        self,
        sampler: Sampler,
        drawn: DrawnTokens | None,
        readback: Readback | None = None,
        prompt_logprobs: tuple[PromptChunkLogprobs, ...] = (),
        batch: Batch | None = None,
    ) -> None:
        """readback: of the drawn tokens. batch: takes the tokens as its own, for the next step to go on from."""
        self._sampler, self._drawn, self._readback = sampler, drawn, readback
        self._prompt_logprobs, self._batch = prompt_logprobs, batch

    def wait(self) -> StepResult:
        """Its result, once; steps are waited for in the order of their launches."""
        if self._drawn is None or self._readback is None:
            return StepResult([], prompt_logprobs=self._prompt_logprobs)
        tokens = self._sampler.report(self._drawn, self._readback.wait())
        if self._batch is not None:
            self._batch.token_ids = np.array(tokens.token_ids, dtype=np.int64)
        return StepResult(tokens.token_ids, tokens.logprobs, tokens.top_logprobs, self._prompt_logprobs)


class ModelRunner:
    """Executes steps. Owns model, cache, sampler; not thread-safe.

    Args:
        max_num_seqs, max_model_len: bounds of the scheduler's steps.
        decode_graphs: runs the steps that only decode, and keeps every sequence's newest token on the device, so that a
            step may be launched before the last one is read. None computes all steps alike, one at a time: on a CPU.
    """

    def __init__(
        self,
        model: CausalLM,
        kv_cache: PagedKVCache,
        sampler: Sampler,
        *,
        max_num_seqs: int,
        max_model_len: int,
        decode_graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.sampler = sampler
        self._device = model.device
        self._graphs = decode_graphs
        self._readbacks = TokenReadbacks(max_num_seqs, self._device)
        self._tables = BlockTables(max_num_seqs, -(-max_model_len // kv_cache.block_size))
        self._steady: Batch | None = None  # a step that only decoded, from which the next may follow
        self._sampled: set[int] = set()  # seq_ids whose newest token the last step left on the device

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be launched before the one before it has been waited for."""
        return self._graphs is not None

    def execute(self, output: SchedulerOutput, token_bitmasks: Mapping[int, torch.Tensor] | None = None) -> StepResult:
        """`launch`, then wait."""
        return self.launch(output, token_bitmasks).wait()

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput, token_bitmasks: Mapping[int, torch.Tensor] | None = None) -> StepInFlight:
        """Starts one step as `octavo.engine.step` tells it. `token_bitmasks`: see `Sampler.draw`.

        Reads the sequences now, not later: what the scheduler changes afterwards belongs to the next step.
        """
        scheduled = output.scheduled
        if not scheduled:
            return StepInFlight(self.sampler, None)
        self.kv_cache.copy_blocks(output.block_copies)
        batch = self._batch(output)
        self._steady = None  # what a step that fails leaves behind is not to be built upon
        prompt_logprobs: tuple[PromptChunkLogprobs, ...] = ()
        if batch.decodes:
            logits, inputs, tokens = self._decode(batch, plain=not token_bitmasks)
        else:
            arguments = self._tensors(batch)
            hidden = self.model(*arguments)
            prompt_logprobs = self._prompt_logprobs(scheduled, hidden)
            scheduled = tuple(entry for entry in scheduled if entry.num_samples)
            if not scheduled:
                self._sampled = set()
                return StepInFlight(self.sampler, None, None, prompt_logprobs)
            rows = self._sampled_rows(batch)
            logits, inputs, tokens = self.model.compute_logits(hidden[rows]), arguments[0][rows], None
        if tokens is None:
            pending = self._pending(scheduled, inputs)
            drawn = self.sampler.draw(logits, scheduled, token_bitmasks, pending)
        else:
            drawn = DrawnTokens(tokens, None, None)
        readback = self._readbacks.start(drawn.tokens)
        if self._graphs is not None:
            self._keep_tokens(self._graphs, batch, drawn.tokens, kept=tokens is not None)
        self._steady = batch if batch.decodes else None
        return StepInFlight(self.sampler, drawn, readback, prompt_logprobs, None if self._graphs else self._steady)

    def _batch(self, output: SchedulerOutput) -> Batch:
        steady, scheduled = self._steady, output.scheduled
        if steady is not None and steady.scheduled == scheduled and not output.block_copies:
            return self._next_batch(steady)
        sequences = [entry.seq for entry in scheduled]
        self._tables.update(sequences, rewritten=bool(output.block_copies))
        starts = np.fromiter([seq.num_computed_tokens for seq in sequences], np.int64, len(sequences))
        counts = np.fromiter([entry.num_new_tokens for entry in scheduled], np.int64, len(sequences))
        token_ids = np.array(list(chain.from_iterable(self._new_tokens(entry) for entry in scheduled)), dtype=np.int64)
        decodes = all(entry is entry.seq.decode_entry for entry in scheduled)
        return Batch(scheduled, starts, counts, token_ids, decodes)

    def _next_batch(self, steady: Batch) -> Batch:
        """Each sequence goes on by the token that it was given."""
        starts = steady.starts + 1
        assert starts[0] == steady.scheduled[0].seq.num_computed_tokens, "a steady batch advances by one token"
        self._tables.grow(np.flatnonzero(starts % self.kv_cache.block_size == 0))
        return Batch(steady.scheduled, starts, steady.counts, steady.token_ids, True)

    def _new_tokens(self, entry: ScheduledSequence) -> list[int]:
        seq, start = entry.seq, entry.seq.num_computed_tokens
        if entry is seq.decode_entry and seq.seq_id in self._sampled:
            return [_ON_DEVICE]
        assert not seq.num_pending_tokens, "a token that is not known was left on the device"
        return seq.token_ids[start : start + entry.num_new_tokens]

    def _decode(self, batch: Batch, *, plain: bool) -> GraphOutput:
        """A step of decodes; its tokens, too, where the graph draws them, which takes `plain`."""
        if self._graphs is None:
            arguments = self._tensors(batch)
            return GraphOutput(self.model.compute_logits(self.model(*arguments)), arguments[0], None)
        slots, positions = self._tables.slots, batch.starts
        self._send_tokens(self._graphs, slots, batch.token_ids)
        draws = None
        if plain and self._graphs.draws and (rows := self.sampler.plain_rows(batch.scheduled)) is not None:
            draws = PlainDraws(rows.temperatures, rows.seeds, positions + 1 - rows.num_prompt_tokens)
        return self._graphs.run(slots, positions, self._places(slots, positions), self._tables.unsent(), draws)

    def _pending(self, scheduled: tuple[ScheduledSequence, ...], inputs: torch.Tensor) -> torch.Tensor | None:
        """Each entry's newest token, which is the last that went in, where only the device knows it; else −1. None when
        the sampler does not ask."""
        if self._graphs is None or not self.sampler.penalises(scheduled):
            return None
        pending = np.array([entry.seq.num_pending_tokens for entry in scheduled], dtype=np.bool_)
        return torch.where(self._put(pending), inputs, -1) if pending.any() else None

    def _send_tokens(self, graphs: DecodeGraphs, slots: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Tokens that the device does not have: of candidates that forked from a prompt."""
        known = token_ids != _ON_DEVICE
        if known.any():
            graphs.last_tokens[to_device(slots[known], self._device)] = to_device(token_ids[known], self._device)

    def _keep_tokens(self, graphs: DecodeGraphs, batch: Batch, tokens: torch.Tensor, *, kept: bool) -> None:
        """Leaves each sequence's new token where the next step finds it; `kept`: the graph has."""
        if batch.decodes:
            if (batch.token_ids != _ON_DEVICE).any():
                self._sampled = {entry.seq.seq_id for entry in batch.scheduled}
                batch.token_ids = np.full_like(batch.token_ids, _ON_DEVICE)
            if kept:
                return
            slots = graphs.slots(len(batch.starts))
        else:
            samples = [(i, entry) for i, entry in enumerate(batch.scheduled) if entry.num_samples]
            self._sampled = {entry.seq.seq_id for _, entry in samples}
            if any(entry.num_samples > 1 or entry.seq.request.is_beam_search for _, entry in samples):
                self._sampled = set()
                return
            slots = to_device(self._tables.slots[[i for i, _ in samples]], self._device)
        graphs.last_tokens.index_copy_(0, slots, tokens)

    def _places(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """block · block_size + offset of each position in its sequence's table."""
        size = self.kv_cache.block_size
        return self._tables.table[slots, positions // size].astype(np.int64) * size + positions % size

    def _tensors(
        self, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, list[LayerKVCache | LayerLatentCache], AttentionMetadata]:
        """The arguments of `CausalLM.forward`."""
        starts, counts, token_ids = batch.starts, batch.counts, batch.token_ids
        rows, ends = np.repeat(np.arange(len(counts)), counts), counts.cumsum()
        positions = np.arange(ends[-1]) + (starts - ends + counts)[rows]
        cache_seqlens = starts + counts
        longest = int(cache_seqlens.max())
        slots = self._tables.slots
        metadata = AttentionMetadata(
            cu_seqlens_q=self._put(np.concatenate([[0], ends]).astype(np.int32)),
            cache_seqlens=self._put(cache_seqlens.astype(np.int32)),
            block_table=self._put(self._tables.table[slots, : -(-longest // self.kv_cache.block_size)]),
            slot_mapping=self._put(self._places(slots[rows], positions)),
            max_seqlen_q=int(counts.max()),
            max_seqlen_k=longest,
            starts_empty=not starts.any(),
        )
        tokens = self._put(token_ids)
        if self._graphs is not None and (missing := np.flatnonzero(token_ids == _ON_DEVICE)).size:
            tokens[self._put(missing)] = self._graphs.last_tokens[self._put(slots[rows[missing]])]
        return tokens, self._put(positions), self.kv_cache.layers, metadata

    def _put(self, array: NDArray[np.generic]) -> torch.Tensor:
        return to_device(array, self._device)

    def _sampled_rows(self, batch: Batch) -> torch.Tensor | slice:
        """Of T new tokens, those that are the last of an entry that samples."""
        samples = np.fromiter([entry.num_samples > 0 for entry in batch.scheduled], np.bool_, len(batch.scheduled))
        rows = batch.counts.cumsum()[samples] - 1
        return slice(None) if len(rows) == len(batch.token_ids) else self._put(rows)

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
