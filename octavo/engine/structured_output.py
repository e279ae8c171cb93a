"""What a request may ask of its output's form: a JSON schema, a regular expression, one of some texts, a grammar.

Only the wish and its bounds are here; `grammar_check` and `grammar` compile it. Nothing is imported that a scheduler
would not want. Names are vLLM's.
"""

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from octavo.engine.from_dict import FromDict

MAX_SCHEMA_CHARS = 1 << 16
MAX_GRAMMAR_CHARS = 1 << 16
MAX_REGEX_CHARS = 1 << 13
MAX_CHOICES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams(FromDict):
    """The form that every candidate of a request takes. Exactly one of these; a violation is a ValueError naming it.

    json: a JSON schema, as a mapping or as its text. json_object: True for any JSON object. regex: in the syntax of
    Rust's regex crate (no look-around, no back-references), for the whole output. choice: the texts of which the output
    is one. grammar: Lark's syntax as llguidance reads it, or GBNF (with `::=`).

    The output ends with the form: nothing follows a complete one. A form that can go on (`a+`) ends where the model
    ends it, or at max_tokens, which may cut it short.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) not in (None, False)]
        if len(given) != 1:
            names = ", ".join(field.name for field in fields(self))
            raise ValueError(f"structured_outputs: expected exactly one of {names}, got {given or 'none'}")
        self.source()

    @property
    def kind(self) -> str:
        """The name of the field that is set."""
        return next(field.name for field in fields(self) if getattr(self, field.name) not in (None, False))

    def source(self) -> str:
        """The wish as one text; with `kind` it identifies what is to be compiled."""
        return {
            "json": lambda: _schema_text(self.json),
            "regex": lambda: _text("regex", self.regex, MAX_REGEX_CHARS),
            "choice": lambda: _choice_text(self.choice),
            "grammar": lambda: _text("grammar", self.grammar, MAX_GRAMMAR_CHARS),
            "json_object": lambda: _object_text(self.json_object),
        }[self.kind]()


def _refuse(field: str, expected: str, value: object) -> ValueError:
    return ValueError(f"structured_outputs.{field}: expected {expected}, got {value!r:.80}")


def _text(field: str, value: Any, longest: int) -> str:
    if not isinstance(value, str) or not value:
        raise _refuse(field, "a text that is not empty", value)
    if len(value) > longest:
        raise ValueError(f"structured_outputs.{field}: expected at most {longest} characters, got {len(value)}")
    return value


def _schema_text(schema: Any) -> str:
    """Canonical, so that equal schemas are compiled once."""
    try:
        value = json_module.loads(_text("json", schema, MAX_SCHEMA_CHARS)) if isinstance(schema, str) else schema
        if not isinstance(value, Mapping):
            raise _refuse("json", "a JSON schema (an object)", schema)
        # the order of keys stays: it is the order in which properties are written
        text = json_module.dumps(value, separators=(",", ":"), allow_nan=False)
    except json_module.JSONDecodeError as error:
        raise ValueError(f"structured_outputs.json: expected a schema, got text that is not JSON: {error}") from None
    except RecursionError:
        raise ValueError("structured_outputs.json: expected a schema of less depth") from None
    except TypeError as error:
        raise ValueError(f"structured_outputs.json: expected plain JSON values, got {error}") from None
    return _text("json", text, MAX_SCHEMA_CHARS)


def _choice_text(choices: Any) -> str:
    if isinstance(choices, str | bytes | Mapping) or not isinstance(choices, Sequence) or not choices:
        raise _refuse("choice", "a list of texts", choices)
    if len(choices) > MAX_CHOICES:
        raise ValueError(f"structured_outputs.choice: expected at most {MAX_CHOICES} texts, got {len(choices)}")
    for text in choices:
        _text("choice", text, MAX_GRAMMAR_CHARS)
    return _text("choice", json_module.dumps(list(choices)), MAX_GRAMMAR_CHARS)


def _object_text(wanted: Any) -> str:
    if wanted is not True:
        raise _refuse("json_object", "True, or nothing", wanted)
    return '{"type":"object"}'
