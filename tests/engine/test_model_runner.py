"""The runner makes of a decision what the plain definition says: positions, slots, tables, rows that sample."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.model_runner import BlockTables
from octavo.engine.request import Request
from octavo.engine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.fixture
def watched(make_engine, monkeypatch):
    """An engine whose every batch is compared with the definition before the model sees it."""

    def make(**options):
        engine = make_engine(**options)
        batch_of, build = engine.runner._batch, engine.runner._tensors
        seen = []

        def remember(output):
            seen.append(output)
            return batch_of(output)

        def check(batch):
            token_ids, positions, _, metadata = tensors = build(batch)
            output = seen[-1]
            starts = metadata.cu_seqlens_q.tolist()
            assert starts[-1] == output.num_batched_tokens == len(token_ids)
            for i, entry in enumerate(output.scheduled):
                seq, first, count = entry.seq, entry.seq.num_computed_tokens, entry.num_new_tokens
                rows = slice(starts[i], starts[i + 1])
                assert positions[rows].tolist() == list(range(first, first + count))
                assert token_ids[rows].tolist() == seq.token_ids[first : first + count]
                assert metadata.block_table[i, : len(seq.block_table)].tolist() == seq.block_table
                size = engine.config.block_size
                slots = [seq.block_table[p // size] * size + p % size for p in range(first, first + count)]
                assert metadata.slot_mapping[rows].tolist() == slots
                assert metadata.cache_seqlens[i] == first + count
            assert metadata.max_seqlen_q == max(entry.num_new_tokens for entry in output.scheduled)
            assert metadata.max_seqlen_k == metadata.cache_seqlens.max()
            assert metadata.block_table.dtype == metadata.cu_seqlens_q.dtype == torch.int32
            assert metadata.slot_mapping.dtype == positions.dtype == token_ids.dtype == torch.int64
            return tensors

        monkeypatch.setattr(engine.runner, "_batch", remember)
        monkeypatch.setattr(engine.runner, "_tensors", check)
        return engine, seen

    return make


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 8}, {"num_blocks": 11}, {"block_size": 1, "num_blocks": 200}],
    ids=str,
)
def test_batches_say_what_the_scheduler_decided(watched, options):
    engine, seen = watched(**options)
    for i, length in enumerate((3, 17, 9, 1, 26)):
        engine.add_request(str(i), [(7 * i + j) % 256 for j in range(length)], GREEDY)
    engine.add_request("n", [5] * 7, SamplingParams(n=3, seed=1, max_tokens=6, ignore_eos=True))
    steps = 0
    while engine.has_unfinished():
        engine.step()
        steps += 1
        if steps == 6:
            engine.abort("2")
    tight = options.get("num_blocks") == 11
    assert any(output.preempted for output in seen) == tight
    if not tight:  # candidates share the last, half full block of the prompt; none is half full in blocks of 1
        assert any(output.block_copies for output in seen) == ("block_size" not in options)


def test_only_rows_that_sample_get_logits(make_engine, monkeypatch):
    engine = make_engine(max_num_batched_tokens=8)
    rows = []
    compute = engine.model.compute_logits
    monkeypatch.setattr(engine.model, "compute_logits", lambda hidden: (rows.append(len(hidden)), compute(hidden))[1])
    engine.add_request("0", list(range(20)), GREEDY)
    engine.add_request("1", [1], GREEDY)
    while engine.has_unfinished():
        engine.step()
    assert max(rows) == 2
    assert sum(rows) == 20


def test_nothing_unwritten_is_ever_read(make_engine):
    """The whole cache is NaN before the first step."""
    clean, poisoned = make_engine(), make_engine()
    for layer in poisoned.runner.kv_cache.layers:
        for tensor in layer.tensors:
            tensor.fill_(torch.nan)
    texts = []
    for engine in (clean, poisoned):
        engine.add_request("0", "on and on and on", SamplingParams(temperature=0, max_tokens=9, n=2))
        while engine.has_unfinished():
            outputs = engine.step()
        texts.append([o.token_ids for o in outputs[0].outputs])
    assert texts[0] == texts[1]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_tables_follow_sequences_that_come_go_and_grow(data):
    sequences = [Request(str(i), [1], GREEDY).sequences[0] for i in range(5)]
    tables = BlockTables(max_num_seqs=5, max_blocks=9)
    device = np.full((5, 9), -1)
    for _ in range(data.draw(st.integers(1, 12))):
        batch = data.draw(st.lists(st.sampled_from(sequences), unique=True, min_size=1))
        rewritten = False
        for seq in batch:
            change = data.draw(st.sampled_from(["grow", "stay", "rewrite"]))
            if not seq.block_table or (change == "grow" and len(seq.block_table) < 9):
                seq.block_table.append(data.draw(st.integers(0, 99)))
            elif change == "rewrite":
                seq.block_table[-1] += 100
                rewritten = True
        tables.update(batch, rewritten)
        for slot, seq in zip(tables.slots, batch, strict=True):
            assert tables.table[slot, : len(seq.block_table)].tolist() == seq.block_table
        if data.draw(st.booleans()):
            entries = tables.unsent()
            device[entries.slots, entries.columns] = entries.blocks
            for slot, seq in zip(tables.slots, batch, strict=True):
                assert device[slot, : len(seq.block_table)].tolist() == seq.block_table
        for seq in data.draw(st.lists(st.sampled_from(sequences), unique=True)):
            if seq not in batch:  # preempted: its blocks are gone, and others come later
                seq.block_table.clear()
