"""Beam search over sequences that share their blocks: a beam that splits is forked copy-on-write, never recomputed.

The rules are those of transformers' `generate(num_beams=…, early_stopping=False)`, so that scores and order agree with
it. Of all continuations of all beams, look at the best (1 + number of end tokens) · beam_width: of these, the best
beam_width that go on are the next beams; those that end and are among the first beam_width become hypotheses, scored
cumulative_logprob / output_length ** length_penalty, of which beam_width are kept. The search ends when the best beam,
at its present length, no longer beats the worst of beam_width hypotheses, or at max_tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from octavo.engine.detokenizer import Detokenizer
from octavo.engine.outputs import CompletionOutput, RequestOutput
from octavo.engine.request import Request, Sequence
from octavo.engine.sampling_params import BeamSearchParams
from octavo.engine.scheduler import Scheduler
from octavo.engine.step import TopLogprobs


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished beam. token_ids: output only."""

    score: float
    token_ids: list[int]
    cumulative_logprob: float
    finish_reason: str


@dataclass(frozen=True, slots=True)
class _Continuation:
    beam: Sequence
    token_id: int
    logprob: float
    total: float


def num_continuations(params: BeamSearchParams, num_end_tokens: int) -> int:
    """How many of the best continuations are looked at; so many per beam are always enough."""
    return max(2, 1 + num_end_tokens) * params.beam_width


class BeamSearch:
    """One request's search. The engine calls `offer` with each beam's likeliest tokens as they come (preemption may
    deliver them in different steps); when all beams have theirs, the search takes its step."""

    stream = False
    wants_every_token = True

    def __init__(
        self,
        request: Request,
        scheduler: Scheduler,
        prompt: str | None = None,
        token_bytes: Mapping[int, bytes] | None = None,
    ) -> None:
        assert isinstance(request.params, BeamSearchParams)
        self.request = request
        self.prompt = prompt
        self.hypotheses: list[Hypothesis] = []  # best first
        self._params = request.params
        self._scheduler = scheduler
        self._token_bytes = token_bytes
        self._offers: dict[int, TopLogprobs] = {}
        self._num_cached_tokens: int | None = None
        self._beams = list(request.sequences)  # the scheduler forgets those that end
        self._complete = False

    def offer(self, beam: Sequence, likeliest: TopLogprobs) -> None:
        """The continuations of one beam; advances the search when it was the last to come."""
        self._num_cached_tokens = beam.num_cached_tokens
        self._offers[beam.seq_id] = likeliest
        if all(other.seq_id in self._offers for other in self.request.sequences):
            self._advance()
            self._offers.clear()

    def _advance(self) -> None:
        beams = list(self.request.sequences)
        length = beams[0].num_output_tokens + 1
        width = self._params.beam_width
        best = self._best_continuations(beams)
        at_end = length >= self._params.max_tokens
        going_on = [c for c in best if not at_end and c.token_id not in self.request.eos_token_ids][:width]
        for c in best[:width]:
            if at_end or c.token_id in self.request.eos_token_ids:
                self._keep_hypothesis(c, length)
        if not going_on or not self._can_improve(going_on[0].total, length):
            self._complete = True
            for beam in beams:
                self._scheduler.finish(beam, "stop")
        else:
            self._continue(beams, going_on)

    def _best_continuations(self, beams: list[Sequence]) -> list[_Continuation]:
        found = [
            _Continuation(beam, token_id, logprob, beam.cumulative_logprob + logprob)
            for beam in beams
            for token_id, logprob in zip(*self._offers[beam.seq_id][:2], strict=True)
        ]
        found.sort(key=lambda c: -c.total)
        return found[: num_continuations(self._params, len(self.request.eos_token_ids))]

    def _keep_hypothesis(self, c: _Continuation, length: int) -> None:
        reason = "stop" if c.token_id in self.request.eos_token_ids else "length"
        score = self._score(c.total, length)
        self.hypotheses.append(Hypothesis(score, [*c.beam.output_token_ids, c.token_id], c.total, reason))
        self.hypotheses.sort(key=lambda h: -h.score)
        del self.hypotheses[self._params.beam_width :]

    def _can_improve(self, best_total: float, length: int) -> bool:
        if len(self.hypotheses) < self._params.beam_width:
            return True
        return self._score(best_total, length) > self.hypotheses[-1].score

    def _score(self, total: float, length: int) -> float:
        return total / math.pow(length, self._params.length_penalty)

    def _continue(self, beams: list[Sequence], chosen: list[_Continuation]) -> None:
        """Forks before it appends, since a fork copies its parent's tokens; drops the beams that nobody continues."""
        used: set[int] = set()
        grown = []
        for c in chosen:
            beam = self._scheduler.fork(c.beam) if c.beam.seq_id in used else c.beam
            used.add(c.beam.seq_id)
            grown.append((beam, c))
        self._beams = [beam for beam, _ in grown]
        for beam, c in grown:
            self._scheduler.append(beam, c.token_id, c.logprob)
        for beam in beams:
            if beam.seq_id not in used:
                self._scheduler.finish(beam, "stop")

    def output(self) -> RequestOutput:
        """The hypotheses, best first; a search that was cut short has one output, without text, that says why."""
        outputs = [
            CompletionOutput(index, self._text(h), h.token_ids, h.cumulative_logprob, None, h.finish_reason)
            for index, h in enumerate(self.hypotheses)
        ]
        if self.request.finished and not self._complete:
            outputs = [CompletionOutput(0, "", [], finish_reason=self._beams[0].finish_reason)]
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.request.prompt_token_ids),
            outputs=outputs,
            finished=self.request.finished,
            metrics=self.request.metrics,
            num_cached_tokens=self._num_cached_tokens,
        )

    def _text(self, hypothesis: Hypothesis) -> str:
        if self._token_bytes is None:
            return ""
        silent_end = hypothesis.finish_reason == "stop" and not self._params.include_stop_str_in_output
        detokenizer = Detokenizer(self._token_bytes)
        for token_id in hypothesis.token_ids[:-1] if silent_end else hypothesis.token_ids:
            detokenizer.append(token_id)
        detokenizer.finish()
        return detokenizer.text
