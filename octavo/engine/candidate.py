"""What the user sees of one request: the growing text, log probabilities and ends of its candidates.

The scheduler's `Sequence` holds token ids and blocks; here is the rest, kept by the engine until the request's last
output.
"""

from collections.abc import Callable, Mapping

from octavo.engine.detokenizer import Detokenizer
from octavo.engine.outputs import (
    CompletionOutput,
    Logprob,
    PromptLogprobs,
    RequestOutput,
    SampleLogprobs,
    TokenLogprobs,
)
from octavo.engine.request import Request, Sequence
from octavo.engine.sampler import token_logprobs
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import TopLogprobs


class LiveRequest:
    """A request on its way.

    stream: the user wants an output after every step, not only the last. token_bytes: None when no text is wanted.
    decode_token: the text of one token alone, for log probabilities; None when no text is wanted.
    """

    __slots__ = ("candidates", "decode_token", "params", "prompt", "request", "stream", "token_bytes")

    def __init__(
        self,
        request: Request,
        prompt: str | None,
        stream: bool,
        token_bytes: Mapping[int, bytes] | None,
        decode_token: Callable[[int], str] | None,
    ) -> None:
        assert isinstance(request.params, SamplingParams)
        self.request = request
        self.params = request.params
        self.prompt = prompt
        self.stream = stream
        self.token_bytes = token_bytes
        self.decode_token = decode_token
        self.candidates: list[Candidate] = []

    @property
    def sequences(self) -> list[Sequence]:
        return self.request.sequences

    def add_candidate(self, seq: Sequence) -> "Candidate":
        candidate = Candidate(self, seq)
        self.candidates.append(candidate)
        return candidate

    def with_text(self, logprobs: TokenLogprobs) -> TokenLogprobs:
        if (decode := self.decode_token) is None:
            return logprobs
        return {token: Logprob(entry.logprob, entry.rank, decode(token)) for token, entry in logprobs.items()}

    def output(self) -> RequestOutput:
        """The request so far. Candidates that have no token yet appear without text."""
        request = self.request
        known = {candidate.seq.seq_id: candidate for candidate in self.candidates}
        return RequestOutput(
            request_id=request.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            prompt_logprobs=self._prompt_logprobs(),
            outputs=[(known.get(seq.seq_id) or Candidate(self, seq)).output() for seq in request.sequences],
            finished=request.finished,
            metrics=request.metrics,
            num_cached_tokens=request.sequences[0].num_cached_tokens,
        )

    def _prompt_logprobs(self) -> PromptLogprobs | None:
        if self.params.prompt_logprobs is None:
            return None
        return [None if entry is None else self.with_text(entry) for entry in self.request.prompt_logprobs]


class Candidate:
    """One of the n continuations."""

    __slots__ = ("_detokenizer", "_flushed", "live", "logprobs", "seq", "stop_string")

    def __init__(self, live: LiveRequest, seq: Sequence) -> None:
        self.live = live
        self.seq = seq
        params = live.params
        self.logprobs: SampleLogprobs | None = None if params.logprobs is None else []
        self.stop_string: str | None = None
        self._detokenizer: Detokenizer | None = None
        if live.token_bytes is not None:
            options = params.stop, params.include_stop_str_in_output, params.min_tokens
            self._detokenizer = Detokenizer(live.token_bytes, *options)
        self._flushed = False

    def append(self, token_id: int) -> str | None:
        """Adds a sampled token, already recorded in the sequence; returns the stop string that it completed, if any.

        A stop string counts even when the same token ended the sequence by its length; an end token gives no text.
        """
        if self._detokenizer is None:
            return None
        if self.seq.finish_reason == "stop" and not self.live.params.include_stop_str_in_output:
            return None
        self.stop_string = self._detokenizer.append(token_id)
        return self.stop_string

    def add_logprobs(self, token_id: int, logprob: float, top: TopLogprobs) -> None:
        assert self.logprobs is not None
        self.logprobs.append(self.live.with_text(token_logprobs(token_id, logprob, top)))

    def output(self) -> CompletionOutput:
        seq, detokenizer = self.seq, self._detokenizer
        stopped = self.stop_string is not None
        if detokenizer is not None and seq.finished and not stopped and not self._flushed:
            detokenizer.finish()
            self._flushed = True
        return CompletionOutput(
            index=seq.index,
            text="" if detokenizer is None else detokenizer.text,
            token_ids=seq.output_token_ids,
            cumulative_logprob=None if self.logprobs is None else seq.cumulative_logprob,
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason="stop" if stopped else seq.finish_reason,
            stop_reason=self.stop_string if stopped else seq.stop_reason,
        )
