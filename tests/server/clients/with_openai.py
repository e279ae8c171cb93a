"""OpenAI's own Python client: synchronous, asynchronous, streams, tools, forms, responses, errors."""

import asyncio
import json
import sys
from typing import Literal

import openai
from pydantic import BaseModel

URL = f"{sys.argv[1]}/v1"
client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
MESSAGES = [{"role": "user", "content": "the hen"}]
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


class Answer(BaseModel):
    mood: Literal["good", "bad"]
    sure: bool


def chats():
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=6, temperature=0, n=2, logprobs=True
    )
    assert len(chat.choices) == 2
    assert chat.usage.completion_tokens == 12
    assert len(chat.choices[0].logprobs.content) == 6
    stream = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=6,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 6


def completions():
    answer = client.completions.create(
        model="tiny", prompt=["a", [1, 2, 3]], max_tokens=4, echo=True, logprobs=2, extra_body={"top_k": 5}
    )
    assert answer.choices[0].text.startswith("a")
    assert answer.choices[1].logprobs.token_logprobs[0] is None
    pieces = client.completions.create(model="tiny", prompt="a", max_tokens=4, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces)


def tools():
    options = {"model": "tiny", "messages": MESSAGES, "tools": [CLOCK], "tool_choice": "required", "max_tokens": 800}
    chat = client.chat.completions.create(**options, parallel_tool_calls=False, seed=3)
    (call,) = chat.choices[0].message.tool_calls
    assert call.function.name == "clock"
    with client.chat.completions.stream(**options, parallel_tool_calls=False, seed=3) as stream:
        final = stream.get_final_completion()
    (streamed,) = final.choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments


def forms():
    parsed = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Answer, max_tokens=800)
    assert parsed.choices[0].message.parsed.mood in ("good", "bad")
    regex = {"structured_outputs": {"regex": "[ab]{3}"}}
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=9, extra_body=regex)
    assert set(chat.choices[0].message.content) <= {"a", "b"}


def responses():
    answer = client.responses.create(model="tiny", input="the hen", max_output_tokens=6, temperature=0)
    assert answer.status == "incomplete"
    text = ""
    for event in client.responses.create(
        model="tiny", input="the hen", max_output_tokens=6, temperature=0, stream=True
    ):
        text += event.delta if event.type == "response.output_text.delta" else ""
    assert text == answer.output_text
    parsed = client.responses.parse(model="tiny", input="the hen", text_format=Answer, max_output_tokens=300)
    assert parsed.output_parsed.mood in ("good", "bad")


def errors():
    assert [model.id for model in client.models.list()] == ["tiny"]
    ask = client.chat.completions.create
    for wrong, param in (({"top_p": 7}, "top_p"), ({"extra_body": {"temprature": 1}}, "temprature")):
        error = error_of(openai.BadRequestError, lambda wrong=wrong: ask(model="tiny", messages=MESSAGES, **wrong))
        assert error.param == param
    assert error_of(openai.BadRequestError, lambda: client.embeddings.create(model="tiny", input="a"))
    assert error_of(openai.NotFoundError, lambda: client.completions.create(model="other", prompt="a"))


def error_of(kind, call):
    try:
        return call()
    except kind as error:
        return error


async def at_once():
    async with openai.AsyncOpenAI(base_url=URL, api_key="none") as other:
        ask = other.chat.completions.create
        whole = [ask(model="tiny", messages=MESSAGES, max_tokens=5, seed=i) for i in range(6)]
        assert all(answer.usage.completion_tokens <= 5 for answer in await asyncio.gather(*whole))
        stream = await ask(model="tiny", messages=MESSAGES, max_tokens=200, stream=True)
        async for _ in stream:
            break
        await stream.close()


for part in (chats, completions, tools, forms, responses, errors):
    part()
asyncio.run(at_once())
print(json.dumps({"version": openai.__version__}))
