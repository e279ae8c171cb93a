"""Tools: what the model is told, how it is made to call, and how calls are read; forms over HTTP."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.server.errors import ApiError
from octavo.server.protocol import ChatRequest
from octavo.server.tools import HERMES, LLAMA, MISTRAL, CallReader, format_of, knows_tools, spelt_out, tool_use

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"$ref": "#/$defs/Days"}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"Days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def use_of(**fields):
    body = {"messages": [{"role": "user", "content": "a"}], "tools": [WEATHER, CLOCK], **fields}
    return tool_use(msgspec.convert(body, ChatRequest))


def read(pieces, form=HERMES, **fields):
    """(content, [(name, arguments)]) of a text that comes in pieces."""
    reader = CallReader(form, use_of(**fields))
    content, calls = "", []
    for number, piece in enumerate(pieces):
        more, deltas = reader.feed(piece, final=number == len(pieces) - 1)
        content += more
        for delta in deltas:
            if delta.id is not None:
                calls.append([delta.function.name, ""])
            calls[delta.index][1] += delta.function.arguments
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


ROME = {"city": "Rome", "days": 2}
ROME_CALL = json.dumps({"name": "get_weather", "arguments": ROME})
CLOCK_CALL = '{"arguments": {}, "name": "clock"}'  # the other order

TEXTS = {
    "hermes": (HERMES, f"Look.\n<tool_call>\n{ROME_CALL}\n</tool_call>", "Look.\n", [("get_weather", ROME)]),
    "two calls": (
        HERMES,
        f"<tool_call>{ROME_CALL}</tool_call>\n<tool_call>\n{CLOCK_CALL}\n</tool_call> done",
        " done",
        [("get_weather", ROME), ("clock", {})],
    ),
    "mistral": (MISTRAL, f"[TOOL_CALLS][{ROME_CALL}, {CLOCK_CALL}]", "", [("get_weather", ROME), ("clock", {})]),
    "llama": (LLAMA, ROME_CALL.replace("arguments", "parameters"), "", [("get_weather", ROME)]),
    "llama with its tag": (LLAMA, f"<|python_tag|>{CLOCK_CALL}; {CLOCK_CALL}", "", [("clock", {})] * 2),
    "plain text": (HERMES, "a < b, <tool> is no mark", "a < b, <tool> is no mark", []),
    "an unfinished mark": (HERMES, "then <tool_ca", "then <tool_ca", []),
    "an unknown tool": (HERMES, '<tool_call>{"name": "rm"}</tool_call>', '{"name": "rm"}', []),
    "broken JSON": (HERMES, '<tool_call>{"name" "clock"}</tool_call>', '{"name" "clock"}', []),
    "code is text": (HERMES, "__import__('os').system('id')", "__import__('os').system('id')", []),
    "braces in strings": (
        HERMES,
        '<tool_call>{"name": "clock", "arguments": {"a": "}]\\"{", "b": [{"c": 1}]}}</tool_call>',
        "",
        [("clock", {"a": '}]"{', "b": [{"c": 1}]})],
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_calls_are_read_however_the_text_is_cut(name):
    form, text, content, calls = TEXTS[name]
    assert read([text], form) == (content, calls)
    assert read(list(text), form) == (content, calls)


@given(st.data())
def test_pieces_give_what_the_whole_gives(data):
    form, text, content, calls = TEXTS[data.draw(st.sampled_from(sorted(TEXTS)))]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(pieces, form) == (content, calls)


@given(st.text('<>tol_ca/{}[]"\\:,namergus 1', max_size=80))
def test_no_text_breaks_the_reader(text):
    reader = CallReader(HERMES, use_of())
    for piece in text:
        reader.feed(piece)
    reader.feed("", final=True)


def test_arguments_stream_as_they_come():
    reader = CallReader(HERMES, use_of())
    assert reader.feed('<tool_call>{"name": "get_weather", "arguments": ')[1] == []
    (_, (head, first)) = reader.feed('{"city": ')
    assert (head.function.name, head.function.arguments, head.type) == ("get_weather", "", "function")
    assert head.id.startswith("call_")
    assert (first.function.arguments, first.id, first.function.name) == ('{"city": ', None, None)
    assert reader.feed('"Rome"}')[1][0].function.arguments == '"Rome"}'
    assert reader.feed("}</tool_call>", final=True) == ("", [])


def test_only_the_first_call_without_parallel_calls():
    text = f"<tool_call>{ROME_CALL}</tool_call><tool_call>{CLOCK_CALL}</tool_call>"
    assert read([text], parallel_tool_calls=False) == ("", [("get_weather", ROME)])


def test_templates_tell_their_format():
    assert format_of("{{ tools }} <tool_call>") is HERMES
    assert format_of("[TOOL_CALLS] [AVAILABLE_TOOLS]") is MISTRAL
    assert format_of("Environment: ipython") is LLAMA
    assert format_of(None) is HERMES
    assert knows_tools("{% if tools %}")
    assert not knows_tools("{{ messages }}")


def test_a_template_without_tools_is_told_in_the_system_message():
    history = [
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]},
        {"role": "tool", "content": "sunny"},
    ]
    told = spelt_out(history, use_of())
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert "get_weather" in told[0]["content"]
    assert told[2]["content"] == '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    assert told[3]["content"] == "<tool_response>\nsunny\n</tool_response>"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
        ({"tools": [CLOCK, CLOCK]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
    ],
)
def test_wrong_tools_are_refused(fields, param):
    with pytest.raises(ApiError) as refused:
        use_of(**fields)
    assert refused.value.status == 400
    assert refused.value.body.error.param == param


# ---- over HTTP, with a model of random weights, which calls only when it must --------------------------------------


def calls_of(message):
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]


def is_weather(arguments):
    return set(arguments) == {"city", "days"} and arguments["city"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 9


def test_a_named_tool_is_called(long_server):
    named = {"type": "function", "function": {"name": "get_weather"}}
    answer = long_server.chat(tools=[WEATHER, CLOCK], tool_choice=named, max_tokens=400, n=2, seed=1).json()
    for choice in answer["choices"]:
        ((name, arguments),) = calls_of(choice["message"])
        assert name == "get_weather"
        assert is_weather(arguments)
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None


def test_some_tool_is_called_when_one_is_required(long_server):
    """Random weights are tempted to call for ever: at most sixteen calls, or the tokens end."""
    options = {"tools": [WEATHER, CLOCK], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 400}
    for seed in range(3):
        (choice,) = long_server.chat(seed=seed, **options).json()["choices"]
        ((name, arguments),) = calls_of(choice["message"])
        assert is_weather(arguments) if name == "get_weather" else arguments == {}


def test_calls_stream(long_server):
    options = {"tools": [CLOCK], "tool_choice": "required", "max_tokens": 300, "stream": True}
    answer = long_server.chat(parallel_tool_calls=False, **options)
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    deltas = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert deltas[0]["function"]["name"] == "clock"
    assert deltas[0]["type"] == "function"
    assert json.loads("".join(delta["function"]["arguments"] for delta in deltas)) == {}
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert not any(choice["delta"].get("content") for choice in choices)


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_nobody_has_to_call(long_server, choice):
    answer = long_server.chat(tools=[CLOCK], tool_choice=choice, max_tokens=8, ignore_eos=True).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"]


def test_a_conversation_with_calls_and_results_goes_on(long_server):
    messages = [
        {"role": "user", "content": "what time is it?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    body = {"messages": messages, "tools": [CLOCK], "max_tokens": 4}
    assert long_server.post("/v1/chat/completions", body).status_code == 200
    messages[1]["tool_calls"][0]["function"]["arguments"] = "{"
    answer = long_server.post("/v1/chat/completions", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[1].tool_calls"


PAIR = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "pair", "schema": PAIR, "strict": True}}},
        {"structured_outputs": {"json": PAIR}},
        {"structured_outputs": {"regex": r'\{"a": [12]\}'}},
        {"structured_outputs": {"choice": ['{"a": 1}', '{"a": 2}']}},
    ],
)
def test_the_form_of_an_answer(long_server, fields):
    for ask in (long_server.chat, long_server.complete):
        answer = ask("a", max_tokens=90, n=2, seed=2, **fields).json()
        for choice in answer["choices"]:
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            assert json.loads(text) in ({"a": 1}, {"a": 2})
            assert choice["finish_reason"] == "stop"


def test_a_json_object(long_server):
    answer = long_server.chat(max_tokens=20, response_format={"type": "json_object"}).json()
    assert answer["choices"][0]["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "tools": [CLOCK]}, "response_format"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"type": "integer", "multipleOf": 123456789}}}, "structured_outputs.json"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_wrong_forms_are_refused_by_name(long_server, fields, param):
    answer = long_server.chat(max_tokens=4, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
