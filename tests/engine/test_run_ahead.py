"""Steps launched before the last one is read, through the buffers of the decode graphs: the same tokens, whatever ends,
comes or is preempted meanwhile. On a CPU the graphs' steps run eagerly."""

import random

import pytest
import torch

from octavo import BeamSearchParams, SamplingParams, ops
from octavo.engine.config import EngineConfig
from octavo.engine.decode_graphs import DecodeGraphs, graph_sizes
from octavo.engine.llm_engine import LLMEngine
from octavo.engine.sampler import Sampler


@pytest.fixture
def make(tiny_loaded):
    """`make(run_ahead, **EngineConfig)`: an engine around the tiny model; afterwards all of its blocks must be back."""
    engines = []

    def build(run_ahead: bool, **options) -> LLMEngine:
        sizes = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 8, "max_model_len": 128} | options
        per_token = tiny_loaded.config.kv_bytes_per_token(torch.float32)
        config = EngineConfig(kv_bytes_per_token=per_token, **sizes)
        engines.append(LLMEngine(tiny_loaded.model, tiny_loaded.tokenizer, config, run_ahead=run_ahead))
        return engines[-1]

    yield build
    for engine in engines:
        engine.check_integrity()
        assert not engine.has_unfinished()
        assert engine.scheduler.blocks.num_free_blocks == engine.config.num_blocks


def serve(engine: LLMEngine, requests, between=lambda engine, step: None) -> dict[str, list]:
    for i, (prompt, params) in enumerate(requests):
        engine.add_request(str(i), prompt, params)
    outputs = {}
    step = 0
    while engine.has_unfinished():
        for output in engine.step():
            outputs[output.request_id] = [(c.token_ids, c.finish_reason, c.text) for c in output.outputs]
        engine.check_integrity()
        between(engine, step)
        step += 1
    return outputs


def draw_requests(seed: int) -> list:
    rng = random.Random(seed)
    requests = []
    for i in range(14):
        options = rng.choice(
            [
                {},
                {"temperature": 0},
                {"top_p": 0.8},
                {"stop": ["e", "on"]},
                {"ignore_eos": True},
                {"min_tokens": 4},
                {"temperature": 0, "repetition_penalty": 1.5},
                {"presence_penalty": 1.0, "frequency_penalty": 0.5},
            ]
        )
        if rng.random() < 0.2:
            options = options | {"n": 2}
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 40))]
        requests.append((prompt, SamplingParams(**({"seed": i, "max_tokens": rng.randint(4, 30)} | options))))
    return requests


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 8}, {"num_blocks": 20}, {"block_size": 1, "num_blocks": 200}, {"max_num_seqs": 2}],
    ids=str,
)
@pytest.mark.parametrize("seed", range(3))
def test_the_same_tokens_as_step_by_step(make, seed, options):
    requests = draw_requests(seed)
    assert serve(make(True, **options), requests) == serve(make(False, **options), requests)


def test_steps_are_launched_before_the_last_is_read(make):
    engine = make(True)
    ahead = []
    serve(
        engine,
        [([1, 2, 3], SamplingParams(max_tokens=20, ignore_eos=True))],
        lambda engine, step: ahead.append(len(engine.scheduler.in_flight)),
    )
    assert ahead == [1] * 19 + [0], "the last token by length is foreseen: no step follows it"


@pytest.mark.parametrize(
    "params",
    [SamplingParams(bad_words=["e"], seed=1, max_tokens=12), BeamSearchParams(beam_width=2, max_tokens=8)],
    ids=["bad words", "beams"],
)
def test_what_looks_back_at_its_tokens_is_not_run_ahead(make, params):
    engine = make(True)
    requests = [("the rain", params), ("on", SamplingParams(seed=3, max_tokens=20))]
    ahead = []

    def watch(engine, step):
        if "0" in engine.scheduler.requests:
            ahead.append(len(engine.scheduler.in_flight))

    assert serve(engine, requests, watch) == serve(make(False), requests)
    assert not any(ahead)


def test_penalties_count_the_token_that_only_the_device_knows(make):
    """Steps run ahead beside them, and a token drawn in the step in flight is penalised as often as it stands."""
    params = SamplingParams(
        temperature=0, frequency_penalty=1.5, repetition_penalty=1.2, max_tokens=40, ignore_eos=True
    )
    engine, ahead = make(True), []
    requests = [("on", params), ([7] * 9, params), ("the", SamplingParams(temperature=0, max_tokens=30))]
    outputs = serve(engine, requests, lambda engine, step: ahead.append(len(engine.scheduler.in_flight)))
    assert outputs == serve(make(False), requests)
    assert sum(ahead) > 30


