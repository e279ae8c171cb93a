"""langchain-openai: invoke, stream, batch, tools, structured output."""

import json
import sys
from typing import Literal

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

options = {"base_url": f"{sys.argv[1]}/v1", "api_key": "none", "model": "tiny", "max_retries": 0, "temperature": 0}


class Answer(BaseModel):
    """A mood."""

    mood: Literal["good", "bad"]


@tool
def clock(zone: Literal["UTC", "CET"]) -> str:
    """The time."""
    return f"noon {zone}"


chat = ChatOpenAI(**options, max_tokens=6)
text = chat.invoke("the hen").content
assert "".join(piece.content for piece in chat.stream("the hen")) == text
assert chat.invoke("the hen").usage_metadata["output_tokens"] == 6
assert len(chat.batch(["the hen", "a"])) == 2
assert OpenAI(**options, max_tokens=6).invoke("the hen")

long = ChatOpenAI(**options, max_tokens=800)
bound = long.bind_tools([clock], tool_choice="clock", parallel_tool_calls=False)
(call,) = bound.invoke("what time is it?").tool_calls
assert call["name"] == "clock"
assert call["args"]["zone"] in ("UTC", "CET")
for method in ("json_schema", "function_calling"):
    told = long.with_structured_output(Answer, method=method, include_raw=True).invoke("how is it?")
    assert told["parsed"].mood in ("good", "bad"), told
print(json.dumps({"calls": 1}))
