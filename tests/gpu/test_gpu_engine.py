"""The engine on a GPU answers as transformers does there, whatever the family, the batch and the way it runs."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from octavo import LLM, SamplingParams
from octavo.models import config_from_hf

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
    """`checkpoints(family)` → directory of random weights, and transformers' greedy tokens of each prompt on CUDA."""
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


def greedy(reference, prompt: list[int], **options) -> list[int]:
    ids = torch.tensor([prompt], device="cuda")
    options = {"max_new_tokens": GREEDY.max_tokens, "do_sample": False, "eos_token_id": None} | options
    with torch.no_grad():
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


def make_llm(directory, **options) -> LLM:
    options = {"dtype": "float32", "block_size": 16, "max_num_seqs": 8, "kv_cache_memory": 1 << 24} | options
    llm = LLM(directory, device="cuda", skip_tokenizer_init=True, progress=False, **options)
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


def test_penalties_under_steps_run_ahead(checkpoints):
    """The newest token is penalised on the device, before the host has read it; others without penalties beside it."""
    directory, plain = checkpoints("llama")
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory).eval().to("cuda")
    penalised = SamplingParams(temperature=0.0, repetition_penalty=1.4, max_tokens=24, ignore_eos=True)
    expected = [greedy(reference, prompt, repetition_penalty=1.4) for prompt in PROMPTS]
    assert expected != plain
    assert tokens(make_llm(directory), PROMPTS * 2, [penalised] * 4 + [GREEDY] * 4) == expected + plain


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


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v2"])
@pytest.mark.parametrize(
    "options",
    [{"cuda_graphs": False}, {"max_num_batched_tokens": 16}, {"max_num_seqs": 3}, {"block_size": 1}],
    ids=str,
)
def test_the_way_of_running_changes_no_token(checkpoints, family, options):
    directory, expected = checkpoints(family)
    assert tokens(make_llm(directory, **options)) == expected


def test_a_tiny_cache_preempts_and_changes_no_token(checkpoints):
    directory, expected = checkpoints("llama")
    per_token = config_from_hf(directory).kv_bytes_per_token(torch.float32)
    llm = make_llm(directory, kv_cache_memory=9 * 16 * per_token)
    assert tokens(llm) == expected
    assert llm.engine.scheduler.num_preemptions > 0


def test_a_batch_that_shrinks_runs_on_smaller_graphs(checkpoints):
    """20 requests that end one after the other: each has the tokens that it has alone."""
    directory, _ = checkpoints("llama")
    llm = make_llm(directory, max_num_seqs=20, kv_cache_memory=1 << 26)
    prompts = [[7 + i, 11 * i % 290, 5] * (1 + i % 4) for i in range(20)]
    params = [SamplingParams(temperature=0.0, max_tokens=2 + 3 * i, ignore_eos=True) for i in range(20)]
    together = tokens(llm, prompts, params)
    assert together == [tokens(llm, [prompt], [p])[0] for prompt, p in zip(prompts, params, strict=True)]


@pytest.mark.xdist_group("large")
def test_the_default_cache_leaves_room_for_every_step(checkpoints):
    """Sized by what was measured: the fullest steps run, and the report accounts for the whole GPU."""
    directory, _ = checkpoints("qwen3")
    free, total = torch.cuda.mem_get_info()
    llm = make_llm(directory, kv_cache_memory=None, kv_cache_memory_fraction=0.2, max_num_seqs=64)
    before = llm.engine.device_memory()
    assert before.kv_cache == llm.engine.config.cache_bytes
    assert 0.1 * free < before.kv_cache < 0.2 * total  # what is free changes: other workers share the GPU
    prompts = [[i % 290 + 3] * 200 for i in range(64)]
    tokens(llm, prompts, SamplingParams(seed=1, max_tokens=8, ignore_eos=True))
    after = llm.engine.device_memory()
    assert (after.weights, after.kv_cache) == (before.weights, before.kv_cache)
    assert after.steps + after.allocator < 0.1 * free


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("name", ["qwen3-0.6b", "llama3-8b", "deepseek-v2-lite"])
def test_the_benchmark_models_serve(tmp_path, name):
    """benchmarks/configs at full width, two layers (of DeepSeek: one dense, one of experts), bf16: prompts of all sizes
    beside decodes, twice with the same tokens."""
    config = json.loads((Path(__file__).parents[2] / "benchmarks" / "configs" / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    llm = make_llm(
        tmp_path, dtype="auto", load_format="dummy", max_model_len=4096, max_num_seqs=256, kv_cache_memory=1 << 30,
        enable_prefix_caching=False,
    )  # fmt: skip
    prompts = [[(7 * i + j) % 9000 for j in range(20 + i)] for i in range(256)] + [[5] * 4000, [6] * 700]
    params = [
        SamplingParams(temperature=0.6 * (i % 2), seed=i, ignore_eos=True, max_tokens=3 + i % 7)
        for i in range(len(prompts))
    ]
    first = tokens(llm, prompts, params)
    assert [len(ids) for ids in first] == [p.max_tokens for p in params]
    assert tokens(llm, prompts, params) == first


def test_aborts_under_a_step_in_flight(checkpoints):
    directory, expected = checkpoints("llama")
    engine = make_llm(directory).engine
    finished = {}
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, GREEDY)
        engine.add_request(f"aborted {i}", prompt[::-1], GREEDY)
    for step in range(200):
        if not engine.has_unfinished():
            break
        for output in engine.step():
            finished[output.request_id] = list(output.outputs[0].token_ids)
        if 2 <= step < 2 + len(PROMPTS):
            engine.abort(f"aborted {step - 2}")
        engine.check_integrity()
    assert [finished[str(i)] for i in range(len(PROMPTS))] == expected
    assert engine.scheduler.blocks.num_free_blocks == engine.config.num_blocks
