"""POST /v1/chat/completions: answers a conversation, in the model's own chat template."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from octavo.server.errors import ApiError, refusal
from octavo.server.generation import Generation
from octavo.server.guards import info_of, json_response
from octavo.server.logprobs import TokenTexts
from octavo.server.messages import Piece
from octavo.server.protocol import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    ContentPart,
    Message,
)
from octavo.server.service import Service
from octavo.server.sse import DONE, EventStream, event, unless_gone


async def create_chat_completion(service: Service, request: Request, body: ChatRequest) -> Response:
    """Checks everything, then streams or collects."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: expected logprobs to be true beside it", param="top_logprobs")
    prompt = await chat_prompt(service, body.messages, body.add_generation_prompt, body.chat_template_kwargs)
    writer = _Writer(service, request, body, prompt)
    if body.stream:
        return EventStream(writer.events(), service.settings.send_timeout)
    return json_response(await unless_gone(request.receive, writer.whole()))


# ---- the prompt ----------------------------------------------------------------------------------------------------


async def chat_prompt(
    service: Service,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation, rendered in a thread: a template is code, slow or not."""
    if not messages:
        raise ApiError(400, "messages: expected at least one message, got none", param="messages")
    plain = [_plain(index, message) for index, message in enumerate(messages)]
    tokenizer = service.require_tokenizer()
    try:
        text = await asyncio.to_thread(
            tokenizer.apply_chat_template, plain, add_generation_prompt, variables=_checked_variables(variables)
        )
    except ValueError as error:
        raise refusal(error) from None
    return await service.encode(text, False, "messages")


RESERVED_VARIABLES = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "pad_token")


def _checked_variables(variables: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    for name in variables or ():
        if name in RESERVED_VARIABLES or not name.isidentifier():
            raise ApiError(400, f"chat_template_kwargs: {name[:80]!r} cannot be set here", param="chat_template_kwargs")
    return variables


def _plain(index: int, message: Message) -> dict[str, Any]:
    """One message as the template wants it."""
    field = f"messages[{index}].content"
    content = _content(field, message.content)
    if not content and message.role in ("system", "developer", "user"):
        raise ApiError(400, f"{field}: expected a text, got an empty one", param=field)
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": content}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _content(field: str, content: str | list[ContentPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for number, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise ApiError(400, f"{field}[{number}]: this model reads text only, got {part.type[:40]!r}", param=field)
    return "".join(part.text or "" for part in content)


# ---- the answer ----------------------------------------------------------------------------------------------------


class _Writer:
    """Turns one request's news into answers."""

    def __init__(self, service: Service, request: Request, body: ChatRequest, prompt: list[int]) -> None:
        info = info_of(request)
        num_top = (body.top_logprobs or 0) if body.logprobs else None
        limits = {"max_tokens": body.max_completion_tokens, "logprobs": num_top}
        params = {"max_tokens": None, **body.sampling(service.facts.generation_defaults, **limits)}
        self._generation = Generation(service, info, body, f"chatcmpl-{info.request_id}", [prompt], params)
        self._body = body
        self._num_top = num_top or 0
        self._texts = TokenTexts(service.tokenizer) if body.logprobs else None

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Chunks of a stream: who speaks, then what."""
        generation, options = self._generation, self._body.stream_options
        every = options is not None and options.continuous_usage_stats
        begun: set[int] = set()
        async for _, news in generation.news():
            chunks = []
            for piece in news.pieces:
                if piece.index not in begun:
                    begun.add(piece.index)
                    chunks.append(ChatChunkChoice(piece.index, ChatDelta(role="assistant", content="")))
                delta = ChatDelta(content=piece.text) if piece.text else ChatDelta()
                logprobs = self._logprobs(piece)
                chunks.append(ChatChunkChoice(piece.index, delta, logprobs, piece.finish_reason, piece.stop_reason))
            usage = generation.usage() if every else None
            yield b"".join(event(self._chunk([choice], usage)) for choice in chunks)
        if options is not None and options.include_usage:
            yield event(self._chunk([], generation.usage()))
        yield DONE

    def _chunk(self, choices: list[ChatChunkChoice], usage: Any = None) -> ChatChunk:
        generation = self._generation
        return ChatChunk(generation.name, generation.created, generation.model, choices, usage)

    async def whole(self) -> ChatCompletion:
        """The whole answer."""
        generation = self._generation
        choices: list[ChatChoice] = []
        async for _, news in generation.news():
            for piece in news.pieces:
                message = AnswerMessage(piece.text)
                logprobs = self._logprobs(piece)
                choices.append(ChatChoice(piece.index, message, logprobs, piece.finish_reason, piece.stop_reason))
        choices.sort(key=lambda choice: choice.index)
        return ChatCompletion(generation.name, generation.created, generation.model, choices, generation.usage())

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if self._texts is None:
            return None
        assert piece.logprobs is not None
        return self._texts.for_chat(piece.token_ids, piece.logprobs, self._num_top)
