"""Log probabilities in the two shapes of the API. A token is told by its exact bytes, which need not be whole
characters."""

import codecs
from collections.abc import Sequence

from octavo.engine.detokenizer import TokenBytes, token_bytes_of
from octavo.models import Tokenizer
from octavo.server.messages import TokenLogprobs
from octavo.server.protocol import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)

LEAST = -9999.0  # stands for minus infinity, which JSON lacks


class TokenTexts:
    """Names tokens. tokenizer: None where there is none; tokens are then told by their numbers."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._bytes: TokenBytes | None = None
        if tokenizer is not None:
            self._bytes = token_bytes_of(tokenizer, skip_special_tokens=False)

    def bytes_of(self, token_id: int) -> bytes | None:
        return None if self._bytes is None else self._bytes[token_id]

    def name(self, token_id: int) -> str:
        """Its text; `bytes:\\xNN…` where that is no text; `token_id:N` without a tokenizer."""
        spelt = self.bytes_of(token_id)
        if spelt is None:
            return f"token_id:{token_id}"
        try:
            return spelt.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)

    # ---- shapes ----------------------------------------------------------------------------------------------------

    def for_completion(
        self,
        token_ids: Sequence[int],
        entries: Sequence[TokenLogprobs | None],
        num_top: int,
        place: "Place",
    ) -> CompletionLogprobs:
        """place: where the first of these tokens stands; moved behind the last."""
        names = [self.name(token_id) for token_id in token_ids]
        offsets = [place.step(self.bytes_of(token_id) or b"") for token_id in token_ids]
        logprobs = [
            None if entry is None else _finite(entry[token_id].logprob)
            for token_id, entry in zip(token_ids, entries, strict=True)
        ]
        pairs = zip(token_ids, entries, strict=True)
        top = [None if entry is None else self._top(token, entry, num_top) for token, entry in pairs]
        return CompletionLogprobs(names, logprobs, top if num_top else None, offsets)

    def _top(self, token_id: int, entry: TokenLogprobs, num_top: int) -> dict[str, float]:
        """The likeliest, and the token itself."""
        shown = [*_likeliest(entry, num_top), (token_id, entry[token_id].logprob)]
        return {self.name(token): _finite(value) for token, value in shown}

    def for_chat(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs], num_top: int) -> ChatLogprobs:
        content = []
        for token_id, entry in zip(token_ids, entries, strict=True):
            top = [TopLogprob(*self._told(token, value)) for token, value in _likeliest(entry, num_top)]
            content.append(TokenLogprob(*self._told(token_id, entry[token_id].logprob), top))
        return ChatLogprobs(content)

    def for_prompt(self, entries: Sequence[TokenLogprobs | None]) -> PromptLogprobs:
        return [
            None
            if entry is None
            else {
                token: PromptLogprob(_finite(value.logprob), value.rank, self.name(token))
                for token, value in entry.items()
            }
            for entry in entries
        ]

    def _told(self, token_id: int, logprob: float) -> tuple[str, float, list[int] | None]:
        spelt = self.bytes_of(token_id)
        return self.name(token_id), _finite(logprob), None if spelt is None else list(spelt)


class Place:
    """A place in a text that is read token by token; a character counts once its last byte has come."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._offset = 0

    def step(self, token: bytes) -> int:
        """The characters before this token."""
        start = self._offset
        self._offset += len(self._decode(token))
        return start


def _likeliest(entry: TokenLogprobs, count: int) -> list[tuple[int, float]]:
    """The `count` likeliest of an entry, best first."""
    ranked = sorted(entry.items(), key=lambda item: -item[1].logprob)
    return [(token, value.logprob) for token, value in ranked[:count]]


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
