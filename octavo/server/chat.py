"""POST /v1/chat/completions: answers a conversation, in the model's own chat template."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from octavo.server.errors import ApiError, refusal
from octavo.server.generation import Generation
from octavo.server.guards import info_of, json_response
from octavo.server.messages import Piece
from octavo.server.protocol import (
    AnswerMessage,
    AnswerToolCall,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    ContentPart,
    FunctionCall,
    Message,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from octavo.server.service import Service
from octavo.server.sse import DONE, EventStream, event, unless_gone
from octavo.server.tools import CallReader, ToolUse, format_of, knows_tools, spelt_out, tool_use


async def create_chat_completion(service: Service, request: Request, body: ChatRequest) -> Response:
    """Checks everything, then streams or collects."""
    prompt, use = await check_chat(service, body)
    answer = ChatAnswer(service, request, body, prompt, use)
    if body.stream:
        return EventStream(answer.events(), service.settings.send_timeout)
    return json_response(await unless_gone(request.receive, answer.whole()))


async def check_chat(service: Service, body: ChatRequest) -> tuple[list[int], ToolUse | None]:
    """The prompt's token ids, and what is asked of tools. ApiError 400 names what is wrong."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: expected logprobs to be true beside it", param="top_logprobs")
    use = tool_use(body)
    if use is not None and body.form() is not None:
        field = "response_format" if body.response_format is not None else "structured_outputs"
        raise ApiError(400, f"{field}: expected none beside tools, unless tool_choice is none", param=field)
    prompt = await chat_prompt(service, body.messages, body.add_generation_prompt, body.chat_template_kwargs, use)
    return prompt, use


# ---- the prompt ----------------------------------------------------------------------------------------------------


async def chat_prompt(
    service: Service,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
    use: ToolUse | None = None,
) -> list[int]:
    """Token ids of a conversation, rendered in a thread: a template is code, slow or not."""
    if not messages:
        raise ApiError(400, "messages: expected at least one message, got none", param="messages")
    plain = [_plain(index, message) for index, message in enumerate(messages)]
    tokenizer = service.require_tokenizer()
    tools = None if use is None else use.descriptions()
    if not knows_tools(tokenizer.chat_template):
        plain, tools = spelt_out(plain, use), None
    checked = _checked_variables(variables)
    try:
        text = await asyncio.to_thread(
            tokenizer.apply_chat_template, plain, add_generation_prompt, tools=tools, variables=checked
        )
    except ValueError as error:
        raise refusal(error) from None
    return await service.encode(text, False, "messages")