def test_an_abort_under_a_step_in_flight_frees_the_blocks_after_it(make):
    """The step in flight writes to them, so nobody else may: neither a newcomer nor a sequence that grows."""
    engine = make(True, enable_prefix_caching=False)
    for name in "ab":
        engine.add_request(name, [1, 2, 3, 4, 5], SamplingParams(max_tokens=50, ignore_eos=True, seed=1))
    for _ in range(3):
        engine.step()
    blocks = engine.scheduler.blocks
    aborted = engine.scheduler.requests["a"].sequences[0]
    table = set(aborted.block_table)
    assert engine.abort("a").outputs[0].finish_reason == "abort"
    assert all(blocks.ref_counts[block] == 1 for block in table)
    engine.add_request("c", [1] * 20, SamplingParams(max_tokens=2, seed=1))
    engine.step()  # launches the step with the newcomer, then records the one in flight
    newcomer = engine.scheduler.requests["c"].sequences[0]
    assert newcomer.block_table
    assert not table.intersection(newcomer.block_table)
    assert not aborted.block_table
    engine.check_integrity()
    engine.abort("b")
    engine.abort("c")
    assert engine.has_unfinished(), "a step is in flight"
    assert engine.step() == []


def test_a_failure_ends_the_requests_of_both_steps_in_flight(make, monkeypatch):
    engine = make(True)
    for name in "ab":
        engine.add_request(name, [1, 2, 3], SamplingParams(max_tokens=50, ignore_eos=True))
    engine.step()
    engine.add_request("c", [4, 5], SamplingParams(max_tokens=3))
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "launch", lambda *step: 1 / 0)
        failed = engine.step()
    assert sorted(output.request_id for output in failed) == ["a", "b", "c"]
    assert {output.outputs[0].finish_reason for output in failed} == {"error"}
    assert serve(engine, [([1, 2, 3], SamplingParams(temperature=0, max_tokens=5))]).keys() == {"0"}


def test_steps_draw_what_the_sampler_would(make, monkeypatch):
    """As on a GPU: rows that a temperature alone decides are drawn by the step itself, the others from its logits."""
    original = Sampler._draw

    def draw(sampler, logits, batch):
        if (rows := batch.plain) is None:
            return original(sampler, logits, batch)
        vocab, count = logits.shape[1], len(logits)
        limits = torch.full((count,), vocab), torch.ones(count), torch.zeros(count)
        positions = torch.tensor([seq.num_sampled_tokens for seq in batch.sequences])
        temperatures, seeds = torch.from_numpy(rows.temperatures), torch.from_numpy(rows.seeds)
        return ops.sample_on_device(logits, temperatures, *limits, seeds, positions, truncates=False)

    monkeypatch.setattr(Sampler, "_draw", draw)
    engine = make(True)
    engine.runner._graphs.draws = True
    drawn = []
    run = DecodeGraphs.run
    monkeypatch.setattr(
        DecodeGraphs, "run", lambda graphs, *step: (drawn.append(step[-1] is not None), run(graphs, *step))[1]
    )
    requests = draw_requests(7)
    assert serve(engine, requests) == serve(make(True), requests)
    assert set(drawn) == {True, False}


def test_graph_sizes_reach_every_batch():
    assert graph_sizes(1) == [1]
    assert graph_sizes(5) == [1, 2, 4, 5]
    assert graph_sizes(256) == [1, 2, 4, 8, *range(16, 257, 16)]


def test_spare_rows_write_nothing(make, monkeypatch):
    """A batch of 3 on a graph of 4: the fourth row has no key, no place in the cache and the empty slot's table."""
    engine = make(True)
    seen = []
    step = DecodeGraphs._step
    monkeypatch.setattr(
        DecodeGraphs, "_step", lambda graphs, size: (seen.append((graphs, size)), step(graphs, size))[1]
    )
    serve(engine, [([i + 1] * 5, SamplingParams(max_tokens=4, ignore_eos=True, seed=i)) for i in range(3)])
    graphs, size = seen[0]
    assert size == 4
    assert graphs._fields[0, 3] == 8
    assert graphs._fields[2, 3] == -1
    assert not graphs._tables[8].any()
