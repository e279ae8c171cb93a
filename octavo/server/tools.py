"""Tools: what a model is told of them, how it is made to call one, and how calls are read out of what it writes.

Models write calls as JSON between marks of their own; a `Format` names the marks, and the model's chat template tells
which format it is. `CallReader` finds the calls while the text still grows. Nothing of it is ever executed or
evaluated: names are compared with the request's, arguments are handed on as the text that they are.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.server.errors import ApiError
from octavo.server.protocol import ChatRequest, FunctionDelta, NamedToolChoice, Tool, ToolCallDelta

MAX_TOOLS = 128
MAX_PARALLEL_CALLS = 16  # that a request with tool_choice "required" can get
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


# ---- formats -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Format:
    """begin, end: marks around calls. shows_marks: they are special tokens, left out of a text unless asked for.
    bare: a text that begins with { is a call, too."""

    begin: str
    end: str | None = None
    shows_marks: bool = True
    bare: bool = False


HERMES = Format("<tool_call>", "</tool_call>")  # Hermes, Qwen, SmolLM
MISTRAL = Format("[TOOL_CALLS]", shows_marks=False)
LLAMA = Format("<|python_tag|>", shows_marks=False, bare=True)


def format_of(chat_template: str | None) -> Format:
    """The one that a template speaks of; Hermes' where it speaks of none, since then we tell the model ourselves."""
    template = chat_template or ""
    if MISTRAL.begin in template:
        return MISTRAL
    if "ipython" in template.lower() or LLAMA.begin in template:
        return LLAMA
    return HERMES


def knows_tools(chat_template: str | None) -> bool:
    """Whether the template has a place for tools."""
    return re.search(r"\btools\b", chat_template or "") is not None


# ---- what is asked -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ToolUse:
    """A request's tools, checked. forced: it must call one of `callable_tools`; else it may."""

    tools: tuple[Tool, ...]
    callable_tools: tuple[Tool, ...]
    forced: bool
    parallel: bool

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.function.name for tool in self.callable_tools)

    def descriptions(self) -> list[dict[str, Any]]:
        """As OpenAI writes them, for templates."""
        return [_description(tool) for tool in self.tools]

    def schema(self) -> dict[str, Any]:
        """The JSON that a forced call takes: one call, or a list of calls."""
        lenient = not any(tool.function.strict for tool in self.callable_tools)
        options = {"x-guidance": {"lenient": True}} if lenient else {}
        if not self.parallel or len(self.callable_tools) == 1:
            choices = [_call_schema(tool, f"#/anyOf/{i}") for i, tool in enumerate(self.callable_tools)]
            return {"anyOf": choices, **options}
        choices = [_call_schema(tool, f"#/items/anyOf/{i}") for i, tool in enumerate(self.callable_tools)]
        bounds = {"minItems": 1, "maxItems": MAX_PARALLEL_CALLS}
        return {"type": "array", "items": {"anyOf": choices}, **bounds, **options}


def tool_use(body: ChatRequest) -> ToolUse | None:
    """What a request asks of tools; None when it offers none, or forbids them. ApiError 400 names the field."""
    tools = tuple(body.tools or ())
    choice = body.tool_choice
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice: expected tools beside it", param="tool_choice")
        return None
    _check_tools(tools)
    if choice == "none":
        return None
    parallel = body.parallel_tool_calls is not False
    if isinstance(choice, NamedToolChoice):
        named = tuple(tool for tool in tools if tool.function.name == choice.function.name)
        if not named:
            message = f"tool_choice: {choice.function.name[:64]!r} is none of the tools"
            raise ApiError(400, message, param="tool_choice")
        return ToolUse(tools, named, True, parallel)
    return ToolUse(tools, tools, choice == "required", parallel)


