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
from octavo.engine.request import Request, Sequence, SequenceStatus
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
        request = self.request
        pieces = [piece for seq in request.sequences if (piece := self.candidate(seq).output()) is not None]
        cached = request.sequences[0].num_cached_tokens
        if self._reported:
            return RequestOutput(
                request.request_id, self.prompt, [], None, pieces, request.finished, request.metrics, cached
            )
        self._reported = True
        return RequestOutput(
            request_id=request.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            prompt_logprobs=self._prompt_logprobs(),
            outputs=pieces,
            finished=request.finished,
            metrics=request.metrics,
            num_cached_tokens=cached,
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
        "_reported",
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
        self._ended = self._end_reported = self._reported = False

    def read(self) -> str | None:
        """Reads the tokens that are new in the sequence; returns the stop string that they completed, if any.

        A stop string counts even when the same token ended the sequence by its length; an end token gives no text.
        """
        if self._detokenizer is None or self._ended:
            return None
        seq, start = self.seq, self._num_read
        end = len(seq.token_ids)
        if seq.finish_reason == "stop" and not self.live.params.include_stop_str_in_output:
            end -= 1
        for token_id in seq.token_ids[start:end]:
            self._num_read += 1
            if (stop := self._detokenizer.append(token_id)) is not None:
                self.stop_string, self._ended = stop, True
                break
        return self.stop_string

    def add_logprobs(self, token_id: int, logprob: float, top: TopLogprobs) -> None:
        assert self.logprobs is not None
        self.logprobs.append(self.live.with_text(token_logprobs(token_id, logprob, top)))

    def output(self) -> CompletionOutput | None:
        """What is new since the last call; None if nothing is. The first call always tells something."""
        seq, detokenizer = self.seq, self._detokenizer
        finished, length = seq.status is SequenceStatus.FINISHED, len(seq.token_ids)
        if length == self._num_reported and finished == self._end_reported and self._reported:
            return None
        if self._num_read < length:
            self.read()
        if finished and detokenizer is not None and not self._ended:
            detokenizer.finish()
            self._ended = True
        token_ids = seq.token_ids[self._num_reported :]
        self._reported, self._num_reported, self._end_reported = True, length, finished
        text = "" if detokenizer is None else detokenizer.take()
        if finished or self.logprobs is not None:
            return self._whole_output(text, token_ids)
        return CompletionOutput(seq.index, text, token_ids)

    def _whole_output(self, text: str, token_ids: list[int]) -> CompletionOutput:
        seq, logprobs = self.seq, self.logprobs
        if logprobs is not None:
            self.logprobs = []
        stopped = self.stop_string is not None
        return CompletionOutput(
            index=seq.index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=None if logprobs is None else seq.cumulative_logprob,
            logprobs=logprobs,
            finish_reason="stop" if stopped else seq.finish_reason,
            stop_reason=self.stop_string if stopped else seq.stop_reason,
        )
