"""The memory report against a count slot by slot, and against the figures of the PagedAttention paper."""

import json
import random
from pathlib import Path

import pytest

from octavo.engine.config import EngineConfig
from octavo.engine.contiguous_allocator import FirstFitArena, Span, simulate_contiguous
from octavo.engine.memory_plot import plot_memory
from octavo.engine.memory_report import (
    CACHED,
    FREE,
    PARTS,
    SHARED,
    TAIL,
    MemoryTrace,
    block_map,
    measure,
)
from octavo.engine.request import Request
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.scheduler import Scheduler
from octavo.engine.step import StepResult

BYTES = 7


def make_scheduler(num_blocks: int, block_size: int = 5, **options: int) -> Scheduler:
    sizes = {"max_model_len": 2048, "kv_bytes_per_token": BYTES, "max_num_seqs": 64, "max_num_batched_tokens": 512}
    return Scheduler(EngineConfig(num_blocks=num_blocks, block_size=block_size, **{**sizes, **options}))


def step(scheduler: Scheduler) -> None:
    output = scheduler.schedule()
    scheduler.update(output, StepResult([3] * sum(entry.num_samples for entry in output.scheduled)))


def add_mixed(scheduler: Scheduler, rng: random.Random, count: int, prompts: tuple[int, int]) -> None:
    shared = [rng.randrange(1000) for _ in range(prompts[1])]
    for number in range(count):
        length = rng.randint(*prompts)
        own = [rng.randrange(1000) for _ in range(length)]
        prefix = shared[: length // 2] if number % 2 else []
        params = SamplingParams(n=rng.choice([1, 1, 3]), max_tokens=rng.randint(prompts[0], prompts[1]))
        scheduler.add_request(Request(f"{number}", [*prefix, *own[len(prefix) :]], params))


def count_slots(scheduler: Scheduler) -> tuple[int, int]:
    """Physical slots that hold tokens, and slots that sharing saves, counted one by one."""
    size, slots, logical = scheduler.config.block_size, set(), 0
    for seq in scheduler.holders():
        logical += seq.num_computed_tokens
        slots |= {(seq.block_table[p // size], p % size) for p in range(seq.num_computed_tokens)}
    return len(slots), logical - len(slots)


def test_the_report_is_exact_between_steps_and_sums_to_the_cache_within_them() -> None:
    rng = random.Random(1)
    scheduler = make_scheduler(60, max_num_batched_tokens=64)
    add_mixed(scheduler, rng, 40, (3, 30))
    retired = reserved = 0
    while scheduler.has_unfinished():
        output = scheduler.schedule()
        before = measure(scheduler)
        in_flight = output.num_batched_tokens * BYTES
        assert before.reserved == in_flight + scheduler.blocks.num_promised_blocks * scheduler.config.block_bytes
        reserved += before.reserved
        if rng.random() < 0.2:
            scheduler.abort(rng.choice(list(scheduler.requests)))
        retired += measure(scheduler).external
        scheduler.update(output, StepResult([3] * sum(entry.num_samples for entry in output.scheduled)))
        report = measure(scheduler)
        used, saved = count_slots(scheduler)
        assert (report.used, report.saved, report.external) == (used * BYTES, saved * BYTES, 0)
        owned = scheduler.config.num_blocks - scheduler.blocks.ref_counts.count(0)
        assert report.internal == owned * scheduler.config.block_bytes - report.used, "only in last blocks"
    assert reserved > 0
    end = measure(scheduler)
    assert (end.used, end.waste, end.cached + end.free) == (0, 0, end.cache)


def test_blocks_freed_under_a_step_count_as_external_until_it_ends() -> None:
    scheduler = make_scheduler(8)
    scheduler.add_request(Request("a", range(9), SamplingParams()))
    step(scheduler)
    scheduler.blocks.begin_step()
    scheduler.abort("a")
    assert measure(scheduler).external == 2 * 5 * BYTES
    scheduler.blocks.end_step()
    assert measure(scheduler).external == 0


def test_block_map() -> None:
    scheduler = make_scheduler(6)
    scheduler.add_request(Request("a", range(11), SamplingParams(max_tokens=1)))
    step(scheduler)
    scheduler.add_request(Request("b", range(50, 62), SamplingParams(n=2)))
    step(scheduler)
    step(scheduler)
    assert sorted(block_map(scheduler, {})) == [CACHED, CACHED, SHARED, SHARED, TAIL, TAIL]
    scheduler.abort("b")
    assert sorted(block_map(scheduler, {})) == [FREE, FREE, CACHED, CACHED, CACHED, CACHED]


def test_a_mixed_workload_wastes_under_four_percent_where_contiguous_engines_waste_most() -> None:
    """64 requests, prompts 32–512, outputs 32–512; the paper (figure 2) saw 20–38 % useful in contiguous engines."""
    scheduler = make_scheduler(1024, block_size=16)
    trace = MemoryTrace(scheduler)
    add_mixed(scheduler, random.Random(0), 64, (32, 512))
    while scheduler.has_unfinished():
        step(scheduler)
        trace.sample()
    report = trace.report()
    useful = {use.reservation: 1 - use.waste_fraction for use in report.contiguous}
    assert report.waste_fraction < 0.04
    assert report.mean["external"] == 0
    assert useful["max"] < useful["pow2"] < useful["oracle"] < 1 - report.waste_fraction
    assert useful["max"] < 0.4
    assert all(sum(row.values()) == pytest.approx(1) for row in report.shares().values())
    assert json.loads(json.dumps(report.to_dict()))["peak"]["used"] == report.peak.used
    assert "contiguous oracle" in str(report)
    assert all(part in str(report.peak) for part in PARTS)
    assert report.num_sequences == len(trace.spans()) > 64


def test_long_runs_keep_few_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryTrace, "MAX_MAPS", 8)
    scheduler = make_scheduler(40)
    trace = MemoryTrace(scheduler)
    scheduler.add_request(Request("a", [1], SamplingParams(max_tokens=100)))
    while scheduler.has_unfinished():
        step(scheduler)
        trace.sample()
    assert len(trace.samples) == 100
    assert 4 <= len(trace.maps) <= 8
    assert (len(trace.maps) - 1) * trace.map_stride < 100


@pytest.mark.parametrize("name", ["map.png", "map.svg"])
def test_picture(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    scheduler = make_scheduler(30)
    trace = MemoryTrace(scheduler)
    with pytest.raises(ValueError, match="trace: expected at least one sample"):
        plot_memory(trace, tmp_path / name)
    add_mixed(scheduler, random.Random(2), 8, (3, 20))
    while scheduler.has_unfinished():
        step(scheduler)
        trace.sample()
    plot_memory(trace, tmp_path / name)
    assert (tmp_path / name).stat().st_size > 10_000
    with pytest.raises(ValueError, match="path: expected a name that ends in"):
        plot_memory(trace, tmp_path / "map.gif")


def test_first_fit_places_merges_and_knows_its_unusable_holes() -> None:
    arena = FirstFitArena(100)
    first, second, third = (arena.allocate(length) for length in (30, 40, 30))
    assert (first, second, third, arena.allocate(1)) == (0, 30, 70, None)
    arena.free(0, 30)
    arena.free(70, 30)
    assert arena.holes == [(0, 30), (70, 30)]
    assert (arena.num_free, arena.unusable(31), arena.unusable(30)) == (60, 60, 0)
    assert arena.allocate(31) is None
    arena.free(30, 40)
    assert arena.holes == [(0, 100)]


@pytest.mark.parametrize(("reservation", "region"), [("max", 20), ("pow2", 8), ("oracle", 6)])
def test_contiguous_regions(reservation: str, region: int) -> None:
    """One sequence of 4 + 2 tokens holds 4, then 5 of its region: what is to come is reserved, the rest internal."""
    use = simulate_contiguous([Span(0, 4, 6)], reservation, cache_tokens=50, longest=20, max_num_seqs=4)  # type: ignore[arg-type]
    assert (use.num_steps, use.used, use.reserved, use.internal) == (2, 4.5, 1.5, region - 6)
