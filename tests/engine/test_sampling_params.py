"""Every field has vLLM's default and range; every violation is a ValueError that names the field."""

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from octavo.engine import sampling_params as limits
from octavo.engine.sampling_params import BeamSearchParams, SamplingParams

NAN, INFINITY = math.nan, math.inf

ACCEPTED: list[dict[str, Any]] = [
    {},
    {"n": limits.MAX_N},
    {"temperature": 0},
    {"temperature": 100.0},
    {"top_p": 1e-9},
    {"top_k": -1},
    {"top_k": 0},
    {"min_p": 1.0},
    {"presence_penalty": -2, "frequency_penalty": 2.0, "repetition_penalty": 0.01},
    {"seed": -(2**63)},
    {"max_tokens": None, "min_tokens": 10**6},
    {"logprobs": 0, "prompt_logprobs": limits.MAX_LOGPROBS},
    {"logit_bias": {0: -100, 7: 100.0}},
    {"stop": "END", "stop_token_ids": [0, 2]},
    {"stop": None, "stop_token_ids": None, "bad_words": None},
    {"allowed_token_ids": (3, 1)},
]

REFUSED: list[tuple[str, Any]] = [
    *(("n", value) for value in (0, -1, limits.MAX_N + 1, 10**30, 1.0, True, "1", None)),
    *(("temperature", value) for value in (-0.1, NAN, INFINITY, True, "hot", None)),
    *(("top_p", value) for value in (0, -1, 1.01, NAN, False, "all")),
    *(("top_k", value) for value in (-2, 2.5, True, 2**31, NAN)),
    *(("min_p", value) for value in (-0.1, 1.1, NAN, True)),
    *(("presence_penalty", value) for value in (-2.1, 2.1, NAN, INFINITY, True)),
    *(("frequency_penalty", value) for value in (-2.1, 2.1, -INFINITY, "1")),
    *(("repetition_penalty", value) for value in (0, -1, NAN, INFINITY)),
    *(("seed", value) for value in (2**63, 1.5, True, "7")),
    *(("max_tokens", value) for value in (0, -1, True, 16.0)),
    *(("min_tokens", value) for value in (-1, True, 17)),
    *(("logprobs", value) for value in (-1, limits.MAX_LOGPROBS + 1, True, 1.0)),
    *(("prompt_logprobs", value) for value in (-1, limits.MAX_LOGPROBS + 1)),
    *(("stop", value) for value in ("", [""], [1], 5, {"a": 1}, b"x", ["x"] * (limits.MAX_STOP_STRINGS + 1))),
    ("stop", "x" * (limits.MAX_STOP_STRING_LENGTH + 1)),
    *(("stop_token_ids", value) for value in ([-1], [True], "12", 3, [0] * (limits.MAX_STOP_TOKEN_IDS + 1))),
    *(("bad_words", value) for value in ("word", [""], [None], ["x"] * (limits.MAX_BAD_WORDS + 1))),
    *(("allowed_token_ids", value) for value in ([], [-1], [1.0], "1")),
    *(("logit_bias", value) for value in ([1], {-1: 1}, {1: 101}, {1: NAN}, {"1": 1}, {1: True}, {True: 1})),
    ("logit_bias", dict.fromkeys(range(limits.MAX_LOGIT_BIAS + 1), 1)),
    *((name, 1) for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output")),
]


@pytest.mark.parametrize("values", ACCEPTED, ids=str)
def test_accepts_the_whole_range(values: dict[str, Any]) -> None:
    SamplingParams(**values)


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=lambda value: repr(value)[:40])
def test_refuses_and_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: expected") as error:
        SamplingParams(**{field: value})
    assert len(str(error.value)) < 300, "a hostile value is not echoed whole"


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.repetition_penalty) == (16, 0, 1.0)
    assert params.detokenize
    assert params.skip_special_tokens
    assert not params.ignore_eos


def test_lists_are_copied_and_a_lone_stop_string_is_a_list() -> None:
    ids = [1, 2]
    params = SamplingParams(stop="END", stop_token_ids=ids)
    ids.append(3)
    assert params.stop == ("END",)
    assert params.stop_token_ids == (1, 2)
    with pytest.raises(FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


def test_stop_strings_need_text() -> None:
    with pytest.raises(ValueError, match=r"stop: expected no stop strings with detokenize=False"):
        SamplingParams(stop="x", detokenize=False)


@pytest.mark.parametrize(
    ("name", "hint"), [("temprature", "did you mean 'temperature'"), ("guided_regex", "known fields: n, temperature")]
)
def test_unknown_names_are_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: unknown field of SamplingParams; {hint}"):
        SamplingParams.from_dict({name: 1})


def test_from_dict_checks_values_too() -> None:
    assert SamplingParams.from_dict({"n": 2, "top_k": 5}) == SamplingParams(n=2, top_k=5)
    with pytest.raises(ValueError, match=r"^n: expected"):
        SamplingParams.from_dict({"n": 0})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("beam_width", value) for value in (0, limits.MAX_BEAM_WIDTH + 1, True)),
        *(("max_tokens", 0), ("temperature", NAN), ("length_penalty", INFINITY), ("ignore_eos", 0)),
    ],
)
def test_beam_search_params(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, field: value})
