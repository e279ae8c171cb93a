"""Whatever is asked of the scheduler, in whatever order: every request gets the tokens it would get alone, and every
block comes back.

The model is a fake that remembers: its cache holds, for each slot, a fingerprint of the text up to that position.
Attention checks that a sequence finds its own text behind its block table, so a block that is overwritten, shared
wrongly, copied late or named wrongly is caught at the next step that reads it.
"""

import random
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import permutations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from octavo.engine.config import EngineConfig
from octavo.engine.request import Request, Sequence
from octavo.engine.sampling_params import BeamSearchParams, SamplingParams
from octavo.engine.scheduler import PRIORITY_SECONDS, Scheduler
from octavo.engine.step import SchedulerOutput, StepResult, TopLogprobs

VOCABULARY = 11
EOS = 0

Beam = tuple[float, list[int], list[tuple[float, int]]]  # score, text, best continuations


def fingerprints(token_ids: list[int], salt: str | None) -> list[int]:
    """For each position, a number that stands for the text up to it. A salt is part of it: tenants must not meet."""
    prints, text = [], hash(salt)
    for token in token_ids:
        text = hash((text, token))
        prints.append(text)
    return prints


def next_token(token_ids: list[int], candidate: int) -> int:
    return hash((*token_ids, candidate, "draw")) % VOCABULARY


def likeliest(token_ids: list[int], width: int) -> list[tuple[float, int]]:
    scores = [(-((hash((*token_ids, token)) % 997) + 1) / 100, token) for token in range(VOCABULARY)]
    return sorted(scores, reverse=True)[: 2 * width]


@dataclass
class Launched:
    """A step as the device gets it: what the runner read between `schedule` and the next call of the scheduler."""

    output: SchedulerOutput
    texts: list[list[int]]
    pending: list[int]
    starts: list[int]
    tables: list[list[int]]


