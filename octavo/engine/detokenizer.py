"""Text from tokens, one token at a time, in constant time each.

A token of a byte-level or SentencePiece vocabulary is a run of bytes, so decoding is joining bytes and reading UTF-8:
an incremental UTF-8 decoder holds back the bytes of an unfinished character, and no earlier token is ever decoded
again.

Stop strings may begin in one token and end in another. Text is therefore held back exactly while it may still become a
stop string (it is a proper prefix of one) and released the moment it can't. Where several stop strings match, the one
completed first ends the text (of two completed by the same character, the longer): the result does not depend on where
the tokens' borders lie.
"""

import codecs
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence

from octavo.models.tokenizer import Tokenizer

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class TokenBytes(dict[int, bytes]):
    """id → bytes of a token, computed on first use (filling a vocabulary of 150,000 ahead would cost 0.2 s at
    start-up).

    `compute(token_id)` gives the bytes; `silent` are the ids that stand for no text (special tokens, when skipped).
    """

    def __init__(self, compute: Callable[[int], bytes], silent: Collection[int] = ()) -> None:
        super().__init__(dict.fromkeys(silent, b""))
        self._compute = compute

    def __missing__(self, token_id: int) -> bytes:
        self[token_id] = value = self._compute(token_id)
        return value


class Detokenizer:
    """The growing text of one sequence. Not shared, not thread-safe; dropped with its sequence.

    Args:
        token_bytes: the bytes of each token id (`TokenBytes`).
        stop: strings that end the text.
        include_stop_str_in_output: whether the string that ended the text stays in it.
        min_tokens: stop strings that are complete within this many tokens don't count.
    """

    __slots__ = (
        "_bytes",
        "_decode",
        "_held",
        "_include_stop",
        "_longest",
        "_min_tokens",
        "_parts",
        "_stop",
        "num_tokens",
    )

    def __init__(
        self,
        token_bytes: Mapping[int, bytes],
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._bytes = token_bytes
        self._decode = _utf8_decoder(errors="replace").decode
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._parts: list[str] = []
        self._held = ""
        self.num_tokens = 0

    @property
    def text(self) -> str:
        """The text released so far that nobody has taken."""
        return "".join(self._parts)

    def take(self) -> str:
        """The text released since the last call: a stream's next piece."""
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else "".join(parts)

    def append(self, token_id: int) -> str | None:
        """Adds a token; returns the stop string that it completed, if any (the text then ends before or after it)."""
        self.num_tokens += 1
        chunk = self._decode(self._bytes[token_id])
        if self._stop:
            return self._add(chunk)
        self._parts.append(chunk)
        return None

    def finish(self) -> None:
        """Releases what was held back; an unfinished character becomes U+FFFD. For a sequence that ended otherwise."""
        self._add(self._decode(b"", True), ended=True)
        self._parts.append(self._held)
        self._held = ""

    def _add(self, chunk: str, ended: bool = False) -> str | None:
        if not self._stop:
            if chunk:
                self._parts.append(chunk)
            return None
        window = self._held + chunk
        if not ended and self.num_tokens > self._min_tokens and (match := self._first_match(chunk)):
            end, start, stop = match
            self._parts.append(window[: end if self._include_stop else start])
            self._held = ""
            return stop
        cut = self._possible_start(window)
        self._parts.append(window[:cut])
        self._held = window[cut:]
        return None

    def _first_match(self, chunk: str) -> tuple[int, int, str] | None:
        """(end, start, stop string) within held + chunk of the match that `chunk` completes first."""
        window, held = self._held + chunk, len(self._held)
        found = (
            (start + len(stop), start, stop)
            for stop in self._stop
            if (start := window.find(stop, max(0, held + 1 - len(stop)))) >= 0
        )
        return min(found, default=None)

    def _possible_start(self, window: str) -> int:
        """Where the longest tail that is a proper prefix of a stop string begins; the window's length if none is."""
        for start in range(max(0, len(window) - self._longest + 1), len(window)):
            tail = window[start:]
            if any(len(stop) > len(tail) and stop.startswith(tail) for stop in self._stop):
                return start
        return len(window)


def token_bytes_of(tokenizer: Tokenizer, skip_special_tokens: bool) -> TokenBytes:
    """The bytes of a tokenizer's tokens, by the kind of its decoder: byte-level (GPT-2's alphabet) or SentencePiece.

    A text continues its prompt, so a SentencePiece output keeps the space before its first word. Raises ValueError for
    other kinds, whose text is no plain concatenation.
    """
    state = json.loads(tokenizer.backend.decoder.__getstate__()) if tokenizer.backend.decoder else {"type": None}
    kinds = {part["type"] for part in state.get("decoders", [state])}
    if "ByteLevel" in kinds:
        spell = _byte_level_bytes
    elif kinds & {"Metaspace", "ByteFallback", "Replace"}:
        spell = _sentencepiece_bytes
    else:
        raise ValueError(f"decoder of tokenizer.json: expected ByteLevel or SentencePiece's, got {state['type']!r}")

    def compute(token_id: int) -> bytes:
        token = tokenizer.id_to_token(token_id)
        return b"" if token is None else spell(token)

    return TokenBytes(compute, tokenizer.special_token_ids if skip_special_tokens else ())


def _gpt2_alphabet() -> dict[str, int]:
    """Printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up, in order (Radford 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _gpt2_alphabet()
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _byte_level_bytes(token: str) -> bytes:
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode()  # an added token, spelt as it is


def _sentencepiece_bytes(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(match[1])
    return token.replace("▁", " ").encode()
