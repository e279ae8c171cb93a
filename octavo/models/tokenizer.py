"""Text to token ids and back, and conversations to text: a thin, typed face over Hugging Face's Rust `tokenizers`.

A tokenizer comes from a directory's tokenizer.json or from GGUF metadata (gguf_tokenizer.py builds that one).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import tokenizers

from octavo.models.chat_template import ChatTemplate, ChatTemplateError
from octavo.models.config import read_json


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids with a role, where a model has them. `eos` are all ids that end an answer."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


class Tokenizer:
    """Encodes, decodes and renders chats. Thread-safe, immutable."""

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialTokens, chat_template: str | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special = special
        self._chat_template_source = chat_template
        self._chat_template: ChatTemplate | None = None
        self._special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)

    @classmethod
    def from_directory(cls, directory: Path, eos_token_ids: Iterable[int] = ()) -> Self:
        """From tokenizer.json, with tokenizer_config.json and chat_template.jinja where they exist.

        `eos_token_ids` are those of the model's own configs; the tokenizer's eos token is added to them.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"{path} is missing; other tokenizer formats are not read (save the tokenizer with transformers, which "
                "writes it)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{path} is not a tokenizer that the tokenizers package reads: {error}") from None
        config_path = directory / "tokenizer_config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        bos, eos, pad = (_role_id(backend, config.get(f"{role}_token")) for role in ("bos", "eos", "pad"))
        ids = dict.fromkeys([*eos_token_ids, *([] if eos is None else [eos])])
        return cls(backend, SpecialTokens(bos, tuple(ids), pad), _template_of(directory, config))

    # ---- text and ids -----------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; with `add_special_tokens` also those that the model expects around it (a BOS, mostly)."""
        return list(self.encode_batch([text], add_special_tokens)[0])

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"text must be a string, got {type(text).__name__}")  # noqa: TRY004
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(
                    "text holds a lone surrogate, which is not Unicode text; decode your bytes as UTF-8 first"
                )
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are no whole character give U+FFFD, ids past the vocabulary's end nothing."""
        ids = list(token_ids)
        if ids and min(ids) < 0:
            raise ValueError(f"token_ids must not be negative, got {min(ids)}")
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of an id ("Ġthe"), None outside of it."""
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        return None if token is None else str(token)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token in the vocabulary's own spelling, or None."""
        token_id = self._backend.token_to_id(token)
        return None if token_id is None else int(token_id)

    def is_special(self, token_id: int) -> bool:
        """True for control tokens, which `decode` skips."""
        return token_id in self._special_ids

    @property
    def vocab_size(self) -> int:
        """Ids that mean something; a model's logits may have more, for alignment."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def special_token_ids(self) -> frozenset[int]:
        return self._special_ids

    @property
    def bos_token_id(self) -> int | None:
        return self._special.bos

    @property
    def pad_token_id(self) -> int | None:
        return self._special.pad

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All ids that end an answer, the main one first."""
        return self._special.eos

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The `tokenizers` object, for grammars and other tools that need the whole vocabulary."""
        return self._backend

    # ---- chats ------------------------------------------------------------------------------------------------------

    @property
    def chat_template(self) -> str | None:
        """The model's own template; a request can't bring another."""
        return self._chat_template_source

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation, special tokens included: encode it with `add_special_tokens=False`.

        `add_generation_prompt` opens the assistant's answer. `tools` are OpenAI's function descriptions. `variables`
        are the template's own switches (such as enable_thinking). Raises `ValueError` when the model has no template or
        refuses.
        """
        if self._chat_template_source is None:
            raise ChatTemplateError("this model has no chat template; give it a plain prompt")
        if self._chat_template is None:
            self._chat_template = ChatTemplate(self._chat_template_source)
        eos = self.eos_token_ids[0] if self.eos_token_ids else None
        roles = {"bos_token": self.bos_token_id, "eos_token": eos, "pad_token": self.pad_token_id}
        texts = {name: self.id_to_token(token_id) for name, token_id in roles.items() if token_id is not None}
        return self._chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **{**texts, **(variables or {})}
        )


def _role_id(backend: tokenizers.Tokenizer, token: Any) -> int | None:
    """tokenizer_config.json writes a token as a string or as an object with its content."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return None if content is None else backend.token_to_id(str(content))


def _template_of(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return None if template is None else str(template)
