"""Tiny models as GGUF files, written with the `gguf` package: its names, its quantisers, llama.cpp's row orders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def add_tokenizer(writer: gguf.GGUFWriter, pre: str = "smollm") -> None:
    """The specials, the 256 bytes, some merged pairs, and fillers that no text gives."""
    alphabet = byte_alphabet()
    merges = [*map(" ".join, zip("thinkablevrszdqo", "heonagsrtyuwpcmx", strict=True)), "Ġ t", "Ġ a", "th e", "Ġ the"]
    merges += ["Ġ w", "o r", "l d", "Ġw or", "1 2", "12 3", "! !"]
    tokens = [*SPECIAL, *alphabet, *dict.fromkeys(merge.replace(" ", "") for merge in merges)]
    tokens += [f"<unused{i}>" for i in range(TINY["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 5 if token.startswith("<unused") else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")


def add_config(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)


def interleave_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order in which llama.cpp's converter stores Llama's q and k rows."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, reference: Any, architecture: str, quantisation: str = "F32", pre: str = "smollm") -> Any:
    """Write a transformers model as GGUF; its matrices quantised, and then dequantised in place in `reference`."""
    config = reference.config
    writer = gguf.GGUFWriter(path, architecture)
    add_config(writer, config)
    add_tokenizer(writer, pre)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    kind = gguf.GGMLQuantizationType[quantisation]
    for name, parameter in reference.named_parameters():
        array = parameter.detach().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if architecture == "llama" and heads:
            array = interleave_halves(array, heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            array = array + 1
        raw_kind = kind if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        raw = gguf.quants.quantize(np.ascontiguousarray(array), raw_kind)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(target, raw, raw_dtype=raw_kind)
        if raw_kind != gguf.GGMLQuantizationType.F32:
            values = gguf.quants.dequantize(raw, raw_kind)
            if architecture == "llama" and heads:
                values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            parameter.data.copy_(torch.from_numpy(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return reference


def make_reference(config_class: type, **changes: Any) -> Any:
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(config_class(**TINY | changes)).eval()
    for name, parameter in reference.named_parameters():
        parameter.data.normal_(std=0.2)
        if "norm" in name and config_class is not transformers.Gemma3TextConfig:
            parameter.data.add_(1.0)
    return reference


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory) -> tuple[Path, Any]:
    """A Llama with Q8_0 matrices, and transformers' model with the same values."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path, make_reference(transformers.LlamaConfig), "llama", "Q8_0")


@pytest.fixture
def make_gguf(tmp_path) -> Callable[..., tuple[Path, Any]]:
    """`make_gguf(config_class, architecture, quantisation="F32", pre="smollm", **config)` → path, reference."""

    def make(config_class: type, architecture: str, quantisation: str = "F32", pre: str = "smollm", **changes: Any):
        path = tmp_path / "model.gguf"
        return path, write_gguf(path, make_reference(config_class, **changes), architecture, quantisation, pre)

    return make
