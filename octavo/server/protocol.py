"""What clients may send and what they get: OpenAI's fields, vLLM's extra sampling fields by their names, nothing else.

Types are strict: an unknown field, a boolean for a number or a NaN is an error, never ignored. Ranges are not repeated
here: `SamplingParams` checks them, once for every way into the engine.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType, field

from octavo.engine.sampling_params import SamplingParams
from octavo.server.errors import ApiError

T = TypeVar("T", bound=Struct)

SAMPLING_NAMES = frozenset(SamplingParams.__dataclass_fields__)
RETIRED = {  # fields that clients may still send, and what to do instead
    "functions": "use tools",
    "function_call": "use tool_choice",
    "guided_json": "use structured_outputs or response_format",
    "guided_regex": "use structured_outputs",
    "guided_choice": "use structured_outputs",
    "guided_grammar": "use structured_outputs",
    "chat_template": "the model's own template is used; a request cannot bring another",
    "best_of": "use n",
    "use_beam_search": "beam search is offered offline, by LLM.beam_search",
}


class Strict(Struct, forbid_unknown_fields=True):
    pass


class StreamOptions(Strict, kw_only=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class StructuredOutputs(Strict, kw_only=True, omit_defaults=True):
    """The form of the output: exactly one of these."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class JsonSchema(Strict, kw_only=True):
    name: str
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(Strict, kw_only=True):
    """text, json_object (any JSON object) or json_schema (with the schema)."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class SamplingFields(Strict, kw_only=True):
    """What completions and chat share. None, or absent, is the default."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # accepted because clients send them; they change nothing here
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    cache_salt: str | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None

    def sampling(self, defaults: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """Those of SamplingParams' fields that were given, here or by `more`, above the model's defaults."""
        plain = SAMPLING_NAMES - {"logprobs", "logit_bias", "structured_outputs"}
        names = (name for name in self.__struct_fields__ if name in plain)
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.logit_bias is not None:
            given["logit_bias"] = {_token_id(key): bias for key, bias in self.logit_bias.items()}
        if (form := self.form()) is not None:
            given["structured_outputs"] = form
        return {**defaults, **given, **{name: value for name, value in more.items() if value is not None}}

    def form(self) -> dict[str, Any] | None:
        """The form of the output, under StructuredOutputsParams' names; ApiError 400 where it is asked for twice."""
        asked = self.response_format
        if asked is None or asked.type == "text":
            return None if self.structured_outputs is None else msgspec.to_builtins(self.structured_outputs)
        if self.structured_outputs is not None:
            raise ApiError(400, "response_format: expected this or structured_outputs", param="response_format")
        if asked.type == "json_object":
            return {"json_object": True}
        if asked.json_schema is None or asked.json_schema.schema is None:
            field = "response_format.json_schema"
            raise ApiError(400, f"{field}: expected an object with name and schema", param=field)
        return {"json": asked.json_schema.schema}


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 12):
        raise ApiError(400, f"logit_bias: expected token ids as keys, got {key[:40]!r}", param="logit_bias")
    return int(key)


class CompletionRequest(SamplingFields, kw_only=True):
    """prompt: a text, its token ids, or a list of either."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    add_special_tokens: bool = True


class ContentPart(Struct, kw_only=True):
    type: str
    text: str | None = None


class FunctionCall(Strict, kw_only=True):
    name: str
    arguments: str


class ToolCall(Strict, kw_only=True):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None


class Message(Strict, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class FunctionDescription(Strict, kw_only=True):
    """parameters: a JSON schema of the arguments. strict: they satisfy it in every detail, or the call is refused."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict, kw_only=True):
    function: FunctionDescription
    type: Literal["function"] = "function"


class FunctionName(Strict, kw_only=True):
    name: str


class NamedToolChoice(Strict, kw_only=True):
    function: FunctionName
    type: Literal["function"] = "function"


class ChatRequest(SamplingFields, kw_only=True):
    messages: list[Message]
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(Strict, kw_only=True):
    """A prompt, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict, kw_only=True):
    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool = False


# ---- answers -------------------------------------------------------------------------------------------------------


class PromptTokensDetails(Struct):
    cached_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class PromptLogprob(Struct):
    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[int, PromptLogprob] | None]  # by token id, for each token of the prompt but the first


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Struct):
    """One answer, or a chunk of a stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    object: Literal["text_completion"] = "text_completion"


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[TokenLogprob]


class AnswerToolCall(Struct):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class AnswerMessage(Struct, omit_defaults=True):
    content: str | None
    role: Literal["assistant"] = field(default_factory=lambda: "assistant")  # a factory: always written
    refusal: str | None = None
    tool_calls: list[AnswerToolCall] | None = None


class ChatChoice(Struct):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ChatCompletion(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class FunctionDelta(Struct, omit_defaults=True):
    arguments: str
    name: str | None = None


class ToolCallDelta(Struct, omit_defaults=True):
    """The first of a call names it; the others bring more of its arguments."""

    index: int
    function: FunctionDelta
    id: str | None = None
    type: str | None = None


class ChatDelta(Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ChatChunk(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class Model(Struct):
    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "octavo"
    root: str | None = None


class ModelList(Struct):
    data: list[Model]
    object: Literal["list"] = "list"


class Tokens(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(Struct):
    prompt: str


class Health(Struct):
    status: str
    engine_restarts: int


class Version(Struct):
    version: str


class Memory(Struct):
    """MemoryReport, in bytes."""

    cache: int
    used: int
    reserved: int
    internal: int
    external: int
    cached: int
    free: int
    saved: int
    unseen: int
    waste_fraction: float


# ---- reading -------------------------------------------------------------------------------------------------------

_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`(?: - at `\$(.*)`)?$", re.DOTALL)
_WRONG = re.compile(r"(.*?)(?: - at `(?:key in )?\$\.?(.*)`)?$", re.DOTALL)


def decode(body: bytes, kind: type[T]) -> T:
    """The request in `body`. ApiError 400 says which field is wrong; for an unknown one, which known one is nearest."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None


def _explain(message: str, kind: type[Struct]) -> ApiError:
    if unknown := _UNKNOWN.match(message):
        name, path = unknown[1][:80], (unknown[2] or "").lstrip(".")
        where = f"{path}.{name}" if path else name
        if hint := RETIRED.get(name):
            return ApiError(400, f"{where}: not supported; {hint}", param=where, code="unsupported_parameter")
        known = _known_names(kind) if path else list(kind.__struct_fields__)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
        return ApiError(400, f"{where}: unknown field; {hint}", param=where, code="unknown_parameter")
    wrong = _WRONG.match(message)
    assert wrong is not None
    missing = re.match(r"Object missing required field `(\w+)`", wrong[1])
    path = ".".join(part for part in (wrong[2], missing and missing[1]) if part)
    text = wrong[1][:1].lower() + wrong[1][1:200]
    return ApiError(400, f"{path}: {text}" if path else text, param=path or None)


def _known_names(kind: type[Struct]) -> list[str]:
    """The fields of all objects within a request."""
    _, components = msgspec.json.schema_components([kind])
    return sorted({name for schema in components.values() for name in schema.get("properties", {})})
