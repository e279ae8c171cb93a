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

    __slots__ = ("_candidates", "_reported", "decode_token", "params", "prompt", "request", "stream", "token_bytes")

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
        self._candidates: dict[int, Candidate] = {}
        self._reported = False  # an output has been made

    @property
    def wants_every_token(self) -> bool:
        """False when all can be read at the end: no stream, no stop string, no log probabilities."""
        return self.stream or bool(self.params.stop) or self.params.logprobs is not None

    def candidate(self, seq: Sequence) -> "Candidate":
        candidate = self._candidates.get(seq.seq_id)
        if candidate is None:
            candidate = self._candidates[seq.seq_id] = Candidate(self, seq)
        return candidate

    def with_text(self, logprobs: TokenLogprobs) -> TokenLogprobs:
        if (decode := self.decode_token) is None:
            return logprobs
        return {token: Logprob(entry.logprob, entry.rank, decode(token)) for token, entry in logprobs.items()}

    def output(self) -> RequestOutput:
        """What is new since the last call; of a request that is not streamed, everything."""
        request, first = self.request, not self._reported
        self._reported = True
        candidates = [self.candidate(seq) for seq in request.sequences]
        return RequestOutput(
            request_id=request.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(request.prompt_token_ids) if first else [],
            prompt_logprobs=self._prompt_logprobs() if first else None,
            outputs=[candidate.output() for candidate in candidates if first or candidate.has_news],
            finished=request.finished,
            metrics=request.metrics,
            num_cached_tokens=request.sequences[0].num_cached_tokens,
        )

    def _prompt_logprobs(self) -> PromptLogprobs | None:
        if self.params.prompt_logprobs is None:
            return None
        return [None if entry is None else self.with_text(entry) for entry in self.request.prompt_logprobs]


class Candidate:
    """One of the n continuations. Its text is read from the sequence's tokens by `read`, each once."""

    __slots__ = (
        "_detokenizer",
        "_end_reported",
        "_ended",
        "_num_read",
        "_num_reported",
        "live",
        "logprobs",
        "seq",
        "stop_string",
    )

    def __init__(self, live: LiveRequest, seq: Sequence) -> None:
        self.live = live
        self.seq = seq
        params = live.params
        self.logprobs: SampleLogprobs | None = None if params.logprobs is None else []  # not reported yet
        self.stop_string: str | None = None
        self._detokenizer: Detokenizer | None = None
        if live.token_bytes is not None:
            options = params.stop, params.include_stop_str_in_output, params.min_tokens
            self._detokenizer = Detokenizer(live.token_bytes, *options)
        self._num_read = self._num_reported = seq.num_prompt_tokens  # tokens of the sequence, prompt included
        self._ended = self._end_reported = False

    def read(self) -> str | None:
        """Reads the tokens that are new in the sequence; returns the stop string that they completed, if any.

        A stop string counts even when the same token ended the sequence by its length; an end token gives no text.
        """
        if self._detokenizer is None or self._ended:
            return None
        seq = self.seq
        end = len(seq.token_ids)
        if seq.finish_reason == "stop" and not self.live.params.include_stop_str_in_output:
            end -= 1
        while self._num_read < end and self.stop_string is None:
            self.stop_string = self._detokenizer.append(seq.token_ids[self._num_read])
            self._num_read += 1
        self._ended = self.stop_string is not None
        return self.stop_string

    def add_logprobs(self, token_id: int, logprob: float, top: TopLogprobs) -> None:
        assert self.logprobs is not None
        self.logprobs.append(self.live.with_text(token_logprobs(token_id, logprob, top)))

    @property
    def has_news(self) -> bool:
        return len(self.seq.token_ids) > self._num_reported or self.seq.finished != self._end_reported

    def output(self) -> CompletionOutput:
        """What is new since the last call."""
        seq, detokenizer = self.seq, self._detokenizer
        self.read()
        if detokenizer is not None and seq.finished and not self._ended:
            detokenizer.finish()
            self._ended = True
        stopped = self.stop_string is not None
        token_ids = seq.token_ids[self._num_reported :]
        self._num_reported, self._end_reported = len(seq.token_ids), seq.finished
        logprobs = self.logprobs
        if logprobs is not None:
            self.logprobs = []
        return CompletionOutput(
            index=seq.index,
            text="" if detokenizer is None else detokenizer.take(),
            token_ids=token_ids,
            cumulative_logprob=None if logprobs is None else seq.cumulative_logprob,
            logprobs=logprobs,
            finish_reason="stop" if stopped else seq.finish_reason,
            stop_reason=self.stop_string if stopped else seq.stop_reason,
        )
