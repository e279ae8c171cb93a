"""Decode steps as CUDA graphs: the whole model for a batch of one token each, recorded once and replayed.

A decode step of a small model is hundreds of kernels of a few microseconds; launching them one by one takes longer than
running them. A graph launches all with one call, but with the same addresses and shapes each time. So what changes from
step to step lies in buffers that stay where they are: every sequence in the running batch has a *slot*, with its block
table and its newest token on the device. A step sends one small array that names the slots, positions and cache places
of its rows and the few table entries that are new; the graph gathers the rest by itself.

The graph draws too, by temperature alone, and keeps the token for its slot: nothing stands between a step and the next
one then. Rows that want more (top_p, penalties, …) are drawn again outside, from the logits that the graph leaves.

Graphs exist for some batch sizes; a batch runs on the next larger one, its spare rows on an empty slot that no sequence
has.
"""

from bisect import bisect_left
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from octavo import ops
from octavo.engine.kv_cache import PagedKVCache
from octavo.engine.transfer import to_device
from octavo.models.causal_lm import CausalLM
from octavo.ops.metadata import AttentionMetadata

Tensor = torch.Tensor

_SLOT, _POSITION, _PLACE, _LENGTH, _ENTRY_SLOT, _ENTRY_COLUMN, _ENTRY_BLOCK = range(7)
_SEED, _DRAW, _TEMPERATURE, _NUM_FIELDS = range(7, 11)


class TableEntries(NamedTuple):
    """Block table entries that the device does not have yet: three int64 arrays of one length."""

    slots: NDArray[np.int64]
    columns: NDArray[np.int64]
    blocks: NDArray[np.int64]


NO_ENTRIES = TableEntries(*(np.empty(0, dtype=np.int64) for _ in range(3)))


class PlainDraws(NamedTuple):
    """What each of B rows is drawn with, if by nothing but a temperature: fp32, 0 for the likeliest token; int64 seeds;
    int64 numbers of tokens drawn before."""

    temperatures: NDArray[np.float32]
    seeds: NDArray[np.int64]
    positions: NDArray[np.int64]