RESERVED_VARIABLES = ("self", "messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "pad_token")


def _checked_variables(variables: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    for name in variables or ():
        if name in RESERVED_VARIABLES or name.startswith("_") or not name.isidentifier():
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
    if message.tool_calls:
        plain["tool_calls"] = [_plain_call(f"messages[{index}].tool_calls", call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _plain_call(field: str, call: ToolCall) -> dict[str, Any]:
    """Templates write arguments as JSON themselves, so they get the value, not its text."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        raise ApiError(400, f"{field}: expected function.arguments to be JSON", param=field) from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _content(field: str, content: str | list[ContentPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for number, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise ApiError(400, f"{field}[{number}]: this model reads text only, got {part.type[:40]!r}", param=field)
    return "".join(part.text or "" for part in content)


# ---- the answer ----------------------------------------------------------------------------------------------------


class ChatAnswer:
    """Turns one request's news into answers."""

    def __init__(
        self, service: Service, request: Request, body: ChatRequest, prompt: list[int], use: ToolUse | None
    ) -> None:
        info = info_of(request)
        num_top = (body.top_logprobs or 0) if body.logprobs else None
        limits = {"max_tokens": body.max_completion_tokens, "logprobs": num_top}
        params = {"max_tokens": None, **body.sampling(service.facts.generation_defaults, **limits)}
        self._form = format_of(service.require_tokenizer().chat_template)
        self._use = use
        self._readers: dict[int, CallReader] = {}
        if use is not None and use.forced:
            params["structured_outputs"] = {"json": use.schema()}
        elif use is not None and not self._form.shows_marks:
            params["skip_special_tokens"] = False
        self._generation = Generation(service, info, body, f"chatcmpl-{info.request_id}", [prompt], params)
        self._body = body
        self._num_top = num_top or 0
        self._texts = service.texts

    @property
    def model(self) -> str:
        return self._generation.model

    def usage(self) -> Usage:
        """So far."""
        return self._generation.usage()

    async def deltas(self) -> AsyncGenerator[tuple[str, list[ToolCallDelta], str | None], None]:
        """(content, calls, finish reason) of the one candidate, as they come."""
        async for _, news in self._generation.news():
            for piece in news.pieces:
                content, calls = self._read(piece)
                yield content, calls, self._ended(piece)

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
                content, calls = self._read(piece)
                delta = ChatDelta(content=content or None, tool_calls=calls or None)
                logprobs = self._logprobs(piece)
                chunks.append(ChatChunkChoice(piece.index, delta, logprobs, self._ended(piece), piece.stop_reason))
            usage = generation.usage() if every else None
            end = self._end() if generation.ended else b""
            yield b"".join([*(event(self._chunk([choice], usage)) for choice in chunks), end])

    def _end(self) -> bytes:
        """The last events of a stream."""
        options = self._body.stream_options
        if options is None or not options.include_usage:
            return DONE
        return event(self._chunk([], self._generation.usage())) + DONE

    def _chunk(self, choices: list[ChatChunkChoice], usage: Any = None) -> ChatChunk:
        generation = self._generation
        return ChatChunk(generation.name, generation.created, generation.model, choices, usage)

    async def whole(self) -> ChatCompletion:
        """The whole answer."""
        generation = self._generation
        choices: list[ChatChoice] = []
        prompt_logprobs = None
        async for _, news in generation.news():
            prompt_logprobs = prompt_logprobs or news.prompt_logprobs
            for piece in news.pieces:
                content, deltas = self._read(piece)
                calls = _whole_calls(deltas)
                message = AnswerMessage(content.strip() or None if calls else content, tool_calls=calls or None)
                logprobs = self._logprobs(piece)
                choices.append(ChatChoice(piece.index, message, logprobs, self._ended(piece), piece.stop_reason))
        choices.sort(key=lambda choice: choice.index)
        answer = ChatCompletion(generation.name, generation.created, generation.model, choices, generation.usage())
        if prompt_logprobs is not None:
            answer.prompt_logprobs = self._texts.for_prompt(prompt_logprobs)
        return answer

    def _read(self, piece: Piece) -> tuple[str, list[ToolCallDelta]]:
        """What is content in a piece's text, and what are calls of tools."""
        if self._use is None:
            return piece.text, []
        reader = self._readers.get(piece.index)
        if reader is None:
            reader = self._readers[piece.index] = CallReader(self._form, self._use)
        return reader.feed(piece.text, final=piece.finish_reason is not None)

    def _ended(self, piece: Piece) -> str | None:
        reader = self._readers.get(piece.index)
        called = reader is not None and reader.num_calls > 0
        return "tool_calls" if called and piece.finish_reason == "stop" else piece.finish_reason

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        assert piece.logprobs is not None
        return self._texts.for_chat(piece.token_ids, piece.logprobs, self._num_top)


def _whole_calls(deltas: Sequence[ToolCallDelta]) -> list[AnswerToolCall]:
    """The calls that a finished text's deltas make up."""
    calls: dict[int, AnswerToolCall] = {}
    for delta in deltas:
        if delta.id is not None:
            calls[delta.index] = AnswerToolCall(delta.id, FunctionCall(name=delta.function.name or "", arguments=""))
        calls[delta.index].function.arguments += delta.function.arguments
    return list(calls.values())
