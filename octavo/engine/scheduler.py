"""Which tokens are computed in the next step: continuous batching, chunked prefill, preemption, forks.

Sequences that hold blocks stand in one of three lists, those without in a fourth, each sorted by `Sequence.order`
(under the priority policy arrival time + priority · PRIORITY_SECONDS; then arrival, then candidate):

    waiting      new or preempted           → prefilling, when all blocks of its tokens are free: they are promised to
    it prefilling   more than one token left   → decoding, when its last token is computed
    decoding     one token left             → the end, or back to waiting when preempted
    awaiting     of a beam search: nothing left before the engine appends the next token

A step takes one token of every decoding sequence, then chunks of the prefilling ones, then admits from waiting, all
under one budget. Only decodes can run out of memory, since prompts have theirs promised; then the last in order of all
holders is preempted: its blocks are freed and its tokens, which it keeps, are computed again later. The first in order
can thus always run, and any sequence that was accepted fits into an empty cache, so something always runs: nothing
hangs and nothing is dropped. Nor does anything starve: who arrives more than PRIORITY_SECONDS later for each step of
priority that he is ahead stands behind, so a request of priority p is overtaken only by those that arrive within
(p − the lowest priority in use) · PRIORITY_SECONDS after it.
"""

import time
from bisect import bisect_left, insort
from itertools import pairwise
from operator import attrgetter

from octavo.engine.block_manager import BlockManager
from octavo.engine.config import EngineConfig
from octavo.engine.request import FinishReason, Request, Sequence, SequenceStatus
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import BlockCopy, ScheduledSequence, SchedulerOutput, StepResult

PRIORITY_SECONDS = 60  # of waiting that make up for one step of priority

_order = attrgetter("order")


