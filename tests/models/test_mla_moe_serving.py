"""DeepSeek and Qwen3-MoE from directories through the engine: sharded files, latent blocks, greedy tokens."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from octavo import LLM, SamplingParams
from octavo.models import config_from_hf, load_model

COMMON = {
    "vocab_size": 97,
    "hidden_size": 44,
    "intermediate_size": 59,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 13,
    "num_experts_per_tok": 3,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": None,
    "experts_implementation": "eager",
}
DEEPSEEK = {
    "kv_lora_rank": 12,
    "q_lora_rank": 14,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "head_dim": 6,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
CONFIGS = {
    "v2": transformers.DeepseekV2Config(**COMMON, **DEEPSEEK, topk_method="group_limited_greedy"),
    "v3": transformers.DeepseekV3Config(**COMMON, **DEEPSEEK),
    "qwen3_moe": transformers.Qwen3MoeConfig(**COMMON, num_experts=8, num_key_value_heads=2, head_dim=16),
}
BLOCK = 4
PREFIX = list(range(10, 22))


def save(config, directory: Path, **options):
    torch.manual_seed(1)
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in [*reference.named_parameters(), *reference.named_buffers()]:
            if not name.endswith("inv_freq"):
                tensor.normal_(std=0.2).add_("norm" in name)
    reference.save_pretrained(directory, **options)
    return reference


@pytest.fixture(scope="module", params=CONFIGS)
def served(request, tmp_path_factory):
    """transformers' model, and an engine on its checkpoint in several shards; steps of 8 tokens, 24 blocks."""
    directory = tmp_path_factory.mktemp(request.param)
    reference = save(CONFIGS[request.param], directory, max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    per_token = config_from_hf(directory).kv_bytes_per_token(torch.float32)
    llm = LLM(
        directory,
        device="cpu",
        skip_tokenizer_init=True,
        block_size=BLOCK,
        kv_cache_memory=24 * BLOCK * per_token,
        max_num_seqs=4,
        max_num_batched_tokens=8,
        progress=False,
    )
    return reference, llm


def greedy(reference, prompt: list[int], count: int) -> list[int]:
    with torch.no_grad():
        out = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )
    return out[0, len(prompt) :].tolist()


def test_greedy_tokens_are_those_of_transformers(served):
    """In chunks, batched with others, in a cache too small for all at once, and over cached beginnings."""
    reference, llm = served
    prompts = [[*PREFIX, 30, 31, 32], [*PREFIX, 40], [50, 51], [60, 61, 62, 63, 64, 65, 66] * 3]
    params = SamplingParams(temperature=0.0, max_tokens=15, ignore_eos=True)
    expected = [greedy(reference, prompt, 15) for prompt in prompts]
    for _ in range(2):  # the second time from the prefix cache
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    assert outputs[0].num_cached_tokens >= 8
    llm.engine.check_integrity()


def test_the_cache_holds_latents_and_the_report_is_exact(served):
    reference, llm = served
    config, hf = llm.engine.runner.model.config, reference.config
    layers, heads = hf.num_hidden_layers, hf.num_attention_heads
    if config.mla is None:
        numbers, mha = 2 * layers * hf.num_key_value_heads * hf.head_dim, 2 * layers * heads * hf.head_dim
    else:
        numbers, mha = layers * (12 + 6), layers * heads * (10 + 6 + 9)
    cache = llm.engine.runner.kv_cache
    assert config.kv_bytes_per_token(torch.float32) == cache.bytes_per_token == 4 * numbers
    assert config.mha_kv_bytes_per_token(torch.float32) == 4 * mha
    held = sum(tensor.nbytes for layer in cache.layers for tensor in layer.tensors)
    assert held == cache.nbytes == llm.engine.config.cache_bytes == 24 * BLOCK * 4 * numbers


def test_multi_token_prediction_is_left_out(tmp_path):
    reference = save(CONFIGS["v3"], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in weights
    weights["model.layers.3.eh_proj.weight"] = torch.zeros(44, 88)
    save_file(weights, tmp_path / "model.safetensors")
    model = load_model(tmp_path, skip_tokenizer=True, progress=False).model
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        expected = reference(ids).logits
        assert (model.compute_logits(model(ids)) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_bf16_keeps_the_correction_bias(tmp_path):
    save(CONFIGS["v3"], tmp_path)
    loaded = load_model(tmp_path, dtype="bfloat16", skip_tokenizer=True, progress=False)
    stored = load_file(tmp_path / "model.safetensors")["model.layers.2.mlp.gate.e_score_correction_bias"]
    bias = loaded.model.layers[2].mlp.router.e_score_correction_bias
    assert loaded.model.dtype == torch.bfloat16
    torch.testing.assert_close(bias.data, stored.float(), rtol=0, atol=0)


def test_a_missing_expert_is_named(tmp_path):
    save(CONFIGS["v2"], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.2.mlp.experts.5.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 'model.layers.2.mlp.experts.5.up_proj.weight'"):
        load_model(tmp_path, skip_tokenizer=True, progress=False)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("v2", {"topk_method": "noaux_tc"}, "DeepSeek-V2 routes by softmax"),
        ("v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("v2", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("v2", {"kv_lora_rank": 0}, "kv_rank of the model config"),
        ("v3", {"scoring_func": "softmax"}, "DeepSeek-V3 routes by noaux_tc, sigmoid"),
        ("v3", {"n_routed_experts": 1 << 15}, "num_experts of the model config"),
        ("v3", {"routed_scaling_factor": 0}, "routed_scaling_factor of the model config"),
        ("qwen3_moe", {"num_experts_per_tok": "two"}, "top_k of the model config"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "makes no sense"),
        ("qwen3_moe", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ],
)
def test_configs_that_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**json.loads(CONFIGS[name].to_json_string(use_diff=False)), **_named(name), **changes})


def _named(name: str) -> dict[str, list[str]]:
    names = {"v2": "DeepseekV2ForCausalLM", "v3": "DeepseekV3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
    return {"architectures": [names[name]]}
