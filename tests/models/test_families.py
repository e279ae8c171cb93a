"""Every family equals transformers on tiny random weights: without a cache, and through a paged cache in every manner
that the engine fills one. The weights have std 0.2, so attention is far from uniform; unused cache slots are NaN."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from octavo.models import CausalLM, build_model, config_from_hf
from octavo.models.safetensors_weights import SafetensorsWeights
from octavo.models.weights import load_weights
from octavo.nn import LayerCache
from octavo.ops.metadata import AttentionMetadata

TINY = {
    "vocab_size": 97,
    "hidden_size": 44,
    "intermediate_size": 59,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 22,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
DEEPSEEK_YARN = {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}
DEEPSEEK = {
    "q_lora_rank": None,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "num_key_value_heads": 4,
    "head_dim": 6,  # transformers' name for the rotary part
    "moe_intermediate_size": 13,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
QWEN_MOE = {"moe_intermediate_size": 13, "num_experts": 7, "num_experts_per_tok": 3}
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama, biases, tied": (
        transformers.LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama, linear": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama, llama3": (transformers.LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama, yarn": (transformers.LlamaConfig, {"rope_parameters": YARN}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2, window": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": True}),
    "qwen3, biases": (transformers.Qwen3Config, {"attention_bias": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 7}),
    "mistral, no window": (transformers.MistralConfig, {"sliding_window": None}),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 31,
            "final_logit_softcapping": 11.0,
            "rope_parameters": GEMMA_ROPES,
        },
    ),
    "deepseek_v2": (transformers.DeepseekV2Config, DEEPSEEK),
    "deepseek_v2, dense, tied": (
        transformers.DeepseekV2Config,
        {**DEEPSEEK, "first_k_dense_replace": 3, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "deepseek_v2, groups, q compressed, yarn": (
        transformers.DeepseekV2Config,
        {
            **DEEPSEEK,
            "q_lora_rank": 14,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": DEEPSEEK_YARN,
        },
    ),
    "deepseek_v3, yarn": (
        transformers.DeepseekV3Config,
        {**DEEPSEEK, "q_lora_rank": 14, "n_group": 4, "topk_group": 2, "rope_parameters": DEEPSEEK_YARN},
    ),
    "deepseek_v3, q not compressed, halves turn": (
        transformers.DeepseekV3Config,
        {**DEEPSEEK, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False},
    ),
    "qwen3_moe": (transformers.Qwen3MoeConfig, QWEN_MOE),
    "qwen3_moe, dense layers, normed": (
        transformers.Qwen3MoeConfig,
        {**QWEN_MOE, "mlp_only_layers": [1], "norm_topk_prob": True, "attention_bias": True},
    ),
}
DYNAMIC = (
    transformers.LlamaConfig,
    {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
)


@dataclass
class Pair:
    """The same weights twice."""

    reference: Any
    model: CausalLM

    def reference_logits(self, token_ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return self.reference(torch.tensor([token_ids])).logits[0]


def make_pair(directory: Path, config_class: type, changes: dict[str, Any]) -> Pair:
    torch.manual_seed(0)
    config = config_class(**TINY | changes, attn_implementation="eager", experts_implementation="eager")
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(std=0.2)  # norms and biases too: their initial ones and zeros would hide a mistake
            if "norm" in name and config_class is not transformers.Gemma3TextConfig:
                parameter.add_(1.0)
        for name, buffer in reference.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    reference.save_pretrained(directory)
    ours = config_from_hf(directory)
    model = build_model(ours, device="meta", dtype=torch.float32)
    source = SafetensorsWeights(directory, ours)
    cpu = torch.device("cpu")
    load_weights(model, source, dtype=torch.float32, device=cpu, keep_quantized=True, progress=False)
    return Pair(reference, model)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("model"), *CONFIGS[request.param])


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(4, TINY["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@dataclass
class Sequence_:
    """One row of a batch: its tokens, its blocks, how many tokens the cache holds."""

    token_ids: list[int]
    blocks: list[int]
    computed: int = 0


@dataclass
class PagedRun:
    """Runs steps of mixed sequences over caches that begin as NaN; logits come back per sequence."""

    model: CausalLM
    block_size: int = 4
    num_blocks: int = 32
    caches: list[LayerCache] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.caches = [layer.attn.new_cache(self.num_blocks, self.block_size) for layer in self.model.layers]
        for cache in self.caches:
            for tensor in cache.tensors:
                tensor.fill_(float("nan"))

    def step(self, *work: tuple[Sequence_, int]) -> list[Tensor]:
        """Compute the next `count` tokens of each sequence in one packed batch."""
        size = self.block_size
        ids, positions, slots = [], [], []
        for sequence, count in work:
            new = range(sequence.computed, sequence.computed + count)
            ids += [sequence.token_ids[i] for i in new]
            positions += new
            slots += [sequence.blocks[i // size] * size + i % size for i in new]
            sequence.computed += count
        counts = [count for _, count in work]
        widest = max(len(sequence.blocks) for sequence, _ in work)
        absurd = 1 << 30  # entries past a sequence's blocks are never read
        table = [sequence.blocks + [absurd] * (widest - len(sequence.blocks)) for sequence, _ in work]
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32),
            cache_seqlens=torch.tensor([sequence.computed for sequence, _ in work], dtype=torch.int32),
            block_table=torch.tensor(table, dtype=torch.int32),
            slot_mapping=torch.tensor(slots),
            max_seqlen_q=max(counts),
            max_seqlen_k=max(sequence.computed for sequence, _ in work),
        )
        with torch.inference_mode():
            hidden = self.model(torch.tensor(ids), torch.tensor(positions), self.caches, metadata)
            return list(self.model.compute_logits(hidden).split(counts))


def test_without_a_cache(pair):
    ids = [tokens(23, seed=1), tokens(23, seed=2)]
    with torch.no_grad():
        logits = pair.model.compute_logits(pair.model(torch.tensor(ids)))
    for row, got in zip(ids, logits, strict=True):
        assert_close(got, pair.reference_logits(row))


def test_prefill_of_a_packed_batch(pair):
    first, second = Sequence_(tokens(13), [5, 2, 9, 7]), Sequence_(tokens(7, seed=1), [0, 31])
    logits = PagedRun(pair.model).step((first, 13), (second, 7))
    assert_close(logits[0], pair.reference_logits(first.token_ids))
    assert_close(logits[1], pair.reference_logits(second.token_ids))


def test_chunked_prefill_mixed_with_decode(pair):
    long, short = Sequence_(tokens(23), [3, 1, 4, 15, 9, 2]), Sequence_(tokens(9, seed=1), [8, 7, 6])
    run = PagedRun(pair.model)
    pieces: dict[int, list[Tensor]] = {0: [], 1: []}
    for work in ([(long, 5), (short, 6)], [(long, 11), (short, 1)], [(short, 1), (long, 6)], [(long, 1), (short, 1)]):
        for (sequence, _), logits in zip(work, run.step(*work), strict=True):
            pieces[int(sequence is short)].append(logits)
    assert_close(torch.cat(pieces[0]), pair.reference_logits(long.token_ids))
    assert_close(torch.cat(pieces[1]), pair.reference_logits(short.token_ids))


def test_decode_token_by_token(pair):
    sequence = Sequence_(tokens(19), [11, 3, 8, 20, 1])
    run = PagedRun(pair.model)
    logits = [run.step((sequence, count))[0] for count in (3, *[1] * 16)]
    assert_close(torch.cat(logits), pair.reference_logits(sequence.token_ids))


def test_prefill_over_a_cached_prefix(pair):
    prefix = tokens(8)
    first = Sequence_(prefix + tokens(5, seed=1), [5, 2, 9, 7])
    second = Sequence_(prefix + tokens(11, seed=2), [5, 2, 12, 13, 14], computed=8)
    run = PagedRun(pair.model)
    run.step((first, 13))
    (logits,) = run.step((second, 11))
    assert_close(logits, pair.reference_logits(second.token_ids)[8:])


def test_greedy_tokens(pair):
    prompt = tokens(6)
    sequence = Sequence_(list(prompt), list(range(8)))
    run = PagedRun(pair.model)
    count = len(prompt)
    for _ in range(20):
        (logits,) = run.step((sequence, count))
        sequence.token_ids.append(int(logits[-1].argmax()))
        count = 1
    with torch.no_grad():
        expected = pair.reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, 6),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
        )
    assert sequence.token_ids == expected[0].tolist()


def test_dynamic_rope_stretches_with_the_sequence(tmp_path):
    """Dynamic NTK rotates by the length seen so far, so a whole prompt and the same one in chunks differ by definition;
    prefill and each following decode step are compared, as transformers' cache makes them."""
    pair = make_pair(tmp_path, *DYNAMIC)
    sequence = Sequence_(tokens(29), list(range(8)))
    run = PagedRun(pair.model)
    (logits,) = run.step((sequence, 23))
    with torch.no_grad():
        step = pair.reference(torch.tensor([sequence.token_ids[:23]]), use_cache=True)
        assert_close(logits, step.logits[0])
        for index in range(23, 29):
            (logits,) = run.step((sequence, 1))
            next_id = torch.tensor([[sequence.token_ids[index]]])
            step = pair.reference(next_id, past_key_values=step.past_key_values)
            assert_close(logits, step.logits[0])


def test_parameter_count_is_that_of_transformers(pair):
    expected = pair.reference.num_parameters() + sum(
        buffer.numel() for name, buffer in pair.reference.named_buffers() if name.endswith("e_score_correction_bias")
    )
    assert pair.model.config.num_parameters == expected
    assert sum(parameter.numel() for parameter in pair.model.parameters()) == expected


def test_bf16_is_as_exact_as_that_of_transformers(pair, tmp_path):
    """The error of a bf16 forward against fp32 is at most twice transformers' own."""
    ids = tokens(23, seed=3)
    exact = pair.reference_logits(ids)
    ours = build_model(pair.model.config, dtype=torch.bfloat16)
    ours.load_state_dict(pair.model.state_dict())
    theirs = type(pair.reference)(pair.reference.config).to(torch.bfloat16).eval()
    theirs.load_state_dict(pair.reference.state_dict())
    with torch.no_grad():
        error = (ours.compute_logits(ours(torch.tensor([ids])))[0] - exact).norm()
        reference_error = (theirs(torch.tensor([ids])).logits[0].float() - exact).norm()
    assert error <= 2 * reference_error
