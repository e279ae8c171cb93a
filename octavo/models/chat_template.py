"""Renders a model's chat template (Jinja, from its files, never from a request) in a sandbox with bounds.

A template is code that a stranger wrote. Jinja's `ImmutableSandboxedEnvironment` keeps it away from Python's insides;
on top of that come a deadline (a trace function looks at the clock on every line, loops without output included), a
limit on the template and on its output, and one rule against small expressions with huge results: the product of the
sizes of a call's arguments, which bounds what `*`, `replace`, `join`, `indent` or `center` can make of them, must stay
small.

Templates are written against transformers' environment, so the same names are there: `raise_exception`, `strftime_now`,
`tojson` without HTML escapes, loop controls, the `generation` tag.
"""

import datetime
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE_CHARS = 1 << 17
MAX_OUTPUT_CHARS = 1 << 24
MAX_RENDER_SECONDS = 2.0
_MAX_PRODUCT = 1 << 26
_FORBIDDEN_METHODS = frozenset(
    {"format", "format_map"}
)  # a width inside the format string escapes the rule of products
_GLOBALS = ("range", "dict", "namespace", "cycler", "joiner")


class ChatTemplateError(ValueError):
    """A template is broken, refused the messages (`raise_exception`) or hit a bound."""


class ChatTemplate:
    """One compiled template, for the model's life."""

    def __init__(self, source: str, max_render_seconds: float = MAX_RENDER_SECONDS) -> None:
        """Raises `ChatTemplateError` when `source` is longer than 131,072 characters or not a Jinja template."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ChatTemplateError(
                f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE_CHARS} are read"
            )
        self.source = source
        self.max_render_seconds = max_render_seconds
        with _bounded(max_render_seconds):
            self._template = _environment().from_string(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation; `variables` are the template's own (bos_token, enable_thinking, …)."""
        _check_messages(messages)
        values = {**variables, "messages": messages, "add_generation_prompt": add_generation_prompt, "tools": tools}
        with _bounded(self.max_render_seconds):
            return _join(self._template.generate(values))


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages must be a non-empty list of {{'role': …, 'content': …}}, got {messages!r:.80}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{index}] must be an object with a string role, got {message!r:.80}")  # noqa: TRY004


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Runs template code of this thread under a deadline and turns whatever it raises into a `ChatTemplateError`."""
    deadline = time.monotonic() + seconds

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if time.monotonic() > deadline:
            raise ChatTemplateError(f"the chat template ran for more than {seconds:g} s")
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    except ChatTemplateError:
        raise
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ChatTemplateError(f"the chat template failed: {error}") from error
    except (RecursionError, MemoryError) as error:
        raise ChatTemplateError(f"the chat template is too deep or too large: {type(error).__name__}") from None
    finally:
        sys.settrace(outer)


def _size(value: Any) -> int:
    """Characters and elements of a value, nested ones included; a number's magnitude; 1 for other objects."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, bool) or value is None:
        return 1
    if isinstance(value, int | float):
        return int(min(abs(value), 1 << 62))
    if isinstance(value, Mapping):
        return sum(_size(key) + _size(item) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return sum(map(_size, value), len(value))
    return 1


def _check_product(values: Iterable[Any]) -> None:
    product = 1
    for value in values:
        product *= max(1, _size(value))
    if product > _MAX_PRODUCT:
        raise ChatTemplateError("the chat template computes a value that may be too large")


def _join(pieces: Iterable[str]) -> str:
    """Concatenates, within the output limit."""
    kept, total = [], 0
    for piece in pieces:
        total += len(piece)
        if total > MAX_OUTPUT_CHARS:
            raise ChatTemplateError(f"the chat template writes more than {MAX_OUTPUT_CHARS} characters")
        kept.append(piece)
    return "".join(kept)


def _bound_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps the mark that says whether Jinja passes its context first
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_product([*args, *kwargs.values()])
        return function(*args, **kwargs)

    return bounded


class _CodeGenerator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """`a ~ b`, which Jinja would join without asking the environment."""
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator
    concat = staticmethod(_join)  # what macros and block assignments collect
    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str | bytes | int | float) and (not isinstance(obj, str) or attr in _FORBIDDEN_METHODS):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Jinja would offer a safe `str.format`, with widths as large as its format string says; here there is none."""

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_product([getattr(obj, "__self__", None), *args, *kwargs.values()])
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str | bytes):
            raise SecurityError("% on a string is not available to chat templates")
        if operator == "**" and _size(right) > 64:
            raise SecurityError(f"the exponent {right!r:.20} is too large")
        if operator in ("*", "**"):
            _check_product([left, right])
        if operator == "+" and isinstance(left, str | list) and _size(left) + _size(right) > MAX_OUTPUT_CHARS:
            raise SecurityError("the sum is too large")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks what training learns from; for a prompt it is its content."""

    tags = {"generation"}  # noqa: RUF012, Jinja's own protocol

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise ChatTemplateError(f"the chat template refuses these messages: {message}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes < and > for HTML, which a prompt must not
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _finalize(value: Any) -> Any:
    """Looks at what `{{ … }}` is about to turn into text."""
    if _size(value) > MAX_OUTPUT_CHARS and not isinstance(value, int | float):
        raise ChatTemplateError(f"the chat template writes more than {MAX_OUTPUT_CHARS} characters")
    return value


@functools.cache
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # nothing is computed while compiling
        extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        finalize=_finalize,
    )
    environment.globals = {name: environment.globals[name] for name in _GLOBALS}
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    filters = {**environment.filters, "tojson": _tojson}
    del filters["format"]
    environment.filters = {name: _bound_filter(function) for name, function in filters.items()}
    return environment
