"""Incremental text equals the text decoded at once, whatever the tokens' borders; stop strings cut it exactly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.engine.detokenizer import Detokenizer, TokenBytes

BYTES = TokenBytes(lambda token_id: bytes([token_id]))


def run(data: bytes, **options) -> tuple[str, str | None, list[str]]:
    """Feeds one byte per token: the final text, the stop string that ended it, and the text after each token."""
    detokenizer = Detokenizer(BYTES, **options)
    seen = []
    for byte in data:
        stopped = detokenizer.append(byte)
        seen.append(detokenizer.text)
        if stopped is not None:
            return detokenizer.text, stopped, seen
    detokenizer.finish()
    return detokenizer.text, None, seen


@given(st.text())
def test_a_character_appears_with_its_last_byte(text):
    final, _, seen = run(text.encode("utf-8", "surrogatepass"))
    assert final == text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    if "\ud7ff" < max(text, default="") < "\ue000":
        return
    for shown in seen:
        assert text.startswith(shown)
        assert "\ufffd" not in shown or "\ufffd" in text


@given(st.binary())
def test_invalid_bytes_become_the_replacement_characters_of_one_decode(data):
    assert run(data)[0] == data.decode("utf-8", "replace")


def test_an_endless_run_of_invalid_bytes_is_not_held_back():
    assert len(run(b"\x80" * 1000)[2][-1]) == 1000


def first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """The definition: read character by character, the first stop string to be complete; the longer of two."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return end - len(stop), end, stop
    return None


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_do_not_depend_on_token_borders(text, stops, data):
    pieces = []
    rest = text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(rest[:size].encode())
        rest = rest[size:]
    expected = first_stop(text, stops)
    for include in (False, True):
        detokenizer = Detokenizer(dict(enumerate(pieces)), stop=stops, include_stop_str_in_output=include)
        stopped = next((s for s in map(detokenizer.append, range(len(pieces))) if s is not None), None)
        if expected is None:
            detokenizer.finish()
            assert (detokenizer.text, stopped) == (text, None)
        else:
            start, end, stop = expected
            assert (detokenizer.text, stopped) == (text[: end if include else start], stop)


def test_text_is_held_back_only_while_it_may_become_a_stop_string():
    _, stopped, seen = run(b"a<en> <end>", stop=["<end>"])
    assert stopped == "<end>"
    assert seen == ["a", "a", "a", "a", "a<en>", "a<en> ", "a<en> ", "a<en> ", "a<en> ", "a<en> ", "a<en> "]


def test_what_was_held_back_appears_at_the_end():
    assert run(b"ab<en", stop=["<end>"])[0] == "ab<en"
    assert run("é".encode()[:1])[0] == "\ufffd"


@pytest.mark.parametrize("min_tokens", [0, 2, 3, 4])
def test_stop_strings_within_min_tokens_do_not_count(min_tokens):
    text, stopped, _ = run(b"abab", stop=["ab"], min_tokens=min_tokens)
    assert (text, stopped) == {0: ("", "ab"), 2: ("ab", "ab"), 3: ("ab", "ab"), 4: ("abab", None)}[min_tokens]


def test_a_shorter_stop_string_ignored_under_min_tokens_is_not_found_again():
    assert run(b"abac", stop=["a", "abx"], min_tokens=2)[0:2] == ("ab", "a")


def test_silent_tokens_give_no_text():
    table = TokenBytes(lambda token_id: bytes([token_id]), silent=[65])
    detokenizer = Detokenizer(table)
    for token in b"ABA":
        detokenizer.append(token)
    assert detokenizer.text == "B"
