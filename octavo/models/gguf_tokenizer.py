"""A tokenizer from GGUF metadata: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

`tokenizer.ggml.pre` says how text is cut before BPE runs; another cut gives other tokens (digits above all), so an
unknown name is an error and never a guess. The cuts are those of the models' own tokenizers; their names are
llama.cpp's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from octavo.models.gguf_config import gguf_eos_ids
from octavo.models.tokenizer import SpecialTokens
from octavo.models.tokenizer import Tokenizer as OctavoTokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type

_LLAMA3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_CUT = _LLAMA3_CUT.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2_CUT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _cut(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Cuts at each pattern in turn, then spells the pieces in GPT-2's byte alphabet."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2_cut(*before: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """GPT-2's own cut, which `ByteLevel` has built in."""
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])


@dataclass(frozen=True, slots=True)
class _ByteLevelKind:
    """One value of `tokenizer.ggml.pre`. `ignore_merges`: a piece that is in the vocabulary is taken whole."""

    pre_tokenizer: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool = False
    add_bos: bool = False  # where the file does not say
    normalizer: Callable[[], normalizers.Normalizer] | None = None


_KINDS: dict[str, _ByteLevelKind] = {
    "gpt-2": _ByteLevelKind(_gpt2_cut),
    "smollm": _ByteLevelKind(lambda: _gpt2_cut(pre_tokenizers.Digits(individual_digits=True))),
    "llama-bpe": _ByteLevelKind(lambda: _cut(_LLAMA3_CUT), ignore_merges=True, add_bos=True),
    "qwen2": _ByteLevelKind(lambda: _cut(_QWEN2_CUT), normalizer=normalizers.NFC),
    # llama.cpp's cut for files whose converter did not know the model
    "default": _ByteLevelKind(lambda: _cut(r"[\p{P}\$\+<=>\^~\|]+", _GPT2_CUT, r"\p{N}+", "[0-9][0-9][0-9]")),
}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> OctavoTokenizer:
    """Build the tokenizer that `GGUFFile.metadata` describes. Raises `ValueError` for kinds that are not known."""
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type")
    if kinds is None:
        kinds = np.ones(len(tokens), np.int32)
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        raise ValueError("tokenizer.ggml.token_type of the GGUF file must hold one number for each of its tokens")
    model = metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        backend, add_bos = _byte_level_bpe(metadata, tokens)
    elif model == "llama":
        backend, add_bos = _sentencepiece_bpe(metadata, tokens, kinds)
    else:
        raise ValueError(f"tokenizer.ggml.model of the GGUF file is {model!r}; gpt2 and llama are known")
    _add_tokens(backend, tokens, kinds)
    bos, pad = (_token_id(metadata, name, len(tokens)) for name in ("bos", "padding"))
    if metadata.get("tokenizer.ggml.add_bos_token", add_bos) and bos is not None:
        prefix = [(tokens[bos], bos)]
        backend.post_processor = processors.TemplateProcessing(single=[tokens[bos], "$A"], special_tokens=prefix)
    eos = tuple(i for i in gguf_eos_ids(metadata) if i < len(tokens))
    template = metadata.get("tokenizer.chat_template")
    return OctavoTokenizer(backend, SpecialTokens(bos, eos, pad), template if isinstance(template, str) else None)


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[Tokenizer, bool]:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in _KINDS:
        raise ValueError(
            f"tokenizer.ggml.pre of the GGUF file is {pre!r}, which decides how text is cut into tokens; known: "
            f"{', '.join(_KINDS)}. Convert the model again, or load its safetensors with their tokenizer.json"
        )
    kind = _KINDS[pre]
    merges = [tuple(merge.split(" ")) for merge in _strings(metadata, "tokenizer.ggml.merges")]
    backend = _bpe(tokens, merges, ignore_merges=kind.ignore_merges)
    backend.pre_tokenizer = kind.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    if kind.normalizer is not None:
        backend.normalizer = kind.normalizer()
    return backend, kind.add_bos


def _sentencepiece_bpe(metadata: Mapping[str, Any], tokens: list[str], kinds: np.ndarray) -> tuple[Tokenizer, bool]:
    """SentencePiece merges the neighbours whose union has the best score; as BPE: every split of a token is a merge,
    ranked by the token's score."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise ValueError("tokenizer.ggml.scores of the GGUF file must hold one number for each of its tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    for index in np.argsort(-scores, kind="stable"):
        token = tokens[index]
        splits = [(token[:at], token[at:]) for at in range(1, len(token))] if kinds[index] in (1, _USER_DEFINED) else []
        merges += [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
    unknown = next((tokens[i] for i in np.flatnonzero(kinds == _UNKNOWN)), None)
    backend = _bpe(tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    strip = []
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        strip = [decoders.Strip(content=" ", left=1)]
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend, True


def _bpe(tokens: list[str], merges: list[Any], **options: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, **options))
    except Exception as error:  # the package raises bare Exception for a merge outside the vocabulary
        raise ValueError(f"the GGUF file's tokens and merges do not fit together: {error}") from None


def _add_tokens(backend: Tokenizer, tokens: list[str], kinds: np.ndarray) -> None:
    """Both kinds are matched in text before anything else; control tokens are also skipped by decoding."""
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        found = [AddedToken(tokens[i], special=special, normalized=False) for i in np.flatnonzero(kinds == kind)]
        backend.add_special_tokens(found) if special else backend.add_tokens(found)


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} of the GGUF file must be a list of strings, got {type(value).__name__}")
    return value


def _token_id(metadata: Mapping[str, Any], name: str, count: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is not None and (not isinstance(value, int) or not 0 <= value < count):
        raise ValueError(f"tokenizer.ggml.{name}_token_id is {value!r}, outside of the vocabulary of {count}")
    return value
