"""Single rules of the scheduler; what holds in any order of events is in test_scheduler_properties.py."""

from typing import Any

import pytest

from octavo.engine.config import EngineConfig
from octavo.engine.outputs import Logprob
from octavo.engine.request import Request, Sequence
from octavo.engine.sampling_params import BeamSearchParams, SamplingParams
from octavo.engine.scheduler import Scheduler
from octavo.engine.step import PromptChunkLogprobs, SchedulerOutput, StepResult

EOS = 99


def make_scheduler(**options: Any) -> Scheduler:
    sizes = {"num_blocks": 20, "max_model_len": 64, "kv_bytes_per_token": 5, "block_size": 4, "max_num_seqs": 8}
    return Scheduler(EngineConfig(**{**sizes, "max_num_batched_tokens": 32, **options}))


def add(scheduler: Scheduler, name: str, prompt: int, *, priority: int = 0, first: int = 0, **params: Any) -> Request:
    params = {"max_tokens": 8, **params}
    tokens = range(first, first + prompt)
    request = Request(name, tokens, SamplingParams(**params), priority=priority, eos_token_ids=[EOS])
    scheduler.add_request(request)
    return request


def step(scheduler: Scheduler, *tokens: int) -> tuple[SchedulerOutput, list[Sequence]]:
    """One step; tokens are sampled in order, 1 when there are no more."""
    output = scheduler.schedule()
    rows = sum(entry.num_samples for entry in output.scheduled)
    sequences = scheduler.update(output, StepResult([*tokens, *[1] * rows][:rows], [-1.0] * rows))
    scheduler.check_integrity()
    return output, sequences


def sizes(output: SchedulerOutput) -> dict[str, int]:
    return {entry.seq.request.request_id: entry.num_new_tokens for entry in output.scheduled}


def test_a_long_prompt_is_chunked_and_decodes_go_on_beside_it() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    add(scheduler, "short", 3)
    step(scheduler)
    add(scheduler, "long", 40, first=50)
    output, rows = step(scheduler)
    assert sizes(output) == {"short": 1, "long": 15}
    assert [seq.request.request_id for seq in rows] == ["short"], "a chunk that does not end the prompt samples nothing"
    assert sizes(step(scheduler)[0]) == {"short": 1, "long": 15}
    assert sizes(step(scheduler)[0]) == {"short": 1, "long": 10}
    assert sizes(step(scheduler)[0]) == {"short": 1, "long": 1}


def test_requests_of_one_step_already_share_their_beginning() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 9)
    second = add(scheduler, "b", 9)
    output, _ = step(scheduler)
    assert sizes(output) == {"a": 9, "b": 1}
    assert second.sequences[0].num_cached_tokens == 8


def test_n_candidates_compute_the_prompt_once() -> None:
    scheduler = make_scheduler()
    request = add(scheduler, "a", 6, n=3)
    output, rows = step(scheduler, 7, 8, 9)
    assert (output.num_batched_tokens, output.scheduled[0].num_samples) == (6, 3)
    assert rows == request.sequences
    assert [seq.output_token_ids for seq in rows] == [[7], [8], [9]]
    assert len({tuple(seq.block_table) for seq in rows}) == 1
    output, _ = step(scheduler)
    assert len(output.block_copies) == 2, "the last of three writes in place"
    assert len({seq.block_table[0] for seq in rows}) == 1


def test_the_latest_is_preempted_and_computes_its_tokens_again() -> None:
    scheduler = make_scheduler(num_blocks=4, enable_prefix_caching=False)
    add(scheduler, "first", 8)
    latest = add(scheduler, "latest", 4, first=50)
    output, _ = step(scheduler, 31, 32)
    while not output.preempted:
        output, _ = step(scheduler)
    assert output.preempted == (latest.sequences[0],)
    kept = list(latest.sequences[0].token_ids)
    while latest.request_id not in sizes(output):
        output, _ = step(scheduler)
    assert sizes(output)[latest.request_id] == len(kept)
    assert latest.sequences[0].token_ids[: len(kept)] == kept


def test_a_later_prompt_that_is_still_chunked_is_preempted_before_an_earlier_decode() -> None:
    scheduler = make_scheduler(num_blocks=6, max_num_batched_tokens=12)
    add(scheduler, "first", 8)
    latest = add(scheduler, "latest", 16, first=50)
    assert sizes(step(scheduler)[0]) == {"first": 8, "latest": 4}
    output, _ = step(scheduler)
    assert output.preempted == (latest.sequences[0],)
    assert sizes(output) == {"first": 1}


def test_priority_goes_first_and_fcfs_ignores_it() -> None:
    for policy, expected in (("priority", "urgent"), ("fcfs", "early")):
        scheduler = make_scheduler(max_num_seqs=1, scheduling_policy=policy)
        add(scheduler, "early", 4, priority=5)
        add(scheduler, "urgent", 4, priority=-5, first=50)
        assert [*sizes(step(scheduler)[0])] == [expected]


def test_who_does_not_fit_is_not_overtaken() -> None:
    scheduler = make_scheduler(num_blocks=6)
    add(scheduler, "running", 12)
    step(scheduler)
    add(scheduler, "big", 20, first=50)
    add(scheduler, "small", 1, first=80)
    assert [*sizes(step(scheduler)[0])] == ["running"]


