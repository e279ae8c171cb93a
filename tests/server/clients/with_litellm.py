"""litellm, which most gateways use: completion, stream, asynchronous, tools, forms, errors."""

import asyncio
import json
import sys

import litellm

options = {"model": "openai/tiny", "api_base": f"{sys.argv[1]}/v1", "api_key": "none", "num_retries": 0}
messages = [{"role": "user", "content": "the hen"}]
tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}

answer = litellm.completion(**options, messages=messages, max_tokens=6, temperature=0)
text = answer.choices[0].message.content
assert answer.usage.completion_tokens == 6
pieces = litellm.completion(**options, messages=messages, max_tokens=6, temperature=0, stream=True)
assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
named = {"type": "function", "function": {"name": "clock"}}
answer = litellm.completion(**options, messages=messages, tools=[tool], tool_choice=named, max_tokens=800)
assert answer.choices[0].message.tool_calls[0].function.name == "clock"
schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
answer = litellm.completion(**options, messages=messages, response_format=form, max_tokens=100)
assert json.loads(answer.choices[0].message.content) == {"a": 1}
answer = asyncio.run(litellm.acompletion(**options, messages=messages, max_tokens=3))
assert answer.choices[0].message.content
assert litellm.text_completion(**{**options, "model": "text-completion-openai/tiny"}, prompt="a", max_tokens=3)
refused = ""
try:
    litellm.completion(**options, messages=messages, top_p=9)
except litellm.BadRequestError as error:
    refused = str(error)
assert "top_p" in refused
print(json.dumps({"text": text}))
