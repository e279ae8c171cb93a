"""Where every layer slides, blocks before the window are given back: bounded memory, the same tokens, exact reports."""

from dataclasses import replace

import pytest
import torch

from octavo import SamplingParams
from octavo.engine.block_manager import BlockManager
from octavo.engine.config import EngineConfig
from octavo.engine.llm_engine import LLMEngine
from octavo.engine.memory_report import FREE, block_map, measure
from octavo.engine.request import Request
from octavo.engine.scheduler import Scheduler
from octavo.engine.step import StepResult

WINDOW, SIZE, BYTES = 10, 4, 7


def run(scheduler, steps):
    for _ in range(steps):
        output = scheduler.schedule()
        scheduler.update(output, StepResult([3] * sum(entry.num_samples for entry in output.scheduled)))
        scheduler.check_integrity()


def scheduler_of(num_blocks=100, **options):
    sizes = {"max_model_len": 400, "kv_bytes_per_token": BYTES, "max_num_seqs": 8, "max_num_batched_tokens": 16}
    return Scheduler(EngineConfig(num_blocks=num_blocks, block_size=SIZE, sliding_window=WINDOW, **sizes | options))


def test_a_block_goes_when_the_next_token_does_not_see_its_last_slot():
    """Token p sees p − 9 … p: block 0 (positions 0 … 3) is last seen by token 12."""
    blocks = BlockManager(10, SIZE, enable_prefix_caching=False, sliding_window=WINDOW)
    seq = Request("r", range(40), SamplingParams()).sequences[0]
    assert blocks.admit(seq)
    held = {}
    for position in range(20):
        blocks.extend(seq, position + 1)
        held[position] = [index for index in range(len(seq.block_table)) if index >= seq.num_unseen_blocks]
        blocks.check_integrity([seq])
        seq.num_computed_tokens = position + 1
    assert held[12] == [0, 1, 2, 3]
    assert held[13] == [1, 2, 3]
    assert held[17] == [2, 3, 4]
    blocks.free(seq)
    blocks.check_integrity([])
    assert blocks.num_free_blocks == 10


def test_long_sequences_hold_a_window_and_no_more():
    scheduler = scheduler_of(enable_prefix_caching=False)
    for i in range(4):
        scheduler.add_request(Request(str(i), range(1, 60), SamplingParams(max_tokens=200)))
    run(scheduler, 150)
    for seq in scheduler.decoding:
        assert len(seq.token_ids) > 150
        assert len(seq.held_blocks) <= WINDOW // SIZE + 2


def test_more_sequences_run_than_whole_texts_would_fit():
    """Eight of 240 tokens need 480 blocks at once; a cache of 64 serves them without preemption."""
    scheduler = scheduler_of(64, enable_prefix_caching=False)
    for i in range(8):
        scheduler.add_request(Request(str(i), range(1, 41), SamplingParams(max_tokens=200)))
    while scheduler.has_unfinished():
        run(scheduler, 1)
    assert scheduler.num_preemptions == 0


def test_the_report_and_the_map_show_what_was_given_back():
    scheduler = scheduler_of(enable_prefix_caching=False)
    scheduler.add_request(Request("a", range(1, 60), SamplingParams(max_tokens=100, n=2)))
    run(scheduler, 60)
    first, second = scheduler.decoding
    slots = set()
    for seq in (first, second):
        positions = range(seq.num_unseen_blocks * SIZE, seq.num_computed_tokens)
        slots |= {(seq.block_table[p // SIZE], p % SIZE) for p in positions}
    report = measure(scheduler)
    assert report.used == len(slots) * BYTES
    assert report.unseen == (first.num_unseen_blocks + second.num_unseen_blocks) * SIZE * BYTES > 0
    assert sum(cell != FREE for cell in block_map(scheduler, {})) == len({block for block, _ in slots})
    assert "given back" in str(report)


def test_prefixes_outlive_the_window_in_the_cache():
    scheduler = scheduler_of()
    scheduler.add_request(Request("a", range(1, 60), SamplingParams(max_tokens=30)))
    run(scheduler, 34)
    scheduler.add_request(Request("b", range(1, 60), SamplingParams(max_tokens=3)))
    (seq,) = scheduler.requests["b"].sequences
    run(scheduler, 1)
    assert seq.num_cached_tokens == 56


@pytest.fixture(scope="module")
def windowed(tiny_loaded):
    """The tiny model with a window in all layers."""
    config = replace(tiny_loaded.config, layer_windows=(WINDOW,) * tiny_loaded.config.num_layers)
    model = type(tiny_loaded.model)(config, dtype=tiny_loaded.model.dtype)
    model.load_state_dict(tiny_loaded.model.state_dict())
    return replace(tiny_loaded, model=model, config=config)


@pytest.mark.parametrize("run_ahead", [False, True])
def test_the_same_tokens_as_with_all_blocks_kept(windowed, run_ahead):
    """Blocks that are free between steps are overwritten, as their next owner would do."""
    texts = []
    for sliding_window in (0, WINDOW):
        config = EngineConfig(
            num_blocks=80, block_size=SIZE, max_num_seqs=4, max_num_batched_tokens=20, max_model_len=128,
            kv_bytes_per_token=windowed.config.kv_bytes_per_token(torch.float32), sliding_window=sliding_window,
        )  # fmt: skip
        engine = LLMEngine(windowed.model, windowed.tokenizer, config, run_ahead=run_ahead)
        for i in range(4):
            params = SamplingParams(max_tokens=50, temperature=0.8 if i % 2 else 0.0, seed=i, ignore_eos=True)
            engine.add_request(str(i), [(7 * i + j) % 250 for j in range(10 + 15 * i)], params)
        outputs = {}
        unseen = 0
        while engine.has_unfinished():
            outputs |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
            engine.check_integrity()
            unseen = max(unseen, engine.memory_report().unseen)
            for layer in engine.runner.kv_cache.layers:
                for tensor in layer.tensors:
                    tensor[list(engine.scheduler.blocks._blank)] = 1e4
        texts.append(outputs)
        assert (unseen > 0) == bool(sliding_window)
    assert texts[0] == texts[1]


def test_the_engine_finds_the_window_of_its_model(windowed, tiny_loaded):
    from octavo.engine.options import EngineOptions

    options = EngineOptions(kv_cache_memory=1 << 20, device="cpu")
    assert LLMEngine.from_loaded(windowed, options).config.sliding_window == WINDOW
    assert LLMEngine.from_loaded(tiny_loaded, options).config.sliding_window == 0