@pytest.mark.parametrize(
    ("token", "params", "reason", "stop_reason"),
    [
        (EOS, {}, "stop", None),
        (5, {"stop_token_ids": [5]}, "stop", 5),
        (5, {"max_tokens": 1}, "length", None),
        (EOS, {"ignore_eos": True}, None, None),
        (EOS, {"min_tokens": 2}, None, None),
    ],
)
def test_ends(token: int, params: dict[str, Any], reason: str | None, stop_reason: int | None) -> None:
    scheduler = make_scheduler()
    request = add(scheduler, "a", 3, **params)
    _, (seq,) = step(scheduler, token)
    assert (seq.finish_reason, seq.stop_reason) == (reason, stop_reason)
    assert request.finished is (reason is not None) is not scheduler.has_unfinished()


def test_a_sequence_ends_with_the_context_or_the_cache() -> None:
    for options, longest in (({"max_model_len": 10}, 10), ({"num_blocks": 2}, 9)):
        scheduler = make_scheduler(**options)
        request = add(scheduler, "a", 3, max_tokens=None)
        while scheduler.has_unfinished():
            step(scheduler)
        assert request.sequences[0].num_tokens == longest
        assert request.sequences[0].finish_reason == "length"


def test_what_can_never_run_is_refused_at_once_with_the_numbers() -> None:
    scheduler = make_scheduler(num_blocks=3, max_num_seqs=2)
    with pytest.raises(
        ValueError, match=r"13 tokens need 4 blocks \(80 bytes\), the whole cache has 3 \(60 bytes, 12 "
    ):
        add(scheduler, "a", 13)
    with pytest.raises(ValueError, match=r"prompt_token_ids: expected fewer than max_model_len \(64\) tokens.* got 64"):
        add(scheduler, "a", 64)
    with pytest.raises(ValueError, match=r"n: expected at most max_num_seqs \(2\), got 3"):
        add(scheduler, "a", 2, n=3)
    with pytest.raises(ValueError, match=r"max_tokens: .* beam search can add 11, got 12"):
        scheduler.add_request(Request("a", [1, 2], BeamSearchParams(beam_width=2, max_tokens=12)))
    assert not scheduler.has_unfinished()
    add(scheduler, "a", 12)
    with pytest.raises(ValueError, match="request_id: 'a' is in use"):
        add(scheduler, "a", 2)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("prompt_token_ids", {"prompt_token_ids": []}),
        ("prompt_token_ids", {"prompt_token_ids": [-1]}),
        ("prompt_token_ids", {"prompt_token_ids": [True]}),
        ("prompt_token_ids", {"prompt_token_ids": [2**31]}),
        ("priority", {"priority": 1.5}),
        ("priority", {"priority": 2**31}),
        ("cache_salt", {"cache_salt": ""}),
    ],
)
def test_bad_requests_name_the_field(field: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        Request("a", **{"prompt_token_ids": [1], "params": SamplingParams(), **arguments})


def test_an_abort_in_flight_leaves_the_sequence_whole_until_update() -> None:
    scheduler = make_scheduler(enable_prefix_caching=False)
    request = add(scheduler, "a", 6, n=2)
    output = scheduler.schedule()
    table = list(request.sequences[0].block_table)
    assert scheduler.abort("a")
    assert not scheduler.abort("a")
    assert request.sequences[0].block_table == table
    assert scheduler.blocks.num_free_blocks == 18
    rows = scheduler.update(output, StepResult([7, 8]))
    assert rows == [None, None]
    assert request.sequences[0].finish_reason == "abort"
    assert request.sequences[0].output_token_ids == []
    assert scheduler.blocks.num_free_blocks == 20


def test_a_failed_step_ends_its_requests_and_its_blocks_are_never_found_again() -> None:
    scheduler = make_scheduler()
    failed = add(scheduler, "a", 9)
    scheduler.schedule()
    assert scheduler.fail_step() == [failed]
    assert failed.sequences[0].finish_reason == "error"
    add(scheduler, "b", 9)
    assert sizes(step(scheduler)[0]) == {"b": 9}, "blocks that were named but not written must not be reused"


def test_a_prompt_that_reports_logprobs_is_computed_whole() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 9)
    step(scheduler)
    request = add(scheduler, "b", 9, prompt_logprobs=1)
    output = scheduler.schedule()
    assert sizes(output)["b"] == 9
    chunk = PromptChunkLogprobs(request.sequences[0], 0, [None, *({1: Logprob(-1.0)} for _ in range(8))])
    scheduler.update(output, StepResult([1, 1], prompt_logprobs=(chunk,)))
    assert request.prompt_logprobs == chunk.logprobs


def test_beams_fork_and_end_between_steps() -> None:
    scheduler = make_scheduler()
    scheduler.add_request(Request("a", range(6), BeamSearchParams(beam_width=2, max_tokens=3)))
    _, (beam,) = step(scheduler)
    assert beam.awaiting_token
    twin = scheduler.fork(beam)
    scheduler.append(beam, 7, -0.5)
    scheduler.append(twin, 8, -0.7)
    output, rows = step(scheduler)
    assert rows == [beam, twin]
    assert len(output.block_copies) == 1
    assert [seq.cumulative_logprob for seq in rows] == [-0.5, -0.7]
    scheduler.finish(twin, "stop")
    scheduler.finish(beam, "stop")
    assert not scheduler.has_unfinished()
    assert scheduler.blocks.num_free_blocks == 20
