"""The engine on a GPU answers as transformers does there, whatever the family, the batch and the way it runs."""

import pytest
import torch
import transformers

from octavo import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: none here"),
]

COMMON = {
    "vocab_size": 297,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": None,
}
GQA = {"num_key_value_heads": 2, "head_dim": 16}
MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 3, "experts_implementation": "eager"}
MLA = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**COMMON, **GQA),
    "qwen2": transformers.Qwen2Config(**COMMON, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**COMMON, **GQA),
    "mistral": transformers.MistralConfig(**COMMON, **GQA, sliding_window=24),
    "gemma3": transformers.Gemma3TextConfig(**COMMON, **GQA, sliding_window=24, query_pre_attn_scalar=16),
    "deepseek_v2": transformers.DeepseekV2Config(**COMMON, **MLA, **MOE, topk_method="group_limited_greedy"),
    "deepseek_v3": transformers.DeepseekV3Config(**COMMON, **MLA, **MOE),
    "qwen3_moe": transformers.Qwen3MoeConfig(**COMMON, **GQA, **MOE, num_experts=8),
}
PROMPTS = [[*range(10, 43)], [7], [*range(100, 180, 3)], [5, 6] * 8]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """`checkpoints(family)` → directory of random weights, and transformers' greedy tokens of each prompt on the GPU."""
    made = {}

    def make(family: str):
        if family not in made:
            torch.manual_seed(1)
            reference = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
            with torch.no_grad():
                for name, tensor in [*reference.named_parameters(), *reference.named_buffers()]:
                    if not name.endswith(("inv_freq", "embed_scale")):
                        tensor.normal_(std=0.2).add_("norm" in name and family != "gemma3")
            directory = tmp_path_factory.mktemp(family)
            reference.save_pretrained(directory)
            reference.to("cuda")
            made[family] = directory, [greedy(reference, prompt) for prompt in PROMPTS]
        return made[family]

    return make


def greedy(reference, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt], device="cuda")
    options = {"max_new_tokens": GREEDY.max_tokens, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


def make_llm(directory, num_blocks: int = 64, **options) -> LLM:
    options = {"device": "cuda", "dtype": "float32", "block_size": 16, "max_num_seqs": 8} | options
    llm = LLM(directory, skip_tokenizer_init=True, progress=False, kv_cache_memory=1 << 24, **options)
    assert llm.engine.model.device.type == "cuda"
    return llm


def tokens(llm: LLM, prompts=PROMPTS, params=GREEDY) -> list[list[int]]:
    outputs = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]
    llm.engine.check_integrity()
    assert llm.engine.scheduler.blocks.num_free_blocks == llm.engine.config.num_blocks
    return outputs


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_tokens_are_those_of_transformers(checkpoints, family):
    directory, expected = checkpoints(family)
    llm = make_llm(directory)
    assert tokens(llm) == expected
    assert tokens(llm) == expected  # over cached beginnings


def test_a_seed_gives_the_same_tokens_in_any_company(checkpoints):
    directory, _ = checkpoints("llama")
    params = [SamplingParams(seed=i, max_tokens=16, ignore_eos=True, top_p=p) for i, p in enumerate((1, 0.9, 1, 0.5))]
    together = tokens(make_llm(directory), params=params)
    alone = [tokens(make_llm(directory), [prompt], [p])[0] for prompt, p in zip(PROMPTS, params, strict=True)]
    assert together == alone


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_serves(checkpoints, dtype):
    directory, expected = checkpoints("llama")
    outputs = tokens(make_llm(directory, dtype=dtype))
    assert outputs == tokens(make_llm(directory, dtype=dtype))
    assert [len(o) for o in outputs] == [len(o) for o in expected]
