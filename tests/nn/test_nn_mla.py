"""MultiHeadLatentAttention: naive equals absorbed, DeepSeek's checkpoints load, the cache has the size it promises."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

import octavo
from octavo.nn import MultiHeadLatentAttention, RotaryEmbedding, make_caches

SIZES = {"nope_head_dim": 12, "rope_head_dim": 8, "v_head_dim": 10}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
    "original_max_position_embeddings": 32,
}


def latent_attention(
    q_rank: int | None = 16, dtype: torch.dtype = torch.float64, **more: Any
) -> MultiHeadLatentAttention:
    torch.manual_seed(0)
    module = MultiHeadLatentAttention(48, 4, q_rank, 24, **SIZES, dtype=dtype, **more)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("q_rank", [16, None])
@settings(max_examples=8, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 6), min_size=1, max_size=4), block_size=st.integers(1, 5), starts_empty=st.booleans()
)
def test_absorbed_equals_naive(
    q_rank: int | None, dtype: torch.dtype, tolerance: float, chunks: list[int], block_size: int, starts_empty: bool
) -> None:
    """Whether or not the first chunk is told that the cache is empty, which makes it naive."""
    module = latent_attention(q_rank, dtype)
    x = torch.randn(2, sum(chunks), 48, dtype=dtype)
    rows, (cache,) = make_caches(module, 2, sum(chunks), block_size=block_size)
    cache.tensors[0].fill_(float("nan"))
    outputs = []
    with torch.no_grad():
        for part in x.split(chunks, dim=1):
            step = rows.append(part.shape[1])
            metadata = replace(step.metadata, starts_empty=starts_empty and step.metadata.starts_empty)
            outputs.append(module(part.flatten(0, 1), step.positions, cache, metadata).view_as(part))
        naive = module(x)
    scale = naive.abs().max()
    assert (torch.cat(outputs, dim=1) - naive).abs().max() <= tolerance * scale


def test_a_prompt_is_naive_and_what_follows_absorbed() -> None:
    module = latent_attention(None)
    rows, (cache,) = make_caches(module, 2, 16)
    reached = []
    for num_new in (5, 3, 1):
        step = rows.append(num_new)
        x = torch.randn(2 * num_new, 48, dtype=torch.float64)
        reached.append(octavo.explain(module, x, step.positions, cache, step.metadata).op)
    assert reached == ["flash_fwd", "mla_decode", "mla_decode"]


def test_naive_form_is_its_equation() -> None:
    module = latent_attention(None)
    x = torch.randn(1, 5, 48, dtype=torch.float64)
    rotation = module.rope(torch.arange(5))
    latent, k_rope = module.kv_proj(x[0]).split([24, 8], dim=-1)
    up = module.kv_proj_up.weight.view(4, 22, 24)
    k_rope = module.rope.rotate(k_rope.unsqueeze(1), rotation)[:, 0]
    q = module.q_proj(x[0]).view(5, 4, 20)
    q_rope = module.rope.rotate(q[..., 12:], rotation)
    heads = []
    for h in range(4):
        k, v = module.kv_norm(latent) @ up[h, :12].T, module.kv_norm(latent) @ up[h, 12:].T
        scores = (q[:, h, :12] @ k.T + q_rope[:, h] @ k_rope.T) / 20**0.5
        scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), float("-inf"))
        heads.append(scores.softmax(-1) @ v)
    torch.testing.assert_close(module(x)[0], module.o_proj(torch.cat(heads, dim=-1)))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("q_rank", [16, None])
@pytest.mark.parametrize("rope_parameters", [{"rope_type": "default", "rope_theta": 1e4}, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("bias", [False, True])
def test_deepseek_checkpoints_load(
    version: int, q_rank: int | None, rope_parameters: dict[str, Any], bias: bool
) -> None:
    torch.manual_seed(0)
    config_class, attention_class, rope_class = {
        2: (DeepseekV2Config, DeepseekV2Attention, DeepseekV2RotaryEmbedding),
        3: (DeepseekV3Config, DeepseekV3Attention, DeepseekV3RotaryEmbedding),
    }[version]
    config = config_class(
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=q_rank,
        kv_lora_rank=24,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        max_position_embeddings=128,
        attention_bias=bias,
        rope_parameters=rope_parameters,
        attn_implementation="eager",
    )
    theirs = attention_class(config, layer_idx=0)
    for parameter in theirs.parameters():  # their default, std 0.02, would leave the softmax flat
        nn.init.normal_(parameter, std=0.2)
    rope = RotaryEmbedding.from_hf_config(config.to_dict(), head_dim=8, interleaved=True)
    ours = MultiHeadLatentAttention(48, 4, q_rank, 24, **SIZES, rope=rope, bias=bias)
    ours.load_deepseek(theirs.state_dict())
    assert ours.softmax_scale == pytest.approx(theirs.scaling)
    x = torch.randn(2, 40, 48)
    mask = torch.full((40, 40), float("-inf")).triu(1)
    position_embeddings = rope_class(config)(x, torch.arange(40)[None])
    want = theirs(x, attention_mask=mask, position_embeddings=position_embeddings)[0]
    torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("q_rank", [2, None])
def test_gradcheck(q_rank: int | None) -> None:
    torch.manual_seed(0)
    module = MultiHeadLatentAttention(
        4, 2, q_rank, 3, nope_head_dim=2, rope_head_dim=2, v_head_dim=3, dtype=torch.float64
    )
    names, weights = zip(*module.named_parameters(), strict=True)

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), x)

    assert torch.autograd.gradcheck(call, (torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True), *weights))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_cache_keeps_rank_plus_rope_numbers_per_token(dtype: torch.dtype, size: int) -> None:
    cache = latent_attention(dtype=dtype).new_cache(num_blocks=5, block_size=16)
    assert cache.bytes_per_token == (24 + 8) * size
    stored = sum(t.untyped_storage().nbytes() for t in cache.tensors)
    assert stored == 5 * 16 * (24 + 8) * size


def test_deepseek_v3_caches_576_numbers_per_token() -> None:
    with torch.device("meta"):
        module = MultiHeadLatentAttention(7168, 128, 1536, 512, dtype=torch.bfloat16)
        assert module.new_cache(1, 64).bytes_per_token == 1152


def test_state_dict_deepcopy_and_meta_device() -> None:
    module, x = latent_attention(), torch.randn(1, 4, 48, dtype=torch.float64)
    want = module(x)
    assert torch.equal(copy.deepcopy(module)(x), want)
    empty = latent_attention(device="meta")
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert torch.equal(empty(x), want)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="rope must turn rope_head_dim = 8 channels, got 16"):
        latent_attention(rope=RotaryEmbedding(16))
    module = latent_attention()
    state = {"q_a_proj.weight": torch.zeros(16, 48)}
    with pytest.raises(ValueError, match=r"kv_norm.weight.* missing"):
        module.load_deepseek(state)
    with pytest.raises(ValueError, match=r"'self_attn.q_a_proj.weight' is no weight of a DeepSeek attention"):
        module.load_deepseek({"self_attn.q_a_proj.weight": torch.zeros(16, 48)})
    with pytest.raises(ValueError, match="kv_cache and metadata go together"):
        module(torch.zeros(1, 48), kv_cache=module.new_cache(1, 16))
