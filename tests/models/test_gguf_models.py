"""GGUF files of every family give transformers' logits: names, row orders, norms, quantised types are put right."""

import json

import gguf
import numpy as np
import pytest
import torch
import transformers

from octavo.models import gguf_file, load_model, loader
from octavo.nn import Linear
from octavo.ops.linear import QuantizedWeight

FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama, tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": True}),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {"sliding_window": 7, "num_hidden_layers": 7, "query_pre_attn_scalar": 16, "rope_parameters": None},
    ),
}
IDS = torch.randint(0, 300, (1, 23), generator=torch.Generator().manual_seed(0))


def relative_error(loaded, reference, order=torch.inf) -> float:
    """In the norm of this order; the default compares the largest values."""
    with torch.no_grad():
        logits = loaded.model.compute_logits(loaded.model(IDS))
        expected = reference(IDS).logits
    return float((logits - expected).norm(order) / expected.norm(order))


@pytest.mark.parametrize("quantisation", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_unpacked_weights_of_every_type(make_gguf, quantisation):
    path, reference = make_gguf(transformers.LlamaConfig, "llama", quantisation)
    loaded = load_model(path, keep_quantized=False, progress=False)
    assert loaded.held.keys() == {f"{quantisation} as float32", "F32 as float32"}
    assert relative_error(loaded, reference) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantisation", ["F32", "Q8_0"])
def test_every_family(make_gguf, family, quantisation):
    config_class, changes = FAMILIES[family]
    path, reference = make_gguf(config_class, family.split(",")[0], quantisation, **changes)
    loaded = load_model(path, keep_quantized=False, progress=False)
    assert loaded.config.num_parameters == reference.num_parameters()
    assert relative_error(loaded, reference) <= 1e-4


@pytest.mark.parametrize("quantisation", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_kept_quantised_hold_the_same_values(make_gguf, quantisation, tied):
    path, reference = make_gguf(transformers.LlamaConfig, "llama", quantisation, tie_word_embeddings=tied)
    loaded = load_model(path, progress=False)
    assert f"{quantisation}, kept quantised" in loaded.held
    model, state = loaded.model, reference.state_dict()
    q, k, v = (state[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    merged = model.layers[1].attn.qkv_proj.weight
    assert isinstance(merged, QuantizedWeight)
    torch.testing.assert_close(merged.dequantize(), torch.cat([q, k, v]))
    torch.testing.assert_close(model.embed_tokens(IDS), state["model.embed_tokens.weight"][IDS])
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied


def round_to_16_bit_groups(module, args):
    """What a quantised product does to its input: 16 bits per group of 32, scale = largest / 32512."""
    groups = args[0].unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 32512
    return ((groups / scale).round() * scale).flatten(-2)


@pytest.mark.parametrize("quantisation", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantised_weights_cost_no_more_than_the_rounding_of_activations(make_gguf, quantisation):
    """The error is at most twice that of plain torch with the same rounding in front of every matrix."""
    path, reference = make_gguf(transformers.LlamaConfig, "llama", quantisation)
    error = relative_error(load_model(path, progress=False), reference, 2)
    rounding = load_model(path, keep_quantized=False, progress=False)
    for module in rounding.model.modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(round_to_16_bit_groups)
    assert 0 < error <= 2 * relative_error(rounding, reference, 2)


def rewrite(source, target, change=lambda name, data, kind: (data, kind), **more) -> None:
    """Copy a GGUF file with other tensors: `change` gives each one's data and type, `more` are added ones."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            element = entry.types[-1] if len(entry.types) > 1 else None
            writer.add_key_value(key, entry.contents(), entry.types[0], element)
    for name, values in more.items():
        writer.add_tensor(name.replace("__", "."), values)
    for tensor in reader.tensors:
        data, kind = change(tensor.name, np.array(tensor.data), tensor.tensor_type)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_mixed_types_in_one_merged_projection_are_unpacked(make_gguf, tmp_path):
    """Q4_K_M files store v in more bits than q and k; one quantised weight can't hold both."""
    q4_0 = gguf.GGMLQuantizationType.Q4_0

    def store_v_in_q4_0(name, data, kind):
        if "attn_v" not in name:
            return data, kind
        return gguf.quants.quantize(gguf.quants.dequantize(data, kind), q4_0), q4_0

    path, _ = make_gguf(transformers.LlamaConfig, "llama", "Q8_0", num_key_value_heads=4)
    rewrite(path, tmp_path / "mixed.gguf", store_v_in_q4_0)
    loaded = load_model(tmp_path / "mixed.gguf", progress=False)
    assert loaded.held["Q8_0/Q4_0 as float32"] == 2 * 3 * 64 * 64
    assert isinstance(loaded.model.layers[0].attn.o_proj.weight, QuantizedWeight)
    assert torch.is_tensor(loaded.model.layers[0].attn.qkv_proj.weight)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
def test_super_block_types_in_a_model(make_gguf, tmp_path, name):
    """Random bytes with sane scales, since the `gguf` package reads these types but does not write them."""
    kind = gguf.GGMLQuantizationType[name]
    _, size = gguf.GGML_QUANT_SIZES[kind]
    rng, written = np.random.default_rng(0), {}

    def random_blocks(tensor, data, old):
        if data.ndim != 2:
            return data, old
        raw = rng.integers(0, 256, (data.shape[0], data.shape[1] // 256 * size), dtype=np.uint8)
        blocks = raw.reshape(-1, size)
        for at in (208,) if name == "Q6_K" else (0, 2):
            blocks[:, at + 1] = 0x10  # fp16 near 0.0005
        written[tensor] = gguf.quants.dequantize(raw, kind)
        return raw, kind

    path, _ = make_gguf(transformers.LlamaConfig, "llama", hidden_size=256, intermediate_size=256, head_dim=64)
    rewrite(path, tmp_path / "k.gguf", random_blocks)
    loaded = load_model(tmp_path / "k.gguf", progress=False)
    layer = loaded.model.layers[1]
    kept = name in QuantizedWeight.QTYPES
    assert (f"{name}, kept quantised" in loaded.held) == kept
    weights = [layer.attn.qkv_proj.weight, layer.mlp.down_proj.weight]
    qkv, down = (weight.dequantize() if kept else weight for weight in weights)
    q, k, v = (written[f"blk.1.attn_{part}.weight"] for part in "qkv")
    q, k = (w.reshape(heads, 32, 2, 256).swapaxes(1, 2).reshape(w.shape) for w, heads in ((q, 4), (k, 2)))
    torch.testing.assert_close(qkv, torch.from_numpy(np.concatenate([q, k, v])))
    torch.testing.assert_close(down, torch.from_numpy(written["blk.1.ffn_down.weight"]))


def test_bf16_activations(make_gguf):
    path, reference = make_gguf(transformers.LlamaConfig, "llama", "BF16")
    loaded = load_model(path, dtype="bfloat16", progress=False)
    assert loaded.model.dtype == loaded.model.layers[0].attn.o_proj.weight.dtype == torch.bfloat16
    with torch.no_grad():
        theirs = reference.to(torch.bfloat16)(IDS).logits.float()
        exact = reference.float()(IDS).logits
    with torch.no_grad():
        ours = loaded.model.compute_logits(loaded.model(IDS))
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


def test_description_is_json_and_counts_every_parameter(tiny_gguf):
    loaded = load_model(tiny_gguf[0], progress=False)
    shown = json.loads(json.dumps(loaded.describe()))
    assert sum(shown["weights"].values()) == shown["parameters"] == tiny_gguf[1].num_parameters()
    assert shown["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4  # K and V, layers, heads, head_dim, bytes
    assert shown["architecture"] == "LlamaForCausalLM"
    assert shown["weight_bytes"] < 4 * shown["parameters"]


def test_llama3_frequency_factors(make_gguf, tmp_path):
    """GGUF stores Llama 3's rotary scaling as one divisor per frequency, in rope_freqs.weight."""
    scaling = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 16
    path, reference = make_gguf(transformers.LlamaConfig, "llama", rope_parameters=scaling)
    plain = 1.0 / 1e4 ** (np.arange(0, 16, 2) / 16)
    factors = plain / reference.model.rotary_emb.inv_freq.numpy()
    rewrite(path, tmp_path / "scaled.gguf", rope_freqs__weight=factors.astype(np.float32))
    assert relative_error(load_model(tmp_path / "scaled.gguf", progress=False), reference) <= 1e-4
    assert relative_error(load_model(path, progress=False), reference) > 1e-2


REFUSED = {
    "general.architecture": ("mamba", "known: gemma3, llama, qwen2, qwen3"),
    "llama.expert_count": (8, "mixtures of experts"),
    "llama.block_count": (3, "lacks 'blk.2"),
    "llama.embedding_length": (32, "must have the shape"),
    "llama.attention.head_count": (0, "0 heads"),
    "llama.attention.head_count_kv": (3, "multiple of num_kv_heads"),
    "llama.context_length": ("long", "must be an integer"),
    "llama.rope.freq_base": (float("nan"), "rope_theta"),
    "llama.rope.scaling.type": ("longrope", "none, linear and yarn"),
    "tokenizer.ggml.pre": ("tekken", "known: gpt-2, smollm"),
    "tokenizer.ggml.model": ("t5", "gpt2 and llama"),
    "tokenizer.ggml.eos_token_id": (300, "eos_token_id"),
    "tokenizer.ggml.bos_token_id": (300, "outside of the vocabulary"),
    "tokenizer.ggml.merges": (["a b", "zz qq"], "do not fit together"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_metadata_that_makes_no_sense_is_refused(tiny_gguf, key, monkeypatch):
    value, message = REFUSED[key]
    sound = gguf_file.read_gguf(tiny_gguf[0])
    damaged = gguf_file.GGUFFile(sound.path, {**sound.metadata, key: value}, sound.tensors)
    monkeypatch.setattr(loader, "read_gguf", lambda path: damaged)
    with pytest.raises(ValueError, match=message):
        load_model(tiny_gguf[0], progress=False)
