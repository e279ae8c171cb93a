"""What a user may ask of sampling and of beam search: every field checked once, at construction.

Names, defaults and ranges are vLLM's. Objects are frozen, so that one can be shared by a thousand requests. Bounds that
vLLM leaves open are closed here (the constants below), because each unbounded field is a way to exhaust an engine.
"""

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.engine.from_dict import FromDict
from octavo.engine.structured_output import StructuredOutputsParams

MAX_N = 1024  # candidates of one request
MAX_LOGPROBS = 20  # alternatives reported with each token; vLLM's default bound
MAX_LOGIT_BIAS = 1024  # entries
MAX_BAD_WORDS = 1024  # entries
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_LENGTH = 1024  # characters: the detokenizer searches this far back on each token
MAX_STOP_TOKEN_IDS = 1024
MAX_ALLOWED_TOKEN_IDS = 1 << 20  # no vocabulary is larger
MAX_BEAM_WIDTH = 64
MAX_TOKEN_ID = 2**31 - 1
_INT64 = 2**63


def _refuse(field: str, expected: str, value: object) -> ValueError:
    shown = repr(value)
    return ValueError(f"{field}: expected {expected}, got {shown if len(shown) <= 80 else shown[:77] + '...'}")


def _integer(field: str, value: Any, low: int, high: int) -> int:
    expected = f"an integer from {low} to {high}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise _refuse(field, expected, value)
    number = operator.index(value)
    if not low <= number <= high:
        raise _refuse(field, expected, value)
    return number


def _real(field: str, value: Any, low: float, high: float, *, open_low: bool = False) -> float:
    bounds = f"{'above' if open_low else 'at least'} {low:g}" + ("" if math.isinf(high) else f" and at most {high:g}")
    expected = f"a finite number {bounds}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise _refuse(field, expected, value)
    number = float(value)
    if not low <= number <= high or (open_low and number == low):
        raise _refuse(field, expected, value)
    return number


