"""A tiny random model that every test of the engine shares: small enough to run in milliseconds, real in every part;
and what lets many GPU tests share one GPU.
"""

import gc
import json
from pathlib import Path

import pytest

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

GPU_TEST_BYTES = 4 << 30


@pytest.fixture(autouse=True)
def _gpu_is_shared(request):
    """A GPU test gives its memory back, and takes little of it unless it is in the group that runs one at a time."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    import torch

    torch.cuda.reset_peak_memory_stats()
    yield
    peak = torch.cuda.max_memory_allocated()
    gc.collect()
    torch.cuda.empty_cache()
    group = request.node.get_closest_marker("xdist_group")
    assert group is not None or peak <= GPU_TEST_BYTES, f'{peak} bytes: mark it pytest.mark.xdist_group("large")'


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """A Llama of 0.1 M parameters in Hugging Face's format: safetensors, config, tokenizer and chat template.

    The tokenizer is byte-level: ids are bytes, 256 is <end>, then come 10 merged pairs. The weights are wide enough
    that attention matters.
    """
    import tokenizers
    import torch
    import transformers
    from tokenizers import decoders, models, pre_tokenizers

    path = tmp_path_factory.mktemp("tiny-llama")
    alphabet = _byte_alphabet()
    vocab = {character: byte for byte, character in enumerate(alphabet)} | {"<end>": 256}
    merges = [
        (alphabet[a], alphabet[b]) for a, b in (b"th", b"he", b"in", b"er", b"an", b" t", b"a ", b"e ", b"s ", b"on")
    ]
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": CHAT_TEMPLATE}))

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=256,
        bos_token_id=None,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_reference(tiny_model_dir):
    """The same weights in transformers."""
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture(scope="session")
def tiny_loaded(tiny_model_dir):
    """The same weights in octavo."""
    from octavo.models import load_model

    return load_model(tiny_model_dir, progress=False)


@pytest.fixture
def make_engine(tiny_loaded):
    """Builds an engine around the tiny model: `make_engine(num_blocks=…, **options of EngineOptions)`.

    After the test, all blocks of every engine must be back.
    """
    from octavo.engine.llm_engine import LLMEngine
    from octavo.engine.options import EngineOptions

    engines = []

    def make(num_blocks: int = 64, **options) -> LLMEngine:
        options = {"block_size": 4, "max_num_seqs": 8, "device": "cpu"} | options
        per_block = options["block_size"] * tiny_loaded.config.kv_bytes_per_token(tiny_loaded.model.dtype)
        options = EngineOptions(kv_cache_memory=num_blocks * per_block, **options)
        engines.append(LLMEngine.from_loaded(tiny_loaded, options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.check_integrity()
        if not engine.has_unfinished():
            assert engine.scheduler.blocks.num_free_blocks == engine.config.num_blocks


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