def _check_tools(tools: Sequence[Tool]) -> None:
    if len(tools) > MAX_TOOLS:
        raise ApiError(400, f"tools: expected at most {MAX_TOOLS}, got {len(tools)}", param="tools")
    seen = set()
    for index, tool in enumerate(tools):
        name, field = tool.function.name, f"tools[{index}].function.name"
        if not _NAME.fullmatch(name):
            message = f"{field}: expected 1 to 64 letters, digits, '_', '-' or '.', got {name[:80]!r}"
            raise ApiError(400, message, param=field)
        if name in seen:
            raise ApiError(400, f"{field}: {name!r} is there twice", param=field)
        seen.add(name)


def _description(tool: Tool) -> dict[str, Any]:
    function = tool.function
    return {
        "type": "function",
        "function": {
            "name": function.name,
            "description": function.description or "",
            "parameters": dict(function.parameters or {"type": "object", "properties": {}}),
        },
    }


def _call_schema(tool: Tool, place: str) -> dict[str, Any]:
    """place: where this schema stands, since references within the parameters begin at their own root."""
    parameters = tool.function.parameters or {"type": "object", "additionalProperties": False}
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.function.name},
            "arguments": _moved(parameters, f"{place}/properties/arguments"),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references hold when it stands at `place` of another. An object's arguments are those that it
    names, unless it says otherwise: a model that invents others helps nobody."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    if schema.get("type") == "object" and "properties" in schema:
        moved.setdefault("additionalProperties", False)
    return moved


INSTRUCTIONS = (
    "You may call functions to answer. Each line is one, as JSON:\n{tools}\n"
    'To call one, write its name and arguments as JSON between marks:\n<tool_call>\n{{"name": "…", "arguments": '
    "{{…}}}}\n</tool_call>"
)