@dataclass
class FakeModel:
    """Executes steps as step.py's contract says, in order and as late as possible, on a cache of fingerprints."""

    block_size: int
    sliding_window: int = 0
    cache: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    sampled: dict[int, int] = field(default_factory=dict)  # the newest token of each sequence, as on a device

    def launch(self, output: SchedulerOutput) -> Launched:
        sequences = [entry.seq for entry in output.scheduled]
        return Launched(
            output,
            [list(seq.token_ids) for seq in sequences],
            [seq.num_pending_tokens for seq in sequences],
            [seq.num_computed_tokens for seq in sequences],
            [list(seq.block_table) for seq in sequences],
        )

    def execute(self, step: Launched) -> StepResult:
        output = step.output
        contents = [dict(self.cache[copy.src]) for copy in output.block_copies]
        for copy, content in zip(output.block_copies, contents, strict=True):
            self.cache[copy.dst] = content
        for text, pending, (seq, *_) in zip(step.texts, step.pending, output.scheduled, strict=True):
            text += [self.sampled[seq.seq_id]] if pending else []
        for text, start, table, (seq, num_new, _) in zip(
            step.texts, step.starts, step.tables, output.scheduled, strict=True
        ):
            prints = fingerprints(text, seq.request.cache_salt)
            for position in range(start, start + num_new):
                self.cache[table[position // self.block_size]][position % self.block_size] = prints[position]
        rows: list[int] = []
        top: dict[int, TopLogprobs] = {}
        for text, start, table, (seq, num_new, num_samples) in zip(
            step.texts, step.starts, step.tables, output.scheduled, strict=True
        ):
            self.attend(seq, text[: start + num_new], table, start)
            if num_samples and seq.request.is_beam_search:
                best = likeliest(text, seq.request.params.beam_width)
                top[len(rows)] = TopLogprobs([token for _, token in best], [score for score, _ in best], 1)
            if num_samples == 1:
                self.sampled[seq.seq_id] = next_token(text, seq.index)
            rows += [next_token(text, seq.index + extra) for extra in range(num_samples)]
        return StepResult(rows, [-0.5] * len(rows), top)

    def attend(self, seq: Sequence, text: list[int], table: list[int], start: int) -> None:
        """The tokens from position `start` on look at all before them, or at what is in their window."""
        first = max(start + 1 - self.sliding_window, 0) if self.sliding_window else 0
        for position, expected in enumerate(fingerprints(text, seq.request.cache_salt)):
            if position < first:
                continue
            block, slot = table[position // self.block_size], position % self.block_size
            assert self.cache[block].get(slot) == expected, f"{seq} finds another text at position {position}"


@dataclass
class Beams:
    """Beam search over Scheduler.fork, append and finish: the same choice as `beams_alone`."""

    pending: dict[int, list[tuple[float, int]]] = field(default_factory=dict)

    def advance(self, scheduler: Scheduler, request: Request) -> None:
        live = list(request.sequences)
        if any(seq.seq_id not in self.pending for seq in live):
            return
        candidates = [(seq.cumulative_logprob, seq.token_ids, self.pending.pop(seq.seq_id)) for seq in live]
        heirs = defaultdict(list)
        for parent, token, logprob in choose_beams(candidates, request.params.beam_width):
            heirs[parent].append((token, logprob))
        children = []
        for parent, seq in enumerate(live):
            bodies = [seq, *(scheduler.fork(seq) for _ in heirs[parent][1:])]
            children += [(body, *heir) for body, heir in zip(bodies, heirs[parent], strict=False)]
        for parent, seq in enumerate(live):
            if not heirs[parent]:
                scheduler.finish(seq, "stop")
        for body, token, logprob in children:
            scheduler.append(body, token, logprob)


def choose_beams(beams: list[Beam], width: int) -> list[tuple[int, int, float]]:
    """(parent, token, logprob) of the best continuations. The text breaks ties, not the order of the beams."""
    scored = [
        (round(total + score, 6), [*text, token], parent, token, score)
        for parent, (total, text, best) in enumerate(beams)
        for score, token in best
    ]
    return [(parent, token, score) for _, _, parent, token, score in sorted(scored, reverse=True)[:width]]


def beams_alone(prompt: list[int], params: BeamSearchParams) -> list[list[int]]:
    beams = [(0.0, list(prompt))]
    for _ in range(params.max_tokens):
        candidates = [(total, text, likeliest(text, params.beam_width)) for total, text in beams]
        chosen = choose_beams(candidates, params.beam_width)
        beams = [(beams[parent][0] + score, [*beams[parent][1], token]) for parent, token, score in chosen]
    return sorted(text[len(prompt) :] for _, text in beams)


def tokens_alone(request: Request, candidate: int, longest: int) -> list[int]:
    params, text = request.params, list(request.prompt_token_ids)
    limit = min(longest, len(text) + params.max_tokens)
    output: list[int] = []
    while len(text) < limit:
        output.append(next_token(text, candidate))
        text.append(output[-1])
        if output[-1] in request.ending_token_ids and len(output) >= params.min_tokens:
            break
    return output


class Engine:
    """Scheduler and fake model, with a step that can be split in two, and the checks that hold after each half."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.model = FakeModel(config.block_size, config.sliding_window)
        self.beams = Beams()
        self.accepted: list[Request] = []
        self.beam_results: dict[str, list[list[int]]] = {}
        self.launched: list[Launched] = []  # oldest first
        self.num_ahead = 0

    def add(self, request: Request) -> bool:
        try:
            self.scheduler.add_request(request)
        except ValueError:
            return False
        self.accepted.append(request)
        return True

    def begin(self) -> None:
        """Decides and launches a step, with none in flight."""
        output = self.scheduler.schedule()
        self._launch(output)
        assert bool(output.scheduled) == any(not r.finished for r in self.accepted), "work is done while there is any"

    def begin_ahead(self) -> None:
        """Decides and launches the step after the one in flight, where the scheduler can."""
        output = self.scheduler.schedule_ahead()
        if output is not None:
            self._launch(output)
            assert output.scheduled
            assert not output.preempted
            self.num_ahead += 1

    def _launch(self, output: SchedulerOutput) -> None:
        self.launched.append(self.model.launch(output))
        self.scheduler.check_integrity()
        sizes = [entry.num_new_tokens for entry in output.scheduled]
        assert sum(sizes) == output.num_batched_tokens <= self.config.max_num_batched_tokens
        assert len(sizes) <= self.config.max_num_seqs
        assert all(size > 0 for size in sizes)
        assert len({entry.seq.seq_id for entry in output.scheduled}) == len(sizes)

    def end(self) -> None:
        """Executes and records the oldest step in flight."""
        step = self.launched.pop(0)
        result = self.model.execute(step)
        rows = self.scheduler.update(step.output, result)
        self.scheduler.check_integrity()
        for row, seq in enumerate(rows):
            if seq is not None and seq.request.is_beam_search and not seq.finished:
                top = result.top_logprobs[row]
                self.beams.pending[seq.seq_id] = list(zip(top.logprobs, top.token_ids, strict=True))
        searches = {seq.request for seq in rows if seq is not None and seq.request.is_beam_search}
        for request in {request for request in searches if not request.finished}:
            self.beams.advance(self.scheduler, request)
            if request.sequences[0].num_output_tokens == request.params.max_tokens:
                self.beam_results[request.request_id] = sorted(seq.output_token_ids for seq in request.sequences)
                self.scheduler._finish_all(request, "length")
        self.scheduler.check_integrity()

    def step(self, ahead: bool = False) -> None:
        """One step; with `ahead` the next is launched before this one is recorded, as `LLMEngine.step` does."""
        if not self.launched:
            self.begin()
        if ahead and len(self.launched) == 1:
            self.begin_ahead()
        self.end()

    def fail(self) -> None:
        self.launched.clear()
        failed = self.scheduler.fail_step()
        assert all(request.finished for request in failed)

    def drain(self, ahead: bool = False) -> None:
        live = [request for request in self.accepted if not request.finished]
        work = sum(r.num_candidates * (len(r.prompt_token_ids) + r.params.max_tokens) for r in live)
        for _ in range(2 * work + 1 + len(self.launched)):
            if not self.scheduler.has_unfinished() and not self.launched:
                break
            self.step(ahead)
        assert not self.scheduler.has_unfinished(), "every request ends within twice the steps of running one by one"
        self.check_results()

    def check_results(self) -> None:
        blocks = self.scheduler.blocks
        assert blocks.num_free_blocks == self.config.num_blocks, "all blocks are back"
        for request in self.accepted:
            assert request.finished
            if request.is_beam_search:
                if request.request_id in self.beam_results:
                    expected = beams_alone(list(request.prompt_token_ids), request.params)
                    assert self.beam_results[request.request_id] == expected
                continue
            for seq in request.sequences:
                alone = tokens_alone(request, seq.index, self.config.max_sequence_len)
                if seq.finish_reason in ("abort", "error"):
                    assert seq.output_token_ids == alone[: seq.num_output_tokens]
                else:
                    assert seq.output_token_ids == alone
        untouched = [r for r in self.accepted if all(s.finish_reason not in ("abort", "error") for s in r.sequences)]
        assert all(len(r.sequences) == r.num_candidates for r in untouched if not r.is_beam_search)


def configs(rng: random.Random, **fixed: object) -> EngineConfig:
    block_size = rng.choice([1, 2, 3, 4, 5, 7, 16])
    max_num_seqs = rng.choice([1, 2, 3, 5, 8])
    options: dict[str, object] = {
        "num_blocks": rng.randint(1, 24 if block_size < 4 else 12),
        "block_size": block_size,
        "max_model_len": rng.randint(8, 60),
        "kv_bytes_per_token": 12,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_seqs + rng.choice([0, 1, 3, 10, 40]),
        "enable_prefix_caching": rng.random() < 0.7,
        "scheduling_policy": rng.choice(["fcfs", "priority"]),
        "sliding_window": rng.choice([0, 0, 1, 4, 9, 20]),
    }
    return EngineConfig(**{**options, **fixed})  # type: ignore[arg-type]


def make_request(rng: random.Random, name: str) -> Request:
    """Few prefixes, so that many are shared; sometimes a prompt that cannot fit."""
    prefix = [1 + (i * rng.choice([1, 2])) % (VOCABULARY - 1) for i in range(rng.choice([0, 3, 8, 16]))]
    prompt = prefix + [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(1, 9))]
    max_tokens = rng.randint(1, 14)
    if rng.random() < 0.2:
        params: SamplingParams | BeamSearchParams = BeamSearchParams(
            beam_width=rng.randint(1, 3), max_tokens=min(max_tokens, 6)
        )
    else:
        params = SamplingParams(
            n=rng.choice([1, 1, 1, 2, 3]),
            max_tokens=max_tokens,
            min_tokens=rng.randint(0, max_tokens) if rng.random() < 0.3 else 0,
            stop_token_ids=[5] if rng.random() < 0.2 else [],
            ignore_eos=rng.random() < 0.5,
        )
    salt = rng.choice([None, None, None, "a", "b"])
    return Request(name, prompt, params, priority=rng.randint(-1, 1), cache_salt=salt, eos_token_ids=[EOS])


class SchedulerMachine(RuleBasedStateMachine):
    """Hypothesis chooses the order of additions, steps, aborts (also in mid-step), stop strings and failures."""

    requests = Bundle("requests")

    @initialize(seed=st.integers(0, 2**32 - 1))
    def start(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.engine = Engine(configs(self.rng))
        self.names = 0

    @rule(target=requests)
    def add(self) -> str:
        self.names += 1
        name = f"request {self.names}"
        self.engine.add(make_request(self.rng, name))
        return name

    @rule(times=st.integers(1, 6), ahead=st.booleans())
    def step(self, times: int, ahead: bool) -> None:
        for _ in range(times):
            self.engine.step(ahead)

    @rule()
    def begin(self) -> None:
        if not self.engine.launched:
            self.engine.begin()
        elif len(self.engine.launched) == 1:
            self.engine.begin_ahead()

    @rule()
    def complete(self) -> None:
        if self.engine.launched:
            self.engine.end()

    @rule()
    def fail(self) -> None:
        if self.engine.launched:
            self.engine.fail()

    @rule(name=requests)
    def abort(self, name: str) -> None:
        live = name in self.engine.scheduler.requests
        assert self.engine.scheduler.abort(name) is live

    @rule(name=requests)
    def stop_string(self, name: str) -> None:
        request = self.engine.scheduler.requests.get(name)
        if request is not None and not request.is_beam_search:
            self.engine.scheduler.finish(request.sequences[-1], "abort")

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "engine"):
            self.engine.scheduler.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.drain()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@given(arrivals=st.lists(st.tuples(st.integers(0, 300), st.integers(-3, 3)), min_size=2, max_size=25))
def test_priority_overtakes_for_a_bounded_time_only(arrivals: list[tuple[int, int]]) -> None:
    """One seat, ten seconds a step, nine steps a request, so that a queue builds up."""
    config = EngineConfig(
        num_blocks=4, max_model_len=16, kv_bytes_per_token=1, max_num_seqs=1, scheduling_policy="priority"
    )
    engine = Engine(config)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    coming = [
        Request(str(i), [1 + i % 9], params, arrival_time=arrival, priority=priority)
        for i, (arrival, priority) in enumerate(sorted(arrivals))
    ]
    starts: dict[str, int] = {}
    now = 0
    while coming or engine.scheduler.has_unfinished():
        while coming and coming[0].metrics.arrival_time <= now:
            engine.add(coming.pop(0))
        if engine.scheduler.has_unfinished():
            engine.step()
        for request in engine.accepted:
            if request.metrics.first_scheduled_time is not None:
                starts.setdefault(request.request_id, now)
        now += 10
    assert len(starts) == len(arrivals), "all were served"
    for first, later in permutations(engine.accepted, 2):
        began = starts[first.request_id]
        if began < starts[later.request_id] and later.metrics.arrival_time <= began:  # `later` waited, too
            headstart = first.metrics.arrival_time - later.metrics.arrival_time
            assert headstart <= PRIORITY_SECONDS * (later.priority - first.priority), "no more than priority is worth"
            if abs(headstart) < PRIORITY_SECONDS:
                assert first.priority <= later.priority, "lower goes first among those of about one time"


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("caching", [True, False])
def test_thousands_of_requests_through_tiny_caches(policy: str, caching: bool) -> None:
    finished = preemptions = hits = ahead = 0
    for seed in range(40):
        rng = random.Random(f"{policy} {caching} {seed}")
        engine = Engine(configs(rng, scheduling_policy=policy, enable_prefix_caching=caching))
        for number in range(30):
            engine.add(make_request(rng, f"{number}"))
            if rng.random() < 0.5 and engine.scheduler.has_unfinished():
                engine.step(ahead=bool(seed % 2))
            if rng.random() < 0.05 and engine.accepted:
                engine.scheduler.abort(rng.choice(engine.accepted).request_id)
        engine.drain(ahead=bool(seed % 2))
        ahead += engine.num_ahead
        finished += len(engine.accepted)
        preemptions += engine.scheduler.num_preemptions
        hits += engine.scheduler.blocks.prefix_cache.num_hit_tokens if caching else 0
    assert finished > 500
    assert preemptions > 100, "the caches were tiny enough"
    assert ahead > 100, "steps were scheduled ahead"
    assert (hits > 1000) is caching
