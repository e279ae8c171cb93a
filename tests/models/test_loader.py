"""Directories of safetensors: whole and sharded, every stored type, and files that lie."""

import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from octavo.models import load_dummy_model, load_model

IDS = torch.randint(0, 200, (1, 13), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def directory(tiny_model_dir, tmp_path) -> Path:
    """A copy of the shared tiny model that a test may damage."""
    for path in tiny_model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def logits(loaded) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model.compute_logits(loaded.model(IDS))


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value is not None}))


def edit_weights(directory: Path, change) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


def shard(directory: Path, count: int = 3) -> Path:
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {name: f"model-{index % count}.safetensors" for index, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: weights[name] for name in names if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_logits_equal_those_of_transformers(tiny_loaded, tiny_reference):
    with torch.no_grad():
        expected = tiny_reference(IDS).logits
    assert (logits(tiny_loaded) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_shards_give_the_same_model(directory, tiny_loaded):
    torch.testing.assert_close(
        logits(load_model(shard(directory), progress=False)), logits(tiny_loaded), rtol=0, atol=0
    )


def test_generation_config_gives_defaults_and_ends(directory):
    edit_json(directory / "generation_config.json", eos_token_id=[7, 256], temperature=0.6, top_k=20, top_p=None)
    loaded = load_model(directory, progress=False)
    assert loaded.generation_defaults == {"temperature": 0.6, "top_k": 20}
    assert loaded.config.eos_token_ids == loaded.tokenizer.eos_token_ids == (7, 256)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_type_is_read(directory, tiny_loaded, stored):
    edit_weights(directory, lambda weights: weights.update({k: v.to(stored) for k, v in weights.items()}))
    loaded = load_model(directory, dtype="float32", progress=False)
    assert loaded.model.dtype == torch.float32
    exact = logits(tiny_loaded)
    assert (logits(loaded) - exact).norm() <= 0.1 * exact.norm()


@pytest.mark.parametrize(
    ("checkpoint", "asked", "expected"),
    [
        ("bfloat16", "auto", torch.bfloat16),
        ("float32", "auto", torch.float32),
        ("float16", "auto", torch.float32),
        ("float32", "float16", torch.float32),
        ("float32", torch.float16, torch.float32),
        ("float32", torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype_on_the_cpu(directory, checkpoint, asked, expected):
    edit_json(directory / "config.json", dtype=checkpoint)
    loaded = load_model(directory, dtype=asked, progress=False)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {expected}
    assert bool(loaded.notes) == ("float16" in (checkpoint, str(asked).removeprefix("torch.")))
    assert loaded.describe()["activation_dtype"] == str(expected).removeprefix("torch.")


@pytest.mark.parametrize("dtype", ["half", "int8", torch.int8, torch.float64])
def test_other_dtypes_are_refused(directory, dtype):
    with pytest.raises(ValueError, match="dtype must be"):
        load_model(directory, dtype=dtype, progress=False)


def test_parameters_can_be_trained(tiny_loaded):
    assert all(parameter.requires_grad for parameter in tiny_loaded.model.parameters())


def test_a_vision_model_gives_its_text_decoder(directory, tiny_loaded):
    """Prefixes of the text tower are dropped, other towers ignored."""

    def wrap(weights):
        for name in list(weights):
            weights[name.replace("model.", "model.language_model.")] = weights.pop(name)
        weights["model.vision_tower.patch.weight"] = torch.zeros(3)

    edit_weights(directory, wrap)
    torch.testing.assert_close(logits(load_model(directory, progress=False)), logits(tiny_loaded), rtol=0, atol=0)


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(NORM), "lacks 'model.layers.0.input_layernorm.weight', which layers.0.attn_norm.weight needs"),
        (lambda w: w.update({NORM: w[NORM][:-1].clone()}), r"must have the shape \(64,\), the checkpoint has"),
        (lambda w: w.update(extra=torch.zeros(3)), "1 tensors that LlamaForCausalLM lacks: extra"),
        (lambda w: w.update({NORM: w[NORM].to(torch.int8)}), "stored as I8"),
    ],
)
def test_weights_that_do_not_fit(directory, change, message):
    edit_weights(directory, change)
    with pytest.raises(ValueError, match=message):
        load_model(directory, progress=False)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "../model.safetensors"}, "only .safetensors files beside it"),
        ({"x": "/etc/passwd"}, "only .safetensors files beside it"),
        ({"x": "model.bin"}, "only .safetensors files beside it"),
        ({"x": "model-9.safetensors"}, "is missing"),
        ({}, "weight_map"),
        ("model.safetensors", "weight_map"),
    ],
)
def test_an_index_that_lies(directory, weight_map, message):
    shard(directory)
    edit_json(directory / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(ValueError, match=message):
        load_model(directory, progress=False)


def test_pickles_are_not_read(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match="other formats are not read"):
        load_model(directory, progress=False)


def test_a_tokenizer_of_another_model(directory):
    edit_json(directory / "config.json", vocab_size=200)
    with pytest.raises(ValueError, match="tokenizer has 267 tokens, the model's embedding 200 rows"):
        load_model(directory, progress=False)


def test_an_end_outside_of_the_vocabulary(directory):
    edit_json(directory / "config.json", eos_token_id=267)
    with pytest.raises(ValueError, match="eos_token_id 267"):
        load_model(directory, progress=False)


def test_paths_that_are_nothing(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_model(tmp_path / "nothing.gguf")
    (tmp_path / "text.gguf").write_text("hello, this is not a model")
    with pytest.raises(ValueError, match="not a sound GGUF"):
        load_model(tmp_path / "text.gguf")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_model(tmp_path)


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_safetensors_give_a_model_or_a_value_error(tiny_model_dir, directory, data):
    content = bytearray((tiny_model_dir / "model.safetensors").read_bytes())
    header = struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header + 8))
        content[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    (directory / "model.safetensors").write_bytes(content)
    tracemalloc.start()
    try:
        load_model(directory, progress=False)
    except ValueError as error:
        assert str(error)  # noqa: PT017
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 24


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dummy_weights(tiny_model_dir, dtype):
    """Random weights from a config alone, the same for the same seed, with sane activations."""
    first, second = (load_dummy_model(tiny_model_dir, dtype=dtype, seed=5) for _ in range(2))
    with torch.inference_mode():
        torch.testing.assert_close(first(IDS), second(IDS), rtol=0, atol=0)
        assert first.compute_logits(first(IDS)).isfinite().all()
    assert first.dtype == getattr(torch, dtype)
    assert (first.norm.weight == 1).all()
    assert 0.01 < first.embed_tokens.weight.float().std() < 0.03
