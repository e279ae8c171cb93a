"""A whole decoder over a paged cache, its layers fused as on a GPU, interpreted: the same as in plain torch."""

import pytest
import torch

import octavo
from octavo.models import build_model, config_from_hf
from octavo.nn.cache import make_caches

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": LLAMA,
    "qwen2": {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},  # biases
    "qwen3": {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16},  # head norms
    "gemma3": {
        **LLAMA,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 8,
    },
    "deepseek_v2": {
        **LLAMA,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "topk_method": "greedy",
    },
}


def logits(model, prompt, following):
    """Of a prompt of several rows and the tokens that follow it, one row each, over a cache."""
    rows, caches = make_caches(model, batch_size=1, max_length=40)
    results = []
    for token_ids in (prompt, *following.split(1)):
        step = rows.append(len(token_ids))
        results.append(model.compute_logits(model(token_ids, step.positions, caches, step.metadata)))
    return torch.cat(results)


@pytest.mark.parametrize("family", CONFIGS)
@torch.inference_mode()
def test_the_fused_decoder_equals_the_plain_one(family):
    torch.manual_seed(0)
    model = build_model(config_from_hf(CONFIGS[family]), dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    prompt, following = torch.randint(0, 61, (20,)), torch.randint(0, 61, (2,))
    with octavo.use_backend("reference"):
        expected = logits(model, prompt, following)
    with octavo.use_backend("triton"):
        fused = logits(model, prompt, following)
    torch.testing.assert_close(fused, expected, atol=2e-4, rtol=2e-4)
