"""MultiHeadAttention: gradients, agreement of cached and uncached, parity with `transformers`."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from octavo.nn import MultiHeadAttention, PagedRows, RMSNorm, RotaryEmbedding, make_caches

VARIANTS: dict[str, dict[str, Any]] = {
    "MHA": {},
    "GQA": {"num_kv_heads": 2},
    "MQA": {"num_kv_heads": 1},
    "window": {"window_size": (2, 0)},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "qk_norm": {"qk_norm": RMSNorm},
    "biases": {"bias": True, "out_bias": True},
    "scale": {"softmax_scale": 0.7},
    "wide heads": {"head_dim": 16, "num_kv_heads": 2},
    "rope": {"rope": RotaryEmbedding(8)},
    "all": {
        "num_kv_heads": 2,
        "rope": RotaryEmbedding(4, interleaved=True),
        "qk_norm": partial(RMSNorm, unit_offset=True),
        "bias": True,
        "window_size": (3, 0),
        "softcap": 8.0,
        "sinks": True,
    },
}


def attention(name: str, **more: Any) -> MultiHeadAttention:
    torch.manual_seed(0)
    module = MultiHeadAttention(32, 4, causal=True, **VARIANTS[name], **more)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def check_gradients(module: nn.Module, *inputs: Tensor, **kwargs: Any) -> None:
    names, weights = zip(*module.named_parameters(), strict=True)

    def call(*arguments: Tensor) -> Tensor:
        parameters = dict(zip(names, arguments[len(inputs) :], strict=True))
        return torch.func.functional_call(module, parameters, arguments[: len(inputs)], kwargs)

    assert torch.autograd.gradcheck(call, (*inputs, *weights))


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_heads": 1, "rope": RotaryEmbedding(2), "qk_norm": RMSNorm},
        {"window_size": (1, 0), "softcap": 4.0, "sinks": True, "bias": True},
    ],
)
def test_gradcheck(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = MultiHeadAttention(4, 2, causal=True, dtype=torch.float64, **options)
    check_gradients(module, torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True))


def equation(module: MultiHeadAttention, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Plain bidirectional attention of the module's weights, head by head."""
    if context is None:
        q, k, v = module.qkv_proj(x).split([32, 16, 16], dim=-1)
    else:
        q = module.q_proj(x)
        k, v = module.kv_proj(context).chunk(2, dim=-1)
    heads = []
    for h in range(4):
        own, shared = slice(8 * h, 8 * h + 8), slice(8 * (h // 2), 8 * (h // 2) + 8)
        scores = q[..., own] @ k[..., shared].transpose(1, 2) / 8**0.5
        heads.append(scores.softmax(-1) @ v[..., shared])
    out: Tensor = module.o_proj(torch.cat(heads, dim=-1))
    return out


def test_self_attention_is_its_equation() -> None:
    module = MultiHeadAttention(32, 4, 2)
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(module(x), equation(module, x), rtol=1e-5, atol=1e-6)


def test_cross_attention_is_its_equation_and_has_gradients() -> None:
    module = MultiHeadAttention(32, 4, 2, context_dim=20)
    x, context = torch.randn(2, 7, 32), torch.randn(2, 11, 20)
    torch.testing.assert_close(module(x, context=context), equation(module, x, context), rtol=1e-5, atol=1e-6)
    small = MultiHeadAttention(4, 2, context_dim=3, dtype=torch.float64)
    context = torch.randn(1, 5, 3, dtype=torch.float64)
    check_gradients(small, torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True), context=context)


def test_padding_of_the_context_is_not_read() -> None:
    module = MultiHeadAttention(32, 4, 2, context_dim=20)
    x, context = torch.randn(2, 7, 32), torch.randn(2, 11, 20)
    lens = torch.tensor([5, 11], dtype=torch.int32)
    out = module(x, context=context, context_lens=lens)
    torch.testing.assert_close(out[:1], equation(module, x[:1], context[:1, :5]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out[1:], equation(module, x[1:], context[1:]), rtol=1e-5, atol=1e-6)


def causal_mask(length: int) -> Tensor:
    return torch.full((length, length), float("-inf")).triu(1)


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Hugging Face attention's weights with q, k and v merged."""
    renamed = {name: tensor for name, tensor in state.items() if name[:6] not in ("q_proj", "k_proj", "v_proj")}
    for kind in {name.rpartition(".")[2] for name in state if name.startswith("q_proj")}:
        renamed[f"qkv_proj.{kind}"] = torch.cat([state[f"{x}_proj.{kind}"] for x in "qkv"])
    return renamed


@pytest.mark.parametrize(("kind", "bias"), [("llama", False), ("llama", True), ("qwen3", False)])
def test_parity_with_transformers(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    classes = {"llama": (LlamaConfig, LlamaAttention), "qwen3": (Qwen3Config, Qwen3Attention)}
    config_class, attention_class = classes[kind]
    config = config_class(**sizes, attention_bias=bias, attn_implementation="eager")
    theirs = attention_class(config, layer_idx=0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = MultiHeadAttention(
        48,
        4,
        2,
        16,
        causal=True,
        rope=RotaryEmbedding.from_hf_config(config.to_dict()),
        qk_norm=partial(RMSNorm, eps=config.rms_norm_eps) if kind == "qwen3" else None,
        bias=bias,
        out_bias=bias,
    )
    ours.load_state_dict(merged(theirs.state_dict()))
    x = torch.randn(2, 9, 48)
    positions = LlamaRotaryEmbedding(config)(x, torch.arange(9)[None])
    want = theirs(x, position_embeddings=positions, attention_mask=causal_mask(9))[0]
    torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=5, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), min_size=1, max_size=4), st.integers(1, 5))
def test_cached_equals_uncached(name: str, chunks: list[tuple[int, int]], block_size: int) -> None:
    """Two sequences fed in chunks of any size (also none) through a paged cache, NaN where nothing was written."""
    module = attention(name)
    lengths = [sum(c[row] for c in chunks) for row in (0, 1)]
    x = [torch.randn(1, n, 32) for n in lengths]
    rows, (cache,) = make_caches(module, 2, max(lengths), block_size=block_size)
    for tensor in cache.tensors:
        tensor.fill_(float("nan"))
    got: tuple[list[Tensor], list[Tensor]] = ([], [])
    with torch.no_grad():
        want = [module(rows_x) if rows_x.shape[1] else rows_x for rows_x in x]
        for chunk in chunks:
            starts = list(rows.lengths)
            packed = torch.cat([x[row][0, starts[row] : starts[row] + chunk[row]] for row in (0, 1)])
            step = rows.append(chunk)
            for row, part in enumerate(module(packed, step.positions, cache, step.metadata).split(list(chunk))):
                got[row].append(part)
    for row in (0, 1):
        torch.testing.assert_close(torch.cat(got[row]), want[row][0], rtol=1e-4, atol=1e-4)


def test_rotation_may_be_shared_by_layers() -> None:
    module = attention("rope")
    x, positions = torch.randn(2, 5, 32), torch.arange(3, 8)
    assert module.rope is not None
    assert torch.equal(module(x, positions), module(x, rotation=module.rope(positions)))
    torch.testing.assert_close(module(x, positions), module(x), rtol=1e-4, atol=1e-4)  # only distances matter


def test_cache_takes_what_it_says() -> None:
    cache = MultiHeadAttention(32, 4, 2, dtype=torch.bfloat16).new_cache(3, 16)
    assert cache.k.shape == cache.v.shape == (3, 16, 2, 8)
    assert cache.bytes_per_token == 2 * 2 * 8 * 2
    assert sum(t.nbytes for t in cache.tensors) == 3 * 16 * cache.bytes_per_token


@pytest.mark.parametrize("name", ["all", "biases"])
def test_state_dict_deepcopy_and_meta_device(name: str) -> None:
    module, x = attention(name), torch.randn(1, 4, 32)
    want = module(x)
    assert torch.equal(copy.deepcopy(module)(x), want)
    empty = attention(name, device="meta")
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert torch.equal(empty(x), want)
    with torch.device("meta"):
        assigned = MultiHeadAttention(32, 4, causal=True, **VARIANTS[name])
    assigned.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(assigned(x), want)


def test_dropout_acts_in_training_only() -> None:
    module, x = attention("MHA", dropout_p=0.5), torch.randn(1, 16, 32)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_any_optimizer_trains_it() -> None:
    module, x = attention("all"), torch.randn(2, 6, 32)
    target = torch.randn(2, 6, 32)
    for make in (torch.optim.SGD, torch.optim.AdamW, partial(torch.optim.RMSprop, lr=1e-3)):
        trained = copy.deepcopy(module)
        optimizer = make(trained.parameters(), lr=1e-3) if make is not torch.optim.RMSprop else make()
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (trained(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MultiHeadAttention(32, 4, 3), "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        (lambda: MultiHeadAttention(33, 4), "dim must be a multiple of num_heads"),
        (lambda: MultiHeadAttention(32, 4, causal=True, context_dim=8), "context_dim: cross-attention has neither"),
    ],
)
def test_bad_sizes_are_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_bad_calls_are_named() -> None:
    x = torch.randn(1, 4, 32)
    step = PagedRows(1, 8).append(4)
    module = attention("rope")
    cache = module.new_cache(1, 16)
    with pytest.raises(ValueError, match="kv_cache and metadata go together"):
        module(x, kv_cache=cache)
    with pytest.raises(ValueError, match=r"positions \(4,\) are missing"):
        module(x[0], kv_cache=cache, metadata=step.metadata)
    with pytest.raises(ValueError, match="needs causal attention"):
        MultiHeadAttention(32, 4)(x[0], step.positions, cache, step.metadata)
    with pytest.raises(ValueError, match=r"context \(B, Sk, 8\) is missing"):
        MultiHeadAttention(32, 4, context_dim=8)(x)
    with pytest.raises(ValueError, match="context given to self-attention"):
        module(x, context=x)