class GraphOutput(NamedTuple):
    """On the device: logits (B, vocab) fp32; the tokens (B,) int64 that went in; those that were drawn, or None."""

    logits: Tensor
    inputs: Tensor
    tokens: Tensor | None


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to record, ascending: 1, 2, 4, 8, then every 16th up to max_num_seqs."""
    sizes = [size for size in (1, 2, 4, 8, *range(16, max_num_seqs, 16)) if size < max_num_seqs]
    return [*sizes, max_num_seqs]


class DecodeGraphs:
    """The decode steps of one model over one cache. Owned by the model runner.

    Args:
        max_num_seqs: slots, and rows of the largest step.
        max_model_len: longest sequence, in tokens.
        record: False runs each step eagerly through the same buffers: on a CPU, and to compare.

    last_tokens: (max_num_seqs + 1,) int64, the newest token of each slot, on the device; whoever samples writes it.
    draws: whether steps draw; on a CPU the sampler does.
    """

    def __init__(
        self, model: CausalLM, kv_cache: PagedKVCache, *, max_num_seqs: int, max_model_len: int, record: bool
    ) -> None:
        device = model.device
        self._model, self._kv_cache, self._max_model_len = model, kv_cache, max_model_len
        self._empty_slot = max_num_seqs
        max_blocks = -(-max_model_len // kv_cache.block_size)
        self._tables = torch.zeros(max_num_seqs + 1, max_blocks, dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self.draws = device.type == "cuda"
        self._no_limits = {  # neither top_k nor top_p nor min_p
            "top_k": torch.zeros(max_num_seqs, dtype=torch.int32, device=device),
            "top_p": torch.ones(max_num_seqs, device=device),
            "min_p": torch.zeros(max_num_seqs, device=device),
        }
        self._cu_seqlens = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._fields = torch.zeros(_NUM_FIELDS, max_num_seqs, dtype=torch.int64, device=device)
        # two, because the copy of the step in flight may not have read its own yet
        pinned = device.type == "cuda"
        self._staging = [torch.zeros(_NUM_FIELDS, max_num_seqs, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self.sizes = graph_sizes(max_num_seqs)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, GraphOutput]] = {}
        if record:
            self.record(self.sizes)

    def run(
        self,
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        places: NDArray[np.int64],
        entries: TableEntries,
        plain: PlainDraws | None = None,
    ) -> GraphOutput:
        """One decode step of B rows; what it gives is valid until the next run. With `plain`, where steps draw, there
        are tokens, which are kept in `last_tokens` then.

        Row i continues the sequence in slots[i] by its newest token, at positions[i], stored at places[i] of the cache;
        `entries` are those of its table and others' that are new.
        """
        count = len(slots)
        size = self.sizes[bisect_left(self.sizes, count)]
        if len(entries.slots) > size:  # prompts were computed in between
            self._tables.index_put_(*self._send(entries))
            entries = NO_ENTRIES
        self._stage(count, size, slots, positions, places, entries)
        if plain is not None:
            self._stage_draws(count, plain)
        self._fields.copy_(self._staging[0], non_blocking=True)
        self._staging.reverse()
        if size in self._graphs:
            graph, output = self._graphs[size]
            graph.replay()
        else:
            output = self._step(size)
        tokens = None if plain is None or output.tokens is None else output.tokens[:count]
        return GraphOutput(output.logits[:count], output.inputs[:count], tokens)

    def slots(self, count: int) -> Tensor:
        """(count,) int64 on the device: the slots of the last run's rows."""
        return self._fields[_SLOT, :count]

    def drop(self) -> None:
        """Forgets all graphs."""
        self._graphs.clear()

    def _stage(
        self,
        count: int,
        size: int,
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        places: NDArray[np.int64],
        entries: TableEntries,
    ) -> None:
        """Fills the fields of `size` rows, spare rows with those of the empty slot."""
        fields, new = self._staging[0].numpy(), len(entries.slots)
        fields[_SLOT, :count], fields[_SLOT, count:size] = slots, self._empty_slot
        fields[_POSITION, :count], fields[_POSITION, count:size] = positions, 0
        fields[_PLACE, :count], fields[_PLACE, count:size] = places, -1
        lengths = fields[_LENGTH].view(np.int32)
        lengths[:count], lengths[count:size] = positions + 1, 0
        fields[_ENTRY_SLOT, :new], fields[_ENTRY_SLOT, new:size] = entries.slots, self._empty_slot
        fields[_ENTRY_COLUMN, :new], fields[_ENTRY_COLUMN, new:size] = entries.columns, 0
        blocks = fields[_ENTRY_BLOCK].view(np.int32)
        blocks[:new], blocks[new:size] = entries.blocks, 0

    def _stage_draws(self, count: int, plain: PlainDraws) -> None:
        fields = self._staging[0].numpy()
        fields[_SEED, :count], fields[_DRAW, :count] = plain.seeds, plain.positions
        fields[_TEMPERATURE].view(np.float32)[:count] = plain.temperatures

    def _send(self, entries: TableEntries) -> tuple[tuple[Tensor, Tensor], Tensor]:
        device = self._tables.device
        slots, columns, blocks = (to_device(array, device) for array in entries)
        return (slots, columns), blocks.int()

    def _step(self, size: int) -> GraphOutput:
        """What a graph of `size` rows records: nothing here depends on values on the host."""
        fields = self._fields[:, :size]
        slots, positions, places, _, entry_slots, entry_columns, _, seeds, draws, _ = fields.unbind()
        lengths, entry_blocks = (self._fields[field].view(torch.int32)[:size] for field in (_LENGTH, _ENTRY_BLOCK))
        self._tables.index_put_((entry_slots, entry_columns), entry_blocks)
        metadata = AttentionMetadata(
            cu_seqlens_q=self._cu_seqlens[: size + 1],
            cache_seqlens=lengths,
            block_table=self._tables[slots],
            slot_mapping=places,
            max_seqlen_q=1,
            max_seqlen_k=self._max_model_len,
        )
        inputs = self.last_tokens[slots]
        hidden = self._model(inputs, positions, self._kv_cache.layers, metadata)
        logits = self._model.compute_logits(hidden)
        if not self.draws:
            return GraphOutput(logits, inputs, None)
        temperatures = self._fields[_TEMPERATURE].view(torch.float32)[:size]
        limits = {name: limit[:size] for name, limit in self._no_limits.items()}
        tokens = ops.sample_on_device(logits, temperatures, **limits, seeds=seeds, positions=draws, truncates=False)
        self.last_tokens.index_copy_(0, slots, tokens)
        return GraphOutput(logits, inputs, tokens)

    @torch.inference_mode()
    def record(self, sizes: list[int]) -> None:
        """Records graphs of these sizes, ascending, the largest first, so that the others fit into its memory. Each
        runs once eagerly before: kernels are compiled and libraries make their handles then, which must not happen
        while a graph is recorded."""
        nothing = np.empty(0, dtype=np.int64)
        self._stage(0, self.sizes[-1], nothing, nothing, nothing, NO_ENTRIES)
        self._fields.copy_(self._staging[0])
        pool = None
        for size in tqdm(sizes[::-1], "Recording decode graphs", delay=1.0, leave=False):
            self._step(size)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                output = self._step(size)
            pool = graph.pool()
            self._graphs[size] = graph, output
        torch.cuda.synchronize(self._tables.device)
