"""/v1/responses and /v1/embeddings."""

import json

import pytest

TOOL = {"type": "function", "name": "clock", "parameters": {"type": "object", "additionalProperties": False}}


def respond(server, content="the hen", **fields):
    return server.post("/v1/responses", {"input": content, "max_output_tokens": 6, **fields})


def events_of(answer):
    """[(event, data)] of a stream."""
    blocks = [block.split("\n", 1) for block in answer.text.strip().split("\n\n")]
    return [(head.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for head, data in blocks]


def test_a_text(long_server):
    answer = respond(long_server, temperature=0, instructions="be short").json()
    assert answer["object"] == "response"
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    (item,) = answer["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "incomplete")
    chat = long_server.post(
        "/v1/chat/completions",
        {
            "messages": [{"role": "system", "content": "be short"}, {"role": "user", "content": "the hen"}],
            "temperature": 0,
            "max_tokens": 6,
        },
    ).json()
    assert item["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert answer["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert answer["usage"]["output_tokens"] == 6


def test_a_conversation(long_server):
    history = [
        {"role": "user", "content": [{"type": "input_text", "text": "what time is it?"}]},
        {"type": "function_call", "call_id": "call_1", "name": "clock", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "noon"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "noon"}]},
        {"role": "user", "content": "thanks"},
    ]
    assert respond(long_server, history, tools=[TOOL]).status_code == 200


def test_the_events_of_a_text(long_server):
    events = events_of(respond(long_server, stream=True, temperature=0))
    kinds = [kind for kind, _ in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    text = "".join(data["delta"] for kind, data in events if kind == "response.output_text.delta")
    assert text == respond(long_server, temperature=0).json()["output"][0]["content"][0]["text"]
    assert events[-1][1]["response"]["output"][0]["content"][0]["text"] == text


def test_the_events_of_a_call(long_server):
    options = {"tools": [TOOL], "tool_choice": {"type": "function", "name": "clock"}, "max_output_tokens": 300}
    events = events_of(respond(long_server, stream=True, **options))
    (item,) = events[-1][1]["response"]["output"]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "clock", "completed")
    assert json.loads(item["arguments"]) == {}
    deltas = [data["delta"] for kind, data in events if kind == "response.function_call_arguments.delta"]
    assert "".join(deltas) == item["arguments"]
    assert events[-1][0] == "response.completed"


def test_a_form(long_server):
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    answer = respond(long_server, text=form, max_output_tokens=100).json()
    assert json.loads(answer["output"][0]["content"][0]["text"]) == {"a": 1}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0]"),
        ({"input": [{"type": "file_search_call"}]}, "input[0]"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_what_is_refused(long_server, fields, param):
    answer = long_server.post("/v1/responses", {"input": "a", **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_embeddings_are_refused_in_words(long_server):
    answer = long_server.post("/v1/embeddings", {"input": "a"})
    assert answer.status_code == 400
    assert "makes no embeddings" in answer.json()["error"]["message"]
    assert long_server.post("/v1/embeddings", {"input": "a", "model": "no"}).status_code == 404
