"""From prompts to what comes back: admission, the engine, usage and metrics; completions and chats share it."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from octavo.engine.sampling_params import SamplingParams
from octavo.server.engine_client import EngineDeadError, RequestFailedError
from octavo.server.errors import ApiError, refusal, unavailable
from octavo.server.guards import RequestInfo
from octavo.server.messages import Add, News
from octavo.server.protocol import PromptTokensDetails, SamplingFields, Usage
from octavo.server.service import Service, check_alive


class Generation:
    """The candidates of one or more prompts. Made when everything is checked; runs while `news` is read.

    params: of SamplingParams, as a dict. stream: news after each token, or only at each prompt's end.
    """

    def __init__(
        self,
        service: Service,
        info: RequestInfo,
        body: SamplingFields,
        name: str,
        prompts: Sequence[list[int]],
        params: dict[str, Any],
    ) -> None:
        check_alive(service)
        service.check_model(body.model)
        service.check_priority(body.priority)
        if body.stream and body.prompt_logprobs is not None:
            raise ApiError(400, "prompt_logprobs: expected none in a stream", param="prompt_logprobs")
        for prompt in prompts:
            service.check_prompt(prompt)
        try:
            self.params = SamplingParams.from_dict(params)
        except ValueError as error:
            raise refusal(error) from None
        self.service = service
        self.stream = bool(body.stream)
        self.model = body.model or service.model_names[0]
        self.name = name
        self.created = int(time.time())
        self._info = info
        salt = service.salt(info.key, body.cache_salt)
        self._requests = [
            Add(service.unique(name), prompt, params, self.stream, body.priority, salt) for prompt in prompts
        ]
        self._index_of = {request.request_id: index for index, request in enumerate(self._requests)}
        self._num_cached_tokens = 0
        self._num_unfinished = len(prompts)
        info.prompt_tokens = sum(map(len, prompts))

    @property
    def num_sequences(self) -> int:
        return len(self._requests) * self.params.n

    @property
    def ended(self) -> bool:
        """True from the last news on."""
        return self._num_unfinished == 0

    def usage(self) -> Usage:
        """So far."""
        prompt, output = self._info.prompt_tokens, self._info.output_tokens
        return Usage(prompt, output, prompt + output, PromptTokensDetails(self._num_cached_tokens))

    async def news(self) -> AsyncGenerator[tuple[int, News], None]:
        """(index of the prompt, what is new of it), until all have ended. Leaving early ends them in the engine.

        Raises ApiError for a request that cannot be served, a full queue, an engine that dies or a step that fails.
        """
        service = self.service
        watch = _Watch(service, [len(request.prompt_token_ids) for request in self._requests])
        with service.doors.admit(self.num_sequences):
            try:
                async with aclosing(service.engine.run(self._requests, service.settings.request_timeout)) as batches:
                    async for batch in batches:
                        for news in batch:
                            index = self._index_of[news.request_id]
                            if watch.is_new(index):
                                self._num_cached_tokens += news.num_cached_tokens
                            self._info.output_tokens += watch.see(index, news)
                            self._num_unfinished -= news.finished
                            yield index, news
            except EngineDeadError as error:
                raise unavailable(str(error)) from None
            except RequestFailedError as error:
                raise ApiError(500, str(error), code="engine_error") from None
            except TimeoutError:
                seconds = service.settings.request_timeout
                raise ApiError(504, f"the answer took longer than {seconds:g} s", code="timeout") from None
            except ValueError as error:
                raise refusal(error) from None


class _Watch:
    """Feeds the metrics with one generation's times and counts."""

    def __init__(self, service: Service, prompt_lengths: list[int]) -> None:
        self._service = service
        self._metrics = service.metrics
        self._prompt_lengths = prompt_lengths
        self._start = time.monotonic()
        self._last: list[float | None] = [None] * len(prompt_lengths)
        self._num_tokens = [0] * len(prompt_lengths)

    def is_new(self, index: int) -> bool:
        """True until the prompt's first news has been seen."""
        return self._last[index] is None

    def see(self, index: int, news: News) -> int:
        """The number of new tokens. ApiError when a step failed, or the request was ended by us."""
        now, metrics, last = time.monotonic(), self._metrics, self._last[index]
        self._last[index] = now
        count = sum([len(piece.token_ids) for piece in news.pieces])  # a list: this runs for each token
        if last is None:
            metrics.time_to_first_token.observe(now - self._start)
            metrics.queue_time.observe(news.queue_time)
            metrics.prompt_tokens.inc(self._prompt_lengths[index])
            metrics.request_prompt_tokens.observe(self._prompt_lengths[index])
        elif count:
            metrics.inter_token_latency.observe((now - last) * len(news.pieces) / count)
        self._num_tokens[index] += count
        for piece in news.pieces:
            if piece.finish_reason is not None:
                self._ended(piece.finish_reason, piece.stop_reason)
        if news.finished:
            metrics.e2e_latency.observe(now - self._start)
            metrics.request_generation_tokens.observe(self._num_tokens[index])
        return count

    def _ended(self, reason: str, cause: int | str | None) -> None:
        self._metrics.finished(reason)
        if reason == "error" and isinstance(cause, str):  # the request's own fault, such as an endless grammar
            raise refusal(ValueError(cause))
        if reason == "error":
            raise ApiError(500, "a step of the engine failed; its log holds the reason", code="engine_error")
        if reason == "abort":
            raise unavailable("the server is shutting down")