def _boolean(field: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _refuse(field, "True or False", value)


def _items(field: str, value: Any, what: str, most: int) -> Sequence[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise _refuse(field, f"a list of {what}", value)
    if len(value) > most:
        raise ValueError(f"{field}: expected at most {most} {what}, got {len(value)}; send fewer")
    return value


def _token_ids(field: str, value: Any, most: int) -> tuple[int, ...]:
    return tuple(_integer(field, token, 0, MAX_TOKEN_ID) for token in _items(field, value, "token ids", most))


def _strings(field: str, value: Any, most: int, longest: int | None = None) -> tuple[str, ...]:
    for text in _items(field, value, "strings", most):
        if not isinstance(text, str) or not text:
            raise _refuse(field, "strings that are not empty", text)
        if longest is not None and len(text) > longest:
            raise ValueError(f"{field}: expected strings of at most {longest} characters, got one of {len(text)}")
    return tuple(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(FromDict):
    """How the tokens of one request are chosen, when they stop and what is reported. Every violation is a ValueError
    naming the field.

    n: candidates for the prompt, which is computed once and shared copy-on-write. 1 to MAX_N.
    temperature: at least 0; 0 is greedy. Then top_p, top_k and min_p have no effect.
    top_p: above 0, at most 1 (1 keeps all). top_k: at least 1; 0 or -1 keep all. min_p: 0 to 1, relative to the
    likeliest token.
    presence_penalty, frequency_penalty: -2 to 2, on the output so far. repetition_penalty: above 0 (1 is none), on
    prompt and output.
    seed: int64; the same request with the same seed gives the same tokens whatever else runs.
    stop: strings that end the output (a lone string is taken as a list of one); needs detokenize. stop_token_ids: ids
    that end it.
    include_stop_str_in_output: keep the stop string in the text. ignore_eos: go on after the end-of-sequence token.
    max_tokens: at least 1; None is up to the context's end. min_tokens: no end-of-sequence or stop token before that
    many.
    logprobs: alternatives to report with each token, 0 to MAX_LOGPROBS (the sampled one is always there).
    prompt_logprobs: same, for the prompt.
    logit_bias: token id to a number from -100 to 100, added to the logits. bad_words: strings never produced.
    allowed_token_ids: only these may be produced.
    skip_special_tokens, detokenize: of the output text.
    structured_outputs: the form that the output takes, a StructuredOutputsParams or a mapping of its fields. No field
    that forbids tokens may stand beside it: together they could leave none.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] = ()
    allowed_token_ids: Sequence[int] | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None

    @property
    def looks_back(self) -> bool:
        """Whether the host must know the output so far before the next token is chosen. Penalties need it, too, but
        they are applied where the newest token is."""
        return bool(self.bad_words) or self.structured_outputs is not None

    def __post_init__(self) -> None:
        for field in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize"):
            _boolean(field, getattr(self, field))
        self._check_distribution()
        self._check_lengths()
        self._check_reports()
        self._check_token_rules()
        if self.structured_outputs is not None:
            self._check_form()

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)

    def _check_distribution(self) -> None:
        self._set("n", _integer("n", self.n, 1, MAX_N))
        self._set("top_k", _integer("top_k", self.top_k, -1, MAX_TOKEN_ID))
        self._set("temperature", _real("temperature", self.temperature, 0, math.inf))
        self._set("top_p", _real("top_p", self.top_p, 0, 1, open_low=True))
        self._set("min_p", _real("min_p", self.min_p, 0, 1))
        self._set("presence_penalty", _real("presence_penalty", self.presence_penalty, -2, 2))
        self._set("frequency_penalty", _real("frequency_penalty", self.frequency_penalty, -2, 2))
        self._set(
            "repetition_penalty", _real("repetition_penalty", self.repetition_penalty, 0, math.inf, open_low=True)
        )
        if self.seed is not None:
            self._set("seed", _integer("seed", self.seed, -_INT64, _INT64 - 1))

    def _check_lengths(self) -> None:
        if self.max_tokens is not None:
            self._set("max_tokens", _integer("max_tokens", self.max_tokens, 1, _INT64 - 1))
        self._set("min_tokens", _integer("min_tokens", self.min_tokens, 0, _INT64 - 1))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refuse("min_tokens", f"at most max_tokens ({self.max_tokens})", self.min_tokens)

    def _check_reports(self) -> None:
        for field in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, field)) is not None:
                self._set(field, _integer(field, value, 0, MAX_LOGPROBS))

    def _check_token_rules(self) -> None:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        self._set("stop", _strings("stop", () if stop is None else stop, MAX_STOP_STRINGS, MAX_STOP_STRING_LENGTH))
        if self.stop and not self.detokenize:
            raise _refuse("stop", "no stop strings with detokenize=False (use stop_token_ids)", self.stop)
        ids = () if self.stop_token_ids is None else self.stop_token_ids
        self._set("stop_token_ids", _token_ids("stop_token_ids", ids, MAX_STOP_TOKEN_IDS))
        self._set("bad_words", _strings("bad_words", () if self.bad_words is None else self.bad_words, MAX_BAD_WORDS))
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS)
            if not allowed:
                raise _refuse("allowed_token_ids", "at least one token id, or None for all", self.allowed_token_ids)
            self._set("allowed_token_ids", allowed)
        if self.logit_bias is not None:
            self._set("logit_bias", _checked_bias(self.logit_bias))

    def _check_form(self) -> None:
        form: Any = self.structured_outputs
        if isinstance(form, Mapping):
            self._set("structured_outputs", StructuredOutputsParams.from_dict(form))
        elif not isinstance(form, StructuredOutputsParams):
            raise _refuse("structured_outputs", "a StructuredOutputsParams or a mapping of its fields", form)
        for field, absent in (("allowed_token_ids", None), ("bad_words", ()), ("min_tokens", 0), ("ignore_eos", False)):
            if (value := getattr(self, field)) != absent:
                raise _refuse(field, f"{absent!r} beside structured_outputs, which alone decides", value)


def _checked_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise _refuse("logit_bias", "a mapping of token id to bias", bias)
    if len(bias) > MAX_LOGIT_BIAS:
        raise ValueError(f"logit_bias: expected at most {MAX_LOGIT_BIAS} entries, got {len(bias)}; send fewer")
    return {
        _integer("logit_bias", key, 0, MAX_TOKEN_ID): _real("logit_bias", value, -100, 100)
        for key, value in bias.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams(FromDict):
    """Beam search of one request: keep the beam_width likeliest continuations, each sharing blocks with its siblings
    copy-on-write.

    beam_width: 1 to MAX_BEAM_WIDTH. max_tokens: at least 1. ignore_eos: go on after end-of-sequence.
    temperature: at least 0, divides the logits (0, the default, is read as 1: the model's own distribution, as in
    vLLM).
    length_penalty: score = cumulative logprob / length ** length_penalty. include_stop_str_in_output: keep the end
    token in the text.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for field in ("ignore_eos", "include_stop_str_in_output"):
            _boolean(field, getattr(self, field))
        checked: dict[str, object] = {
            "beam_width": _integer("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH),
            "max_tokens": _integer("max_tokens", self.max_tokens, 1, _INT64 - 1),
            "temperature": _real("temperature", self.temperature, 0, math.inf),
            "length_penalty": _real("length_penalty", self.length_penalty, -math.inf, math.inf),
        }
        for field, value in checked.items():
            object.__setattr__(self, field, value)
