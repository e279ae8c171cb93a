"""Chat templates render as transformers renders them, and a hostile one can neither reach Python nor exhaust it."""

import re
import sys
import threading
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from octavo.models import ChatTemplate, ChatTemplateError

CALL = {"function": {"name": "f", "arguments": {"a": [1, None]}}}
MESSAGES = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": "  Grüße 😀  "},
    {"role": "assistant", "content": "<think>hm</think>Hello", "tool_calls": [CALL]},
    {"role": "user", "content": "x" * 50},
]
PARAMETERS = {"type": "object", "properties": {"q": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\\n' + "
        "message['content'] + '<|im_end|>\\n' }}\n"
        "{% endfor %}\n{% if add_generation_prompt %}\n{{ '<|im_start|>assistant\\n' }}\n{% endif %}"
    ),
    "trimmed, negative index, tests": (
        "{%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = "
        "messages[1:] %}{% endif %}"
        "{% for m in messages if m.content is string and m is not none %}{{ loop.index0 }}{{ m.content | "
        "trim }}{% endfor %}"
        "{{ messages[-1]['content'] | length }}"
    ),
    "tools and tojson": (
        "{% if tools is not none %}{% for t in tools %}{{ t | tojson }}{{ t | tojson(indent=2) }}{% endfor %}"
        "{% endif %}"
    ),
    "tool calls": (
        "{% for m in messages %}{% if m.tool_calls %}{% for call in m.tool_calls %}{{ "
        "call.function.arguments | tojson }}"
        "{% for k, v in call.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}{% endfor %}{% endif "
        "%}{% endfor %}"
    ),
    "namespace and reversed": (
        "{% set ns = namespace(last=0, seen=false) %}{% for m in messages[::-1] %}{% if not ns.seen and "
        "m.role == 'user' %}"
        "{% set ns.seen = true %}{% set ns.last = (messages | length - 1) - loop.index0 %}{% endif %}{% "
        "endfor %}{{ ns.last }}"
    ),
    "thinking": (
        "{% for m in messages %}{{ m.content.split('</think>')[-1].lstrip('\\n') if '</think>' in m.content }"
        "}{% endfor %}"
    ),
    "macro": (
        "{% macro show(m) %}[{{ m.role | upper }}]{{ m.content ~ '!' ~ 1 }}{% endmacro %}{% for m in "
        "messages %}{{ show(m) }}{% endfor %}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{% if loop.last %}{% break "
        "%}{% endif %}{{ m.role }}{% endfor %}"
    ),
    "generation tag": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "filters": (
        "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', "
        "'user') | list | length }}"
    ),
    "variables": (
        "{{ bos_token }}{% if enable_thinking is defined and enable_thinking is false %}off{% endif %}{{ "
        "undefined_thing }}"
    ),
    "blocks": (
        "{% set text %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ "
        "text.strip().replace('x', 'yz') | indent(4) }}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_equals_transformers(name, add_generation_prompt):
    variables = {"bos_token": "<s>", "enable_thinking": False}
    expected, _ = render_jinja_template(
        conversations=[MESSAGES],
        tools=TOOLS,
        chat_template=TEMPLATES[name],
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    template = ChatTemplate(TEMPLATES[name])
    got = template.render(MESSAGES, add_generation_prompt=add_generation_prompt, tools=TOOLS, **variables)
    assert got == expected[0]
    assert got


def test_time_of_day():
    got = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render(MESSAGES)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", got)


def test_a_template_may_refuse():
    template = ChatTemplate("{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}")
    with pytest.raises(ChatTemplateError, match="refuses these messages: user first"):
        template.render(MESSAGES)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ self._TemplateReference__context }}",
    "{{ (1).to_bytes(10, 'big') }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '%s' % 1 }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{{ lipsum() }}",
    "{{ 1/0 }}",
    "{{ messages[99].role }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_holds(source):
    """An error, or nothing: printing what may not be seen prints an undefined value."""
    try:
        assert ChatTemplate(source).render(MESSAGES) == ""
    except ChatTemplateError:
        return


EXHAUSTING = {
    "endless loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over text": "{% set t = 'x' * 1000 %}"
    + "".join(f"{{% for {c} in t %}}" for c in "abcdef")
    + "{% endfor %}" * 6,
    "long output": "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
    "huge string": "{{ 'a' * 10**9 }}",
    "huge number": "{{ 10 ** 10 ** 10 }}",
    "huge list": "{{ [0] * 10**9 }}",
    "doubling +": (
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
    ),
    "doubling ~": (
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    ),
    "doubling block": (
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}"
        "{% endset %}{% set ns.x = y %}{% endfor %}"
    ),
    "doubling macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='aaaaaaaa') %}"
    "{% for i in range(60) %}{% set ns.x = m(ns.x) %}{% endfor %}",
    "doubling list": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}"
    ),
    "doubling list to json": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
        "{{ ns.x | tojson }}"
    ),
    "replace": "{% set t = 'a' * 100000 %}{{ t.replace('a', t) }}",
    "replace filter": "{% set t = 'a' * 100000 %}{{ t | replace('a', t) }}",
    "join": "{{ ('a' * 100000) | join('b' * 100000) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "indent": "{{ ('\\n' * 100000) | indent(100000) }}",
    "batch": "{{ 'a' | batch(10**9, 'b') | list }}",
    "format width": "{{ '{:1000000000}'.format(1) }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


@pytest.mark.parametrize("name", EXHAUSTING)
def test_time_and_memory_are_bounded(name):
    start = time.monotonic()
    with pytest.raises(ChatTemplateError):
        ChatTemplate(EXHAUSTING[name], max_render_seconds=0.3).render(MESSAGES)
    assert time.monotonic() - start < 3


def test_a_long_template_is_refused():
    with pytest.raises(ChatTemplateError, match="131073 characters"):
        ChatTemplate("x" * 131_073)


def test_a_broken_template_is_said():
    with pytest.raises(ChatTemplateError, match="failed"):
        ChatTemplate("{% for %}")


def test_deep_nesting_in_a_template_is_said():
    with pytest.raises(ChatTemplateError):
        ChatTemplate("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}")


@pytest.mark.parametrize(
    "messages", [[], "Hi", None, ["Hi"], [{"content": "no role"}], [{"role": 3}], {"role": "user"}]
)
def test_messages_that_are_none(messages):
    with pytest.raises(ValueError, match="messages"):
        ChatTemplate("x").render(messages)


def test_the_outer_trace_function_comes_back_and_other_threads_keep_theirs():
    def tracer(frame, event, arg):
        return None

    outer = sys.gettrace()
    sys.settrace(tracer)
    try:
        ChatTemplate("{{ messages[0].role }}").render(MESSAGES)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(outer)


def test_threads_render_at_once():
    template = ChatTemplate(TEMPLATES["macro"])
    expected, results = template.render(MESSAGES), []
    threads = [threading.Thread(target=lambda: results.append(template.render(MESSAGES))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


def test_long_conversations_are_rendered():
    """The bounds are far from honest use: 1,000 messages, 2 MB."""
    messages = [{"role": "user", "content": "x" * 2000}] * 1000
    assert len(ChatTemplate(TEMPLATES["chatml"]).render(messages)) > 2_000_000
