"""What a user gets back. Field names and meanings are vLLM's, so that code written for it reads ours."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple


class Logprob(NamedTuple):
    """logprob: natural log. rank: from 1 in the whole vocabulary, None where unknown. decoded_token: its text, None
    without detokenising."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]  # of one position, by token id
SampleLogprobs = list[TokenLogprobs]  # of an output
PromptLogprobs = list[TokenLogprobs | None]  # of a prompt; its first token has none


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, in seconds of time.monotonic, None until they happen."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def time_in_queue(self) -> float | None:
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(slots=True)
class CompletionOutput:
    """One candidate.

    index: which of the n. text: decoded so far. token_ids: output only. cumulative_logprob: sum over the output, None
    unless logprobs were asked for. logprobs: one dict per token, or None. finish_reason: "stop", "length", "abort",
    "error", or None while it runs.
    stop_reason: the stop string or stop token id that ended it, None for end-of-sequence and the others.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: SampleLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None

    def extend(self, newer: "CompletionOutput") -> None:
        """Appends what a stream brought since."""
        self.text += newer.text
        self.token_ids += newer.token_ids
        if self.logprobs is not None and newer.logprobs is not None:
            self.logprobs += newer.logprobs
        self.cumulative_logprob = newer.cumulative_logprob
        self.finish_reason, self.stop_reason = newer.finish_reason, newer.stop_reason

    def copy(self) -> "CompletionOutput":
        """One that `extend` of the other does not change; O(output)."""
        logprobs = None if self.logprobs is None else list(self.logprobs)
        return replace(self, token_ids=list(self.token_ids), logprobs=logprobs)


@dataclass(slots=True)
class RequestOutput:
    """One request so far, or what is new of it: a streamed request's outputs say only what came since the one before
    (`prompt_token_ids` and `prompt_logprobs` stand in the first, candidates without news in none), and `extend` puts
    them together. `text` is the first candidate's."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None

    @property
    def text(self) -> str:
        if not self.outputs:
            raise ValueError(f"text: request {self.request_id!r} has no output yet")
        return self.outputs[0].text

    def extend(self, newer: "RequestOutput") -> None:
        """Appends what a stream brought since."""
        for output in newer.outputs:
            if output.index < len(self.outputs):
                self.outputs[output.index].extend(output)
            else:
                self.outputs.append(output)
        self.finished, self.metrics, self.num_cached_tokens = newer.finished, newer.metrics, newer.num_cached_tokens

    def copy(self) -> "RequestOutput":
        """One that `extend` of the other does not change; O(output)."""
        return replace(self, outputs=[output.copy() for output in self.outputs])
