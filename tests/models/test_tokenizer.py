"""Tokens are those of llama.cpp on awkward texts, and text survives the round trip."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from octavo.models import SpecialTokens, Tokenizer, default_model_path, read_tokenizer
from octavo.models.gguf_file import read_gguf
from octavo.models.gguf_tokenizer import tokenizer_from_gguf

LLAMA_CPP = json.loads(Path(__file__).with_name("llama_cpp_tokens.json").read_text())  # made by the script beside it


@pytest.fixture(scope="module")
def metadata() -> dict:
    return dict(read_gguf(default_model_path()).metadata)


@pytest.fixture(scope="module")
def default_tokenizer(metadata) -> Tokenizer:
    return tokenizer_from_gguf(metadata)


@pytest.mark.real_model
@pytest.mark.parametrize("pre", LLAMA_CPP["pre"])
def test_byte_level_tokens_are_those_of_llama_cpp(metadata, pre):
    tokenizer = tokenizer_from_gguf({**metadata, "tokenizer.ggml.pre": pre})
    texts = LLAMA_CPP["texts"] + LLAMA_CPP["special_texts"]
    for text, expected in zip(texts, LLAMA_CPP["pre"][pre], strict=True):
        if pre == "qwen2" and "\u0301" in text:
            continue  # Qwen's own tokenizer composes characters (NFC) first, and so do we; llama.cpp does not
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text


@pytest.mark.real_model
def test_digits_stand_alone(metadata, default_tokenizer):
    """smollm splits digits before GPT-2's cut. A reader that forgets it parts the spaces before them."""
    spelled = [default_tokenizer.id_to_token(i) for i in default_tokenizer.encode("x   19")]
    assert spelled == ["x", "ĠĠĠ", "1", "9"]
    gpt2 = tokenizer_from_gguf({**metadata, "tokenizer.ggml.pre": "gpt-2"})
    assert [gpt2.id_to_token(i) for i in gpt2.encode("x   19")] == ["x", "ĠĠ", "Ġ", "1", "9"]


def sentencepiece(**changes) -> Tokenizer:
    vocabulary = LLAMA_CPP["sentencepiece"]
    return tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": vocabulary["tokens"],
            "tokenizer.ggml.scores": np.array(vocabulary["scores"], np.float32),
            "tokenizer.ggml.token_type": np.array(vocabulary["types"], np.int32),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
        | changes
    )


def test_sentencepiece_tokens_are_those_of_llama_cpp():
    tokenizer = sentencepiece()
    for text, expected in zip(LLAMA_CPP["texts"], LLAMA_CPP["sentencepiece"]["ids"], strict=True):
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected) == text


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_sentencepiece_round_trip(text):
    tokenizer = _SENTENCEPIECE_WITHOUT_PREFIX
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    if "▁" not in text and not any(special in text for special in ("<s>", "</s>", "<unk>")):
        assert tokenizer.decode(ids) == text


_SENTENCEPIECE_WITHOUT_PREFIX = sentencepiece(**{"tokenizer.ggml.add_space_prefix": False})  # Gemma's form


MISSING_BYTES = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}


@pytest.mark.real_model
@given(text=st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_round_trip_of_any_text(default_tokenizer, text):
    # the model's vocabulary lacks a few bytes, which begin characters of unassigned planes: they vanish
    text = "".join(c for c in text if not MISSING_BYTES & set(c.encode()))
    ids = default_tokenizer.encode(text, add_special_tokens=False)
    assert default_tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < default_tokenizer.vocab_size for i in ids)


@pytest.mark.real_model
def test_special_tokens_of_the_default_model(default_tokenizer):
    assert default_tokenizer.vocab_size == 49152
    assert default_tokenizer.eos_token_ids == (2,)
    assert default_tokenizer.pad_token_id == 2
    assert default_tokenizer.encode("<|im_end|>") == [2]
    assert default_tokenizer.decode([2, 2]) == ""
    assert default_tokenizer.decode([2], skip_special_tokens=False) == "<|im_end|>"
    assert default_tokenizer.is_special(2)
    assert not default_tokenizer.is_special(100)
    assert default_tokenizer.encode("hi") == default_tokenizer.encode("hi", add_special_tokens=False)  # no BOS
    assert default_tokenizer.encode_batch(["a b", ""]) == [default_tokenizer.encode("a b"), []]


@pytest.mark.real_model
def test_chat_of_the_default_model(default_tokenizer):
    text = default_tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    closed = default_tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ""}], add_generation_prompt=False
    )
    assert closed == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|im_end|>\n"


def tiny() -> tokenizers.Tokenizer:
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def write_directory(directory: Path, **config) -> Path:
    tiny().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "lstrip": False}])
def test_directory_roles(tmp_path, token):
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path, eos_token=token, bos_token="<s>"), [7])
    assert tokenizer.eos_token_ids == (7, 257)
    assert tokenizer.bos_token_id == 256
    assert tokenizer.pad_token_id is None


@pytest.mark.parametrize(
    "template", ["{{ bos_token }}A", [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "<s>A"}]]
)
def test_directory_template(tmp_path, template):
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path, bos_token="<s>", chat_template=template))
    assert tokenizer.apply_chat_template(MESSAGES) == "<s>A"


def test_template_file_comes_before_the_config(tmp_path):
    write_directory(tmp_path, chat_template="A")
    (tmp_path / "chat_template.jinja").write_text("B{{ enable_thinking }}")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.apply_chat_template(MESSAGES, variables={"enable_thinking": False}) == "BFalse"


def test_no_template_is_said(tmp_path):
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path))
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template(MESSAGES)


def test_files_that_are_missing_or_broken(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="not a tokenizer"):
        Tokenizer.from_directory(tmp_path)
    write_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="JSON object"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("text", [None, 7, b"bytes", "lone \ud800 surrogate"])
def test_what_is_not_text_is_refused(text):
    with pytest.raises(ValueError, match="text"):
        Tokenizer(tiny(), SpecialTokens()).encode(text)


def test_ids_outside_of_the_vocabulary():
    tokenizer = Tokenizer(tiny(), SpecialTokens())
    assert tokenizer.id_to_token(-1) is tokenizer.id_to_token(10**6) is tokenizer.token_to_id("nothing") is None
    assert tokenizer.decode([10**6]) == ""
    with pytest.raises(ValueError, match="negative"):
        tokenizer.decode([3, -1])


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    backend = tiny()
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    assert len(Tokenizer(backend, SpecialTokens()).encode("hello")) == 5


@pytest.mark.real_model
def test_read_tokenizer_loads_no_weights():
    assert read_tokenizer(default_model_path()).vocab_size == 49152


@pytest.mark.real_model
def test_a_tokenizer_is_read_without_torch():
    code = (
        "import sys; from octavo.models import default_model_path, read_tokenizer; "
        "read_tokenizer(default_model_path()); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
