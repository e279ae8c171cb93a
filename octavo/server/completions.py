"""POST /v1/completions: continues texts or token ids."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from octavo.server.errors import ApiError
from octavo.server.generation import Generation
from octavo.server.guards import info_of, json_response
from octavo.server.logprobs import Place
from octavo.server.messages import News, Piece
from octavo.server.protocol import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from octavo.server.service import Service
from octavo.server.sse import DONE, EventStream, event, unless_gone


@dataclass(slots=True)
class Prompt:
    """text: as it was sent, or what its token ids say; for echo."""

    token_ids: list[int]
    text: str


async def create_completion(service: Service, request: Request, body: CompletionRequest) -> Response:
    """Checks everything, then streams or collects."""
    if body.suffix is not None:
        raise ApiError(400, "suffix: this model continues texts and cannot fill gaps; leave it out", param="suffix")
    prompts = await _prompts(service, body)
    writer = _Writer(service, request, body, prompts)
    if body.stream:
        return EventStream(writer.events(), service.settings.send_timeout)
    return json_response(await unless_gone(request.receive, writer.whole()))


async def _prompts(service: Service, body: CompletionRequest) -> list[Prompt]:
    """The body's prompts, one or many."""
    given = body.prompt
    if not given and isinstance(given, list):
        raise ApiError(400, "prompt: expected at least one prompt, got an empty list", param="prompt")
    items: Sequence[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    if len(items) > service.settings.max_prompts:
        limit = service.settings.max_prompts
        raise ApiError(400, f"prompt: expected at most {limit} prompts, got {len(items)}", param="prompt")
    return [await _prompt(service, item, body) for item in items]


async def _prompt(service: Service, item: Any, body: CompletionRequest) -> Prompt:
    if isinstance(item, str):
        return Prompt(await service.encode(item, body.add_special_tokens, "prompt"), item)
    if not isinstance(item, list) or not all(type(token) is int for token in item):
        raise ApiError(
            400, "prompt: expected a text, token ids, a list of texts or a list of token ids", param="prompt"
        )
    service.check_prompt(item)
    tokenizer = service.tokenizer
    text = tokenizer.decode(item, skip_special_tokens=False) if body.echo and tokenizer else ""
    return Prompt(item, text)


class _Writer:
    """Turns one request's news into answers."""

    def __init__(self, service: Service, request: Request, body: CompletionRequest, prompts: list[Prompt]) -> None:
        self._only_echo = body.max_tokens == 0 and bool(body.echo)
        params = body.sampling(service.facts.generation_defaults, logprobs=body.logprobs)
        params.setdefault("max_tokens", 16)
        if self._only_echo:
            params["max_tokens"] = 1  # computed for the prompt's log probabilities, and not told
        if body.echo and body.logprobs is not None:
            params["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
        info = info_of(request)
        ids = [prompt.token_ids for prompt in prompts]
        self._generation = Generation(service, info, body, f"cmpl-{info.request_id}", ids, params)
        self._n = self._generation.params.n
        self._body = body
        self._prompts = prompts
        self._texts = service.texts
        self._places = [Place() for _ in range(len(prompts) * self._n)]  # in the text of each choice
        self._begun: set[int] = set()  # choices whose prompt has been told

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Chunks of a stream."""
        generation = self._generation
        options = self._body.stream_options
        every = options is not None and options.continuous_usage_stats
        async for index, news in generation.news():
            chunk = self._answer(self._choices(index, news))
            chunk.usage = generation.usage() if every else None
            yield event(chunk) + (self._end() if generation.ended else b"")  # one write for all that ends a stream

    def _end(self) -> bytes:
        """The last events of a stream."""
        options = self._body.stream_options
        if options is None or not options.include_usage:
            return DONE
        last = self._answer([])
        last.usage = self._generation.usage()
        return event(last) + DONE

    async def whole(self) -> Completion:
        """The whole answer."""
        choices: list[CompletionChoice] = []
        async for index, news in self._generation.news():
            choices += self._choices(index, news)
        choices.sort(key=lambda choice: choice.index)
        answer = self._answer(choices)
        answer.usage = self._generation.usage()
        return answer

    def _answer(self, choices: list[CompletionChoice]) -> Completion:
        generation = self._generation
        return Completion(generation.name, generation.created, generation.model, choices)

    def _choices(self, index: int, news: News) -> list[CompletionChoice]:
        return [self._choice(index, piece, news) for piece in news.pieces]

    def _choice(self, prompt_index: int, piece: Piece, news: News) -> CompletionChoice:
        index = prompt_index * self._n + piece.index
        prompt = self._prompts[prompt_index] if self._body.echo and index not in self._begun else None
        self._begun.add(index)
        text = "" if self._only_echo else piece.text
        reason = "length" if self._only_echo and piece.finish_reason else piece.finish_reason
        whole = prompt.text + text if prompt else text
        choice = CompletionChoice(index, whole, self._logprobs(index, piece, news, prompt), reason, piece.stop_reason)
        if self._body.prompt_logprobs is not None and news.prompt_logprobs is not None:
            choice.prompt_logprobs = self._texts.for_prompt(news.prompt_logprobs)
        return choice

    def _logprobs(self, index: int, piece: Piece, news: News, prompt: Prompt | None) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        assert piece.logprobs is not None
        token_ids: list[int] = [] if self._only_echo else list(piece.token_ids)
        entries: list[Any] = [] if self._only_echo else list(piece.logprobs)
        if prompt is not None:
            assert news.prompt_logprobs is not None
            token_ids, entries = [*prompt.token_ids, *token_ids], [*news.prompt_logprobs, *entries]
        return self._texts.for_completion(token_ids, entries, self._body.logprobs or 0, self._places[index])