def spelt_out(messages: Sequence[Mapping[str, Any]], use: ToolUse | None) -> list[dict[str, Any]]:
    """Messages for a template that knows no tools: they are told of in the system message, calls and results in
    Hermes' marks."""
    plain = [_spelt_message(message) for message in messages]
    if use is None:
        return plain
    lines = "\n".join(json.dumps(description["function"]) for description in use.descriptions())
    text = INSTRUCTIONS.format(tools=lines)
    if plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{text}"}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _spelt_message(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.get("tool_calls", ())
    texts = [f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>" for call in calls]
    content = "\n".join([message["content"], *texts] if message["content"] else texts)
    return {"role": message["role"], "content": content or message["content"]}


# ---- what comes back -----------------------------------------------------------------------------------------------

_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([\w.-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.ASCII)
_BETWEEN = " \t\r\n[],;"


class CallReader:
    """Reads one candidate's text as it comes: what is content, what are calls.

    A call's name goes out as soon as it is read, its arguments as they come. What looks like a call and is none (broken
    JSON, an unknown name) is content. `forced`: the text is calls from its beginning.
    """

    def __init__(self, form: Format, use: ToolUse) -> None:
        self._form = form
        self._names = use.names
        self._most = MAX_PARALLEL_CALLS if use.parallel else 1
        self._buffer = ""
        self._in_calls = use.forced
        self._at_start = form.bare
        self._after_call = False  # line breaks that follow a call's end mark belong to it
        self._object: _ObjectReader | None = None
        self.num_calls = 0

    def feed(self, text: str, final: bool = False) -> tuple[str, list[ToolCallDelta]]:
        """New text; what is certain by now. `final`: nothing follows."""
        self._buffer += text
        content: list[str] = []
        deltas: list[ToolCallDelta] = []
        while self._advance(content, deltas):
            pass
        if final:
            if self._object is not None and not self._object.begun:
                content.append(self._object.raw)
            content.append(self._buffer)
            self._buffer = ""
        return "".join(content), deltas

    def _advance(self, content: list[str], deltas: list[ToolCallDelta]) -> bool:
        """One step forward; False when more text is needed."""
        if not self._buffer:
            return False
        if self._object is not None:
            return self._advance_object(self._object, content, deltas)
        if self._in_calls:
            return self._advance_between()
        return self._advance_content(content)

    def _advance_content(self, content: list[str]) -> bool:
        begin = self._form.begin
        if self._after_call:
            self._buffer = self._buffer.lstrip("\n")
            self._after_call = not self._buffer
        if self._at_start:
            stripped = self._buffer.lstrip()
            if not stripped:
                return False
            self._at_start = False
            if stripped[0] == "{":
                self._in_calls = True
                return True
        at = self._buffer.find(begin)
        if at >= 0:
            content.append(self._buffer[:at])
            self._buffer = self._buffer[at + len(begin) :]
            self._in_calls = True
            return True
        held = _overlap(self._buffer, begin)
        content.append(self._buffer[: len(self._buffer) - held])
        self._buffer = self._buffer[len(self._buffer) - held :]
        return False

    def _advance_between(self) -> bool:
        self._buffer = self._buffer.lstrip(_BETWEEN)
        end = self._form.end
        if not self._buffer or (end and len(self._buffer) < len(end) and end.startswith(self._buffer)):
            return False
        if self._buffer[0] == "{":
            self._object = _ObjectReader(self._names, self.num_calls)
            return True
        if end and self._buffer.startswith(end):
            self._buffer = self._buffer[len(end) :]
            self._after_call = True
        elif self._buffer.startswith(self._form.begin):
            self._buffer = self._buffer[len(self._form.begin) :]
            return True
        self._in_calls = False
        return True

    def _advance_object(self, reader: "_ObjectReader", content: list[str], deltas: list[ToolCallDelta]) -> bool:
        taken, news = reader.feed(self._buffer)
        self._buffer = self._buffer[taken:]
        if self.num_calls < self._most:
            deltas += news
        if not reader.complete:
            return False
        if reader.begun:
            self.num_calls += 1
        else:
            content.append(reader.raw)
        self._object = None
        return True


class _ObjectReader:
    """One JSON object, by its characters. begun: it is a call, and its name went out."""

    def __init__(self, names: frozenset[str], index: int) -> None:
        self._names = names
        self._index = index
        self._depth = 0
        self._in_string = self._escaped = False
        self._arguments_at: int | None = None  # where they begin in raw, once they are being sent
        self._arguments_end: int | None = None
        self._num_sent = 0
        self.raw = ""
        self.begun = self.complete = False

    def feed(self, text: str) -> tuple[int, list[ToolCallDelta]]:
        """Takes characters up to the object's end: how many, and what is new."""
        taken = self._scan(text)
        self.raw += text[:taken]
        deltas: list[ToolCallDelta] = []
        if not self.begun and (head := _HEAD.match(self.raw)) and head[1] in self._names:
            self.begun = True
            self._arguments_at = head.end()
            deltas.append(self._delta(head[1], ""))
        if self._arguments_at is not None:
            deltas += self._new_arguments()
        elif self.complete:
            deltas += self._whole()
        return taken, deltas

    def _scan(self, text: str) -> int:
        """How many characters belong to the object. Marks where its first nested value ended."""
        for position, character in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 1 and self._arguments_end is None:
                    self._arguments_end = len(self.raw) + position + 1
                if self._depth == 0:
                    self.complete = True
                    return position + 1
        return len(text)

    def _new_arguments(self) -> list[ToolCallDelta]:
        assert self._arguments_at is not None
        end = len(self.raw) if self._arguments_end is None else self._arguments_end
        new = self.raw[self._arguments_at + self._num_sent : end]
        self._num_sent += len(new)
        return [self._delta(None, new)] if new else []

    def _whole(self) -> list[ToolCallDelta]:
        """A call whose fields come in another order, read at its end."""
        try:
            call = json.loads(self.raw)
        except (ValueError, RecursionError):
            return []
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
        if name not in self._names:
            return []
        self.begun = True
        return [self._delta(name, arguments if isinstance(arguments, str) else json.dumps(arguments))]

    def _delta(self, name: str | None, arguments: str) -> ToolCallDelta:
        function = FunctionDelta(arguments, name)
        if name is None:
            return ToolCallDelta(self._index, function)
        return ToolCallDelta(self._index, function, f"call_{secrets.token_hex(12)}", "function")


def _overlap(text: str, mark: str) -> int:
    """Characters at the text's end that may be the beginning of the mark."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-size:])), 0)
