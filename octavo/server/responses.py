"""POST /v1/responses: OpenAI's newer API, as far as it is text and function calls.

A response is a chat in other words, so it is made from one: the input becomes messages, the chat's chunks become the
events of a response. Nothing is stored: a conversation goes on by sending it again.
"""

import time
from collections.abc import AsyncGenerator
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from octavo.server.chat import ChatAnswer, check_chat
from octavo.server.errors import ApiError
from octavo.server.guards import info_of, json_response
from octavo.server.protocol import (
    ChatRequest,
    FunctionCall,
    FunctionDescription,
    FunctionName,
    JsonSchema,
    Message,
    NamedToolChoice,
    ResponseFormat,
    Strict,
    StructuredOutputs,
    Tool,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from octavo.server.service import Service
from octavo.server.sse import EventStream, unless_gone

# ---- what is sent --------------------------------------------------------------------------------------------------


class InputPart(Struct, kw_only=True):
    type: str
    text: str | None = None


class InputItem(Struct, kw_only=True):
    """A message, a function call that the model made, or what the function gave."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | None = None
    id: str | None = None
    status: str | None = None


class ResponseTool(Strict, kw_only=True):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(Strict, kw_only=True):
    type: Literal["function"]
    name: str


class TextFormat(Strict, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str = "output"
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(Strict, kw_only=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class ResponseRequest(Strict, kw_only=True):
    """input: a text, or the items of a conversation. What would have to be stored here is refused."""

    input: str | list[InputItem]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    # accepted because clients send them; they change nothing here
    store: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    include: list[str] | None = None
    # as in chats
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    priority: int = 0
    cache_salt: str | None = None
    structured_outputs: StructuredOutputs | None = None


# fields that a chat has by the same name
SAME: tuple[str, ...] = ("model", "temperature", "top_p", "stream", "parallel_tool_calls", "seed", "top_k", "min_p")
SAME += ("repetition_penalty", "stop", "priority", "cache_salt", "structured_outputs", "user")


def as_chat(body: ResponseRequest) -> ChatRequest:
    """The chat that a response is made from; ApiError 400 for what cannot be one."""
    if body.previous_response_id is not None:
        message = "previous_response_id: responses are not stored here; send the conversation as input"
        raise ApiError(400, message, param="previous_response_id", code="unsupported_parameter")
    if body.background:
        raise ApiError(400, "background: expected false", param="background", code="unsupported_parameter")
    messages = [Message(role="system", content=body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        messages.append(Message(role="user", content=body.input))
    else:
        for index, item in enumerate(body.input):
            _append(messages, f"input[{index}]", item)
    if len(messages) == bool(body.instructions):
        raise ApiError(400, "input: expected at least one item, got none", param="input")
    return ChatRequest(
        messages=messages,
        tools=[_tool(tool) for tool in body.tools] if body.tools else None,
        tool_choice=_choice(body.tool_choice),
        max_completion_tokens=body.max_output_tokens,
        response_format=_format(body.text),
        **{name: getattr(body, name) for name in SAME},
    )


def _append(messages: list[Message], field: str, item: InputItem) -> None:
    if item.type == "message" and item.role is not None:
        messages.append(Message(role=item.role, content=_content(field, item.content)))
    elif item.type == "function_call" and item.call_id and item.name is not None:
        function = FunctionCall(name=item.name, arguments=item.arguments or "{}")
        call = ToolCall(id=item.call_id, function=function)
        if messages and messages[-1].tool_calls:
            messages[-1].tool_calls.append(call)
        else:
            messages.append(Message(role="assistant", tool_calls=[call]))
    elif item.type == "function_call_output" and item.call_id:
        messages.append(Message(role="tool", content=item.output or "", tool_call_id=item.call_id))
    elif item.type != "reasoning":  # of which we have none, so it tells us nothing
        message = f"{field}: expected a message with its role, a function_call or a function_call_output"
        raise ApiError(400, f"{message}, got {item.type[:40]!r}", param=field)


def _content(field: str, content: str | list[InputPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("input_text", "output_text", "text") or part.text is None:
            raise ApiError(400, f"{field}.content: this model reads text only, got {part.type[:40]!r}", param=field)
    return "".join(part.text or "" for part in content)


def _tool(tool: ResponseTool) -> Tool:
    function = FunctionDescription(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
    return Tool(function=function)


def _choice(choice: Any) -> Any:
    if isinstance(choice, ResponseToolChoice):
        return NamedToolChoice(function=FunctionName(name=choice.name))
    return choice


def _format(text: TextOptions | None) -> ResponseFormat | None:
    if text is None or text.format is None:
        return None
    asked = text.format
    if asked.type != "json_schema":
        return ResponseFormat(type=asked.type)
    schema = JsonSchema(name=asked.name, description=asked.description, schema=asked.schema, strict=asked.strict)
    return ResponseFormat(type="json_schema", json_schema=schema)


# ---- what comes back -----------------------------------------------------------------------------------------------


class OutputText(Struct):
    text: str
    type: Literal["output_text"] = "output_text"
    annotations: list[Any] = msgspec.field(default_factory=list)
    logprobs: list[Any] = msgspec.field(default_factory=list)


class OutputItem(Struct):
    """A message (role, content) or a function call (call_id, name, arguments)."""

    id: str
    type: Literal["message", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"] = "in_progress"
    role: str | UnsetType = UNSET
    content: list[OutputText] | UnsetType = UNSET
    call_id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class InputDetails(Struct):
    cached_tokens: int


class OutputDetails(Struct):
    reasoning_tokens: int = 0


class ResponseUsage(Struct):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails
    output_tokens_details: OutputDetails


class Incomplete(Struct):
    reason: str


class ResponseObject(Struct):
    id: str
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete"] = "in_progress"
    output: list[OutputItem] = msgspec.field(default_factory=list)
    usage: ResponseUsage | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[ResponseTool] = msgspec.field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice = "auto"
    parallel_tool_calls: bool = True
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    error: None = None
    object: Literal["response"] = "response"


async def create_response(service: Service, request: Request, body: ResponseRequest) -> Response:
    """Answers a text or a conversation, as the Responses API has it; nothing is stored."""
    chat = as_chat(body)
    prompt, use = await check_chat(service, chat)
    writer = _Writer(body, ChatAnswer(service, request, chat, prompt, use), info_of(request).request_id)
    if body.stream:
        return EventStream(writer.stream(), service.settings.send_timeout)
    return json_response(await unless_gone(request.receive, writer.whole()))


class _Writer:
    """Builds a response from a chat's answer and tells of each step. Items come one after another: one is open."""

    def __init__(self, body: ResponseRequest, answer: ChatAnswer, request_id: str) -> None:
        self._answer = answer
        self._request_id = request_id
        self._number = 0
        self._response = ResponseObject(
            id=f"resp_{request_id}",
            created_at=int(time.time()),
            model=answer.model,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            tools=body.tools or [],
            tool_choice=body.tool_choice or "auto",
            parallel_tool_calls=body.parallel_tool_calls is not False,
            metadata=body.metadata or {},
        )

    async def whole(self) -> ResponseObject:
        async for _ in self._events():
            pass
        return self._response

    async def stream(self) -> AsyncGenerator[bytes, None]:
        async for kind, fields in self._events():
            data = msgspec.json.encode({"type": kind, "sequence_number": self._number, **fields})
            self._number += 1
            yield b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    async def _events(self) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        response, cut, begun = self._response, False, False
        async for text, calls, reason in self._answer.deltas():
            cut = reason == "length"
            if not begun:
                begun = True
                yield "response.created", {"response": response}
                yield "response.in_progress", {"response": response}
            for event in self._text(text) if text else ():
                yield event
            for delta in calls:
                for event in self._call(delta):
                    yield event
        for event in self._close("incomplete" if cut else "completed"):
            yield event
        response.status = "incomplete" if cut else "completed"
        response.incomplete_details = Incomplete("max_output_tokens") if cut else None
        response.usage = _usage(self._answer.usage())
        yield f"response.{response.status}", {"response": response}

    def _text(self, text: str) -> list[tuple[str, dict[str, Any]]]:
        events = []
        if not (item := self._open("message")):
            events += self._close("completed")
            item = OutputItem(f"msg_{self._request_id}_{len(self._response.output)}", "message", role="assistant")
            item.content = [OutputText("")]
            events += self._begin(item)
            events.append(("response.content_part.added", self._at_text(item) | {"part": OutputText("")}))
        assert isinstance(item.content, list)
        item.content[0].text += text
        events.append(("response.output_text.delta", self._at_text(item) | {"delta": text, "logprobs": []}))
        return events

    def _call(self, delta: ToolCallDelta) -> list[tuple[str, dict[str, Any]]]:
        events = []
        if delta.id is not None:
            events += self._close("completed")
            item = OutputItem(f"fc_{delta.id}", "function_call", call_id=delta.id, arguments="")
            item.name = delta.function.name or ""
            events += self._begin(item)
        item = self._response.output[-1]
        assert isinstance(item.arguments, str)
        if delta.function.arguments:
            item.arguments += delta.function.arguments
            event = "response.function_call_arguments.delta"
            events.append((event, self._at(item) | {"delta": delta.function.arguments}))
        return events

    def _open(self, kind: str) -> OutputItem | None:
        output = self._response.output
        return output[-1] if output and output[-1].type == kind and output[-1].status == "in_progress" else None

    def _begin(self, item: OutputItem) -> list[tuple[str, dict[str, Any]]]:
        self._response.output.append(item)
        empty = msgspec.structs.replace(item, content=[]) if item.type == "message" else item
        return [("response.output_item.added", {"output_index": len(self._response.output) - 1, "item": empty})]

    def _close(self, status: Literal["completed", "incomplete"]) -> list[tuple[str, dict[str, Any]]]:
        """Ends the item that is open, if one is."""
        events = []
        if item := self._open("message"):
            assert isinstance(item.content, list)
            (part,) = item.content
            events.append(("response.output_text.done", self._at_text(item) | {"text": part.text, "logprobs": []}))
            events.append(("response.content_part.done", self._at_text(item) | {"part": part}))
        elif item := self._open("function_call"):
            fields = {"name": item.name, "arguments": item.arguments}
            events.append(("response.function_call_arguments.done", self._at(item) | fields))
        if item is not None:
            item.status = status
            events.append(("response.output_item.done", {"output_index": len(self._response.output) - 1, "item": item}))
        return events

    def _at(self, item: OutputItem) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": len(self._response.output) - 1}

    def _at_text(self, item: OutputItem) -> dict[str, Any]:
        return self._at(item) | {"content_index": 0}


def _usage(usage: Usage) -> ResponseUsage:
    cached = InputDetails(usage.prompt_tokens_details.cached_tokens)
    return ResponseUsage(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, cached, OutputDetails())
