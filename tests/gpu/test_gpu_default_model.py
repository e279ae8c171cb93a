"""The real default model on a GPU: greedy tokens are those of transformers, up to a token that rounding may choose.

In fp32 they agree to the end, both with transformers on the same GPU and with its answers on a CPU (tests/data; see
tests/engine/test_default_model.py). In 16 bits a run may leave the reference's path, but only where the reference's two
likeliest tokens are nearly equal: a margin (distance of the two logits) that the dtype's rounding bridges.
"""

import json
from pathlib import Path

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.engine.llm_engine import LLMEngine
from octavo.engine.options import EngineOptions
from octavo.models import default_model_path, load_model


def _default_model() -> Path | None:
    try:
        return default_model_path()
    except ValueError:
        return None


PATH = _default_model()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: none here"),
    pytest.mark.skipif(PATH is None, reason="needs the default model: not installed here"),
]

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "default_model_greedy.json").read_text())["entries"]
PROMPTS = [entry["prompt_token_ids"] for entry in REFERENCE]
# Largest margin of the reference that 16-bit arithmetic may turn: logits are near 20, so bf16's activations (8 bits)
# move them by some tenths, fp16's (11 bits) by some hundredths
LARGEST_TURNED_MARGIN = {"bfloat16": 0.5, "float16": 0.1}


def load(dtype: str, device: str):
    return load_model(PATH, dtype=dtype, device=torch.device(device), progress=False, keep_quantized=False)


def greedy(loaded, **options) -> list[list[int]]:
    options = EngineOptions(kv_cache_memory=1 << 28, max_model_len=512, max_num_seqs=16, device="cuda", **options)
    llm = LLM.from_engine(LLMEngine.from_loaded(loaded, options))
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    llm.engine.check_integrity()
    return [list(output.outputs[0].token_ids) for output in outputs]


def divergences(outputs: list[list[int]]) -> list[tuple[int, int, float]]:
    """(entry, position, margin of the reference there) of each output's first token that is not the reference's."""
    found = []
    for i, (output, entry) in enumerate(zip(outputs, REFERENCE, strict=True)):
        expected = entry["token_ids"]
        differs = [at for at, pair in enumerate(zip(output, expected, strict=False)) if pair[0] != pair[1]]
        if differs:
            found.append((i, differs[0], entry["margins"][differs[0]]))
        else:
            assert len(output) == len(expected)
    return found


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 64}, {"cuda_graphs": False}], ids=str)
def test_fp32_agrees_to_the_end(options):
    assert divergences(greedy(load("float32", "cuda"), **options)) == []


@pytest.mark.parametrize("dtype", LARGEST_TURNED_MARGIN)
def test_16_bits_leave_the_reference_only_where_two_tokens_are_nearly_equal(dtype):
    found = divergences(greedy(load(dtype, "cuda")))
    print(dtype, [(entry, at, margin) for entry, at, margin in found])
    assert all(margin <= LARGEST_TURNED_MARGIN[dtype] for _, _, margin in found), found


def test_transformers_on_the_same_gpu_agrees():
    """The same dequantised weights in transformers' Llama, fp32, on this GPU."""
    reference = as_transformers(load("float32", "cpu").model).to("cuda")
    outputs = []
    for entry in REFERENCE:
        ids = torch.tensor([entry["prompt_token_ids"]], device="cuda")
        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(entry["token_ids"]), do_sample=False
        )
        outputs.append(out[0, ids.shape[1] :].tolist())
    assert greedy(load("float32", "cuda")) == outputs


def as_transformers(model):
    """Our decoder as transformers' Llama: merged projections taken apart."""
    import transformers

    config = model.config
    assert not config.rope_interleaved, "both turn halves of a head"
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope["rope_theta"]},
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=None,
            eos_token_id=list(config.eos_token_ids),
            pad_token_id=None,
        )
    ).eval()
    sizes = [config.num_heads * config.head_dim] + [config.num_kv_heads * config.head_dim] * 2
    weights = {"model.embed_tokens.weight": model.embed_tokens.weight, "model.norm.weight": model.norm.weight}
    for i, layer in enumerate(model.layers):
        q, k, v = layer.attn.qkv_proj.weight.split(sizes)
        gate, up = layer.mlp.gate_up_proj.weight.chunk(2)
        parts = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.attn.o_proj.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.mlp.down_proj.weight,
            "input_layernorm": layer.attn_norm.weight,
            "post_attention_layernorm": layer.mlp_norm.weight,
        }
        weights |= {f"model.layers.{i}.{name}.weight": weight for name, weight in parts.items()}
    missing = reference.load_state_dict(weights, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"])
    reference.tie_weights()
    return reference