class Scheduler:
    """Owns requests from `add_request` until they have finished; not thread-safe.

    A step goes schedule → (run) → update. While one is in flight, `schedule_ahead` may decide the next, so that a GPU
    never waits for its tokens to be read: steps are recorded in their order, and at most two are in flight. `abort` and
    `finish` may be called at any time; a sequence in flight keeps its blocks until the update of its last step.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.blocks = BlockManager(
            config.num_blocks, config.block_size, config.enable_prefix_caching, config.sliding_window
        )
        self.requests: dict[str, Request] = {}
        self.waiting: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.decoding: list[Sequence] = []
        self.awaiting: list[Sequence] = []
        self.num_preemptions = 0
        self.in_flight: list[SchedulerOutput] = []  # oldest first
        self._assumed: SchedulerOutput | None = None  # the last step in flight that `_assume` moved on
        self._forks_in_flight = False
        self._num_looking_back = 0  # requests whose next token needs the values of those before it
        self._num_arrivals = 0

    # Requests in

    def add_request(self, request: Request) -> None:
        """Accepts a request, or refuses it with a ValueError if it could never run here."""
        self._refuse_unservable(request)
        self.requests[request.request_id] = request
        self._num_looking_back += request.looks_back
        self._num_arrivals += 1
        (seq,) = request.sequences
        by_priority = self.config.scheduling_policy == "priority"
        turn = request.metrics.arrival_time + request.priority * PRIORITY_SECONDS if by_priority else 0.0
        seq.order = (turn, self._num_arrivals, 0)
        longest = self.config.max_sequence_len
        max_tokens = request.params.max_tokens
        seq.max_tokens_total = longest if max_tokens is None else min(longest, seq.num_tokens + max_tokens)
        insort(self.waiting, seq, key=_order)

    def _refuse_unservable(self, request: Request) -> None:
        config, prompt = self.config, len(request.prompt_token_ids)
        if request.request_id in self.requests:
            raise ValueError(f"request_id: {request.request_id!r} is in use; choose another or wait for its end")
        if request.num_candidates > config.max_num_seqs:
            field = "beam_width" if request.is_beam_search else "n"
            raise ValueError(
                f"{field}: expected at most max_num_seqs ({config.max_num_seqs}), got {request.num_candidates}"
            )
        if prompt >= config.max_model_len:
            raise ValueError(
                f"prompt_token_ids: expected fewer than max_model_len ({config.max_model_len}) tokens, so that one can "
                f"follow, got {prompt}; shorten the prompt"
            )
        if prompt > config.cache_tokens:
            needed = self.blocks.blocks_for(prompt)
            raise ValueError(
                f"prompt_token_ids: {prompt} tokens need {needed} blocks ({needed * config.block_bytes:,} "
                f"bytes), the whole cache has {config.num_blocks} ({config.cache_bytes:,} bytes, {config.cache_tokens} "
                f"tokens); shorten the prompt or enlarge the cache"
            )
        if request.is_beam_search and prompt + (request.params.max_tokens or 0) > config.max_sequence_len:
            raise ValueError(
                f"max_tokens: the prompt has {prompt} tokens and sequences here at most "
                f"{config.max_sequence_len}, so beam search can add {config.max_sequence_len - prompt}, got "
                f"{request.params.max_tokens}"
            )

    def has_unfinished(self) -> bool:
        return bool(self.requests)

    # A step out

    def schedule(self) -> SchedulerOutput:
        """Decides the next step, with none in flight. It is empty only when nothing is left to compute."""
        assert not self.in_flight, "update the step in flight first"
        output = self._decide()
        assert output.scheduled or not (self.waiting or self.decoding or self.prefilling), "something can always run"
        return self._launch(output)

    def schedule_ahead(self) -> SchedulerOutput | None:
        """Decides the step after the one in flight, whose tokens are not known yet; None when that has to wait for them
        or when nothing would run.

        It waits for requests that look back at their tokens, for forks, and where memory is short: a sequence in flight
        is never preempted. A sequence that turns out to have ended is computed once too often; that token is dropped.
        """
        if len(self.in_flight) != 1 or self._num_looking_back or self.awaiting:
            return None
        self._assume(self.in_flight[0])
        if self._forks_in_flight or len(self.decoding) > self.blocks.num_unpromised_blocks:
            return None  # each decode takes at most one block
        output = self._decide()
        return self._launch(output) if output.scheduled else None

    def _launch(self, output: SchedulerOutput) -> SchedulerOutput:
        self.in_flight.append(output)
        self.blocks.begin_step()
        return output

    def _decide(self) -> SchedulerOutput:
        scheduled: list[ScheduledSequence] = []
        copies: list[BlockCopy] = []
        preempted: list[Sequence] = []
        self._schedule_decodes(scheduled, copies, preempted)
        budget = self.config.max_num_batched_tokens - len(scheduled)
        budget = self._schedule_prefills(scheduled, budget)
        if self.waiting and not (preempted and scheduled):
            budget = self._admit(scheduled, budget, preempted)
        num_batched_tokens = self.config.max_num_batched_tokens - budget
        return SchedulerOutput(tuple(scheduled), tuple(copies), tuple(preempted), num_batched_tokens)

    def _schedule_decodes(
        self, scheduled: list[ScheduledSequence], copies: list[BlockCopy], preempted: list[Sequence]
    ) -> None:
        while len(self.decoding) > self.config.max_num_seqs:  # a beam search forked beyond its seats
            self._preempt(self.decoding[-1], preempted)
        for seq in self.decoding:  # shrinks at its end while we walk: who is preempted is last in order
            if seq.num_computed_tokens >= seq.num_writable_tokens:
                self.blocks.give_back_unseen(seq)
                if not self._make_room(seq, preempted):
                    break
                copy = self.blocks.extend(seq, seq.num_computed_tokens + 1)
                if copy is not None:
                    copies.append(copy)
            scheduled.append(seq.decode_entry or ScheduledSequence(seq, 1, 1))

    def _make_room(self, seq: Sequence, preempted: list[Sequence]) -> bool:
        """Preempts from the last in order until the next token of seq has a slot; False if it came to seq itself."""
        while self.blocks.blocks_needed(seq, seq.num_computed_tokens + 1) > self.blocks.num_unpromised_blocks:
            holders = (self.decoding, self.prefilling, self.awaiting)
            last = max((group[-1] for group in holders if group), key=_order)
            self._preempt(last, preempted)
            if last is seq:
                return False
        return True

    def _schedule_prefills(self, scheduled: list[ScheduledSequence], budget: int) -> int:
        for seq in self.prefilling:
            if budget == 0:
                break
            budget -= self._schedule_chunk(seq, scheduled, budget)
        return budget

    def _schedule_chunk(self, seq: Sequence, scheduled: list[ScheduledSequence], budget: int) -> int:
        left = len(seq.token_ids) - seq.num_computed_tokens
        chunk = min(left, budget)
        copy = self.blocks.extend(seq, seq.num_computed_tokens + chunk)
        assert copy is None, "an admitted sequence shares full blocks only"
        num_samples = 0 if chunk < left else self._num_samples(seq.request)
        scheduled.append(ScheduledSequence(seq, chunk, num_samples))
        return chunk

    def _num_samples(self, request: Request) -> int:
        return 1 if request.forked or request.is_beam_search else request.num_candidates

    def _admit(self, scheduled: list[ScheduledSequence], budget: int, preempted: list[Sequence]) -> int:
        """Admits in order while seats, budget and memory last. The first that does not fit holds the others back: none
        starves.

        Each decoding sequence is left a block to grow into, so that an admission is not undone by the next steps.
        """
        free_seats = self.config.max_num_seqs - len(self.decoding) - len(self.awaiting)
        free_seats -= sum(_seats(seq) for seq in self.prefilling)
        while self.waiting and budget:
            seq = self.waiting[0]
            reuse, spare = not _wants_prompt_logprobs(seq.request), len(self.decoding)
            if _seats(seq) > free_seats or not self.blocks.admit(seq, spare, reuse):
                if scheduled or not self.awaiting:
                    break
                self._preempt(self.awaiting[-1], preempted)  # beams that wait for this one's turn
                free_seats += 1
                continue
            self.waiting.pop(0)
            self._start(seq)
            free_seats -= _seats(seq)
            budget -= self._schedule_chunk(seq, scheduled, budget)
        return budget

    def _start(self, seq: Sequence) -> None:
        insort(self.prefilling, seq, key=_order)
        seq.status = SequenceStatus.RUNNING
        metrics = seq.request.metrics
        if metrics.first_scheduled_time is None:
            metrics.first_scheduled_time = time.monotonic()
            seq.num_cached_tokens = seq.num_computed_tokens

    def _preempt(self, seq: Sequence, preempted: list[Sequence]) -> None:
        self._leave_list(seq)
        self.blocks.free(seq)
        seq.status = SequenceStatus.WAITING
        if not seq.awaiting_token:
            insort(self.waiting, seq, key=_order)
        self.num_preemptions += 1
        seq.request.metrics.num_preemptions += 1
        preempted.append(seq)

    def _leave_list(self, seq: Sequence) -> None:
        """Takes seq out of whichever list it stands in; a preempted beam that awaits its token stands in none."""
        for group in (self.decoding, self.prefilling, self.awaiting, self.waiting):
            at = bisect_left(group, seq.order, key=_order)
            if at < len(group) and group[at] is seq:
                del group[at]
                return

    # A step's result in

    def update(self, output: SchedulerOutput, result: StepResult) -> list[Sequence | None]:
        """Records the oldest step in flight. Returns the sequence of each row of the result, in its order, so that
        `zip` pairs each with its new token.

        None stands for a sequence that had ended before: aborted meanwhile, or by the token before, which was not known
        when the step was scheduled; the token was dropped. A beam's token is not appended either: its `awaiting_token`
        is set, and the engine calls `append`, `fork` and `finish` before the next schedule.
        """
        assert output is self.in_flight[0], "steps are recorded in the order in which they were scheduled"
        self._assume(output)
        del self.in_flight[0]
        self._forks_in_flight = False
        self.blocks.end_step()
        rows: list[Sequence | None] = []
        token_ids, logprobs = result.token_ids, result.logprobs
        running = SequenceStatus.RUNNING
        for entry in output.scheduled:
            seq = entry[0]
            if entry is not seq.decode_entry or seq.status is not running:
                self._record_rare(seq, entry.num_samples, result, rows)
                continue
            token_id = token_ids[len(rows)]
            if logprobs is not None:
                seq.cumulative_logprob += logprobs[len(rows)]
            text = seq.token_ids
            text.append(token_id)
            seq.num_pending_tokens = 0
            rows.append(seq)
            if len(text) >= seq.max_tokens_total or token_id in seq.request.ending_token_ids:
                self._end_if_over(seq)
        assert len(rows) == len(token_ids), "the result has a row for each sample"
        for chunk in result.prompt_logprobs:
            recorded = chunk.seq.request.prompt_logprobs
            recorded[chunk.start : chunk.start + len(chunk.logprobs)] = chunk.logprobs
        return rows

    def _assume(self, output: SchedulerOutput) -> None:
        """Moves the sequences of a step in flight on as far as that is known before its tokens are: what is computed
        counts as computed, a sampled token is pending, and who has then reached the greatest length leaves its queue.
        """
        if self._assumed is output:
            return
        self._assumed = output
        running = SequenceStatus.RUNNING
        for entry in output.scheduled:
            seq, num_new_tokens, num_samples = entry
            seq.num_computed_tokens += num_new_tokens
            if not num_samples or seq.status is not running or seq.request.is_beam_search:
                continue
            seq.num_pending_tokens = 1
            if num_samples > 1:
                self._forks_in_flight = True
            elif len(seq.token_ids) + 1 >= seq.max_tokens_total:
                self._leave_list(seq)
            elif entry is not seq.decode_entry:
                self._leave_list(seq)
                insort(self.decoding, seq, key=_order)

    def _record_rare(self, seq: Sequence, num_samples: int, result: StepResult, rows: list[Sequence | None]) -> None:
        """Chunks, ends of prompts, beams, and sequences that finished in flight."""
        if seq.finished:
            if not self._is_in_flight(seq):
                self.blocks.free(seq)
            rows.extend([None] * num_samples)
        elif num_samples and seq.request.is_beam_search:
            self._leave_list(seq)
            insort(self.awaiting, seq, key=_order)
            seq.awaiting_token = True
            rows.append(seq)
        elif num_samples:
            seq.num_pending_tokens = 0
            if num_samples > 1:
                self._leave_list(seq)
                insort(self.decoding, seq, key=_order)
            candidates = [seq, *(self.fork(seq) for _ in range(num_samples - 1))]
            metrics = seq.request.metrics
            if metrics.first_token_time is None:
                metrics.first_token_time = time.monotonic()
            for candidate in candidates:
                self._append_sample(candidate, len(rows), result)
                rows.append(candidate)

    def _append_sample(self, seq: Sequence, row: int, result: StepResult) -> None:
        seq.token_ids.append(result.token_ids[row])
        if result.logprobs is not None:
            seq.cumulative_logprob += result.logprobs[row]
        self._end_if_over(seq)

    def _end_if_over(self, seq: Sequence) -> None:
        request, token_id = seq.request, seq.token_ids[-1]
        assert isinstance(request.params, SamplingParams)
        if token_id in request.ending_token_ids and seq.num_output_tokens >= request.params.min_tokens:
            self.finish(seq, "stop", None if token_id in request.eos_token_ids else token_id)
        elif len(seq.token_ids) >= seq.max_tokens_total:
            self.finish(seq, "length")

    def fail_step(self) -> list[Request]:
        """Ends all steps in flight after one raised: their requests finish with reason "error" and are returned; the
        others go on unharmed."""
        entries = [entry for output in self.in_flight for entry in output.scheduled]
        for _ in self.in_flight:
            self.blocks.end_step()
        self.in_flight.clear()
        self._forks_in_flight = False
        requests = {entry.seq.request.request_id: entry.seq.request for entry in entries}
        failed = [request for request in requests.values() if not request.finished]
        for seq in {entry.seq.seq_id: entry.seq for entry in entries}.values():
            if seq.finished:
                self.blocks.free(seq)
        for request in failed:
            self._finish_all(request, "error")
        self.blocks.forget_prefixes()
        return failed

    # Ends and forks

    def abort(self, request_id: str) -> bool:
        """Ends a request at any time, also while a step is in flight. False if it is not (or no longer) there."""
        request = self.requests.get(request_id)
        if request is not None:
            self._finish_all(request, "abort")
        return request is not None

    def _finish_all(self, request: Request, reason: FinishReason) -> None:
        for seq in list(request.sequences):
            self.finish(seq, reason)

    def finish(self, seq: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends one sequence: at a stop string, a beam that is dropped or complete. Of an ended one, does nothing."""
        if seq.finished:
            return
        request = seq.request
        self._leave_list(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason, seq.stop_reason, seq.awaiting_token = reason, stop_reason, False
        if not self._is_in_flight(seq):
            self.blocks.free(seq)
        if request.is_beam_search:
            request.sequences.remove(seq)
        if request.finished:
            del self.requests[request.request_id]
            self._num_looking_back -= request.looks_back
            request.metrics.finished_time = time.monotonic()

    def _is_in_flight(self, seq: Sequence) -> bool:
        return any(entry.seq is seq for output in self.in_flight for entry in output.scheduled)

    def fork(self, parent: Sequence) -> Sequence:
        """A new candidate with the parent's tokens and, copy-on-write, its blocks. Between steps only; fork before you
        finish the parent."""
        assert not self.in_flight
        assert not parent.finished
        request = parent.request
        child = Sequence(request, request.num_created_sequences, list(parent.token_ids))
        request.num_created_sequences += 1
        request.sequences.append(child)
        request.forked = True
        child.order = (*parent.order[:2], child.index)
        child.max_tokens_total = parent.max_tokens_total
        child.num_cached_tokens = parent.num_cached_tokens
        child.cumulative_logprob = parent.cumulative_logprob
        child.status = parent.status
        child.awaiting_token = parent.awaiting_token
        self.blocks.fork(parent, child)
        if parent.status is SequenceStatus.RUNNING:
            insort(self.awaiting if parent.awaiting_token else self.decoding, child, key=_order)
        return child

    def append(self, seq: Sequence, token_id: int, logprob: float) -> None:
        """The next token of a beam that awaits one."""
        assert seq.awaiting_token
        seq.token_ids.append(token_id)
        seq.cumulative_logprob += logprob
        seq.awaiting_token = False
        self._leave_list(seq)
        insort(self.decoding if seq.status is SequenceStatus.RUNNING else self.waiting, seq, key=_order)

    # Views, and proof

    def holders(self) -> list[Sequence]:
        """All sequences with blocks: those in the queues, and those that have left them but are still in flight."""
        queues = {seq.seq_id: seq for seq in (*self.prefilling, *self.decoding, *self.awaiting)}
        flying = {entry.seq.seq_id: entry.seq for step in self.in_flight for entry in step.scheduled}
        return list((flying | queues).values())

    def uncomputed(self) -> tuple[ScheduledSequence, ...]:
        """Of the newest step in flight, if its tokens do not count as computed yet."""
        newest = self.in_flight[-1] if self.in_flight else None
        return () if newest is None or newest is self._assumed else newest.scheduled

    def check_integrity(self) -> None:
        """Asserts every invariant of the queues, the requests and the blocks."""
        for group in (self.waiting, self.prefilling, self.decoding, self.awaiting):
            orders = [seq.order for seq in group]
            assert all(a < b for a, b in pairwise(orders)), "sorted, and nobody twice"
        assert all(seq.status is SequenceStatus.WAITING and not seq.block_table for seq in self.waiting)
        queues = [*self.prefilling, *self.decoding, *self.awaiting]
        assert all(seq.status is SequenceStatus.RUNNING for seq in queues)
        for seq in (*queues, *self.waiting):
            assert seq.num_pending_tokens == 0 or (self._is_in_flight(seq) and self._assumed is self.in_flight[0])
        for seq in self.prefilling:
            assert seq.num_computed_tokens < len(seq.token_ids) + seq.num_pending_tokens
        for seq in self.decoding:
            assert seq.num_computed_tokens == len(seq.token_ids) + seq.num_pending_tokens - 1
        assert all(seq.num_computed_tokens == len(seq.token_ids) and seq.awaiting_token for seq in self.awaiting)
        kept = {id(seq) for seq in (*self.holders(), *self.waiting)}
        for request in self.requests.values():
            live = [seq for seq in request.sequences if not seq.finished]
            assert live, "a request without live sequences has finished"
            assert all((id(seq) in kept) or seq.awaiting_token for seq in live), "no sequence is lost"
            assert all(len(seq.token_ids) < seq.max_tokens_total or request.is_beam_search for seq in live)
        assert self._num_looking_back == sum(request.looks_back for request in self.requests.values())
        self.blocks.check_integrity(self.holders())


def _seats(seq: Sequence) -> int:
    """Rows of a step that a sequence will need: a prompt needs one for each candidate to come."""
    return 1 if seq.request.forked else seq.request.num_candidates


def _wants_prompt_logprobs(request: Request) -> bool:
    """Tokens from the prefix cache have no logits, so such a prompt is computed whole, once."""
    params = request.params
    wanted = isinstance(params, SamplingParams) and params.prompt_logprobs is not None
    return wanted and len(request.prompt_logprobs) < len(request.prompt_token_ids)
