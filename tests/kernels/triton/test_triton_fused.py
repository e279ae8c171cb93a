"""Fused inference kernels, interpreted, against their plain references."""

import pytest
import torch

from octavo.kernels.reference import gated_activation as reference_activation
from octavo.kernels.reference import linear_small_batch as reference_linear
from octavo.kernels.reference import mla_projection as reference_projection
from octavo.kernels.reference import moe as reference_moe
from octavo.kernels.reference import norm as reference_norm
from octavo.kernels.reference import rotary_cache as reference_rotary
from octavo.kernels.spec import HeadNorm, InputNorm, Rotary, Routing
from octavo.kernels.triton import gated_activation, linear_small_batch, mla_projection, moe, norm, rotary_cache

CLOSE = {"atol": 2e-6, "rtol": 2e-6}


def angles(tokens, rotary_dim, interleaved):
    turns = torch.rand(tokens, rotary_dim // 2) * 6
    return Rotary(turns.cos(), turns.sin(), interleaved)


@pytest.mark.parametrize("width", [1, 48, 128, 1000])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm_takes_rows_of_any_stride(width, unit_offset):
    x, weight = torch.randn(3, 5, width + 7)[..., :width] * 3, torch.randn(width)
    expected = reference_norm.rms_norm(x, weight, 1e-5, unit_offset)
    torch.testing.assert_close(norm.rms_norm(x, weight, 1e-5, unit_offset), expected, **CLOSE)


# not bf16, which the interpreter truncates where hardware rounds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_add_rms_norm_is_of_the_rounded_sum(dtype):
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((6, 96), (6, 96), (96,)))
    out, total = norm.add_rms_norm(x, residual, weight, 1e-6, False)
    expected, expected_total = reference_norm.add_rms_norm(x, residual, weight, 1e-6, False)
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("activation", list(reference_activation.ACTIVATIONS))
@pytest.mark.parametrize("width", [5, 1025])
def test_gated_activation(activation, width):
    gate_up = torch.randn(4000 // width, 2 * width) * 4
    exact = reference_activation.gated_activation(gate_up.double(), activation)
    plain = reference_activation.gated_activation(gate_up, activation)
    ours = gated_activation.gated_activation(gate_up, activation)
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()


def caches(tokens, heads, width, block_size=5):
    blocks = -(-tokens // block_size) + 2
    return [torch.full((blocks, block_size, heads, width), torch.nan) for _ in range(2)]


def slots(tokens, block_size=5):
    """Random different slots; one token has none."""
    result = torch.randperm((-(-tokens // block_size) + 2) * block_size)[:tokens]
    result[tokens // 2] = -1
    return result


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "rotary_dim"), [(24, 24), (40, 16), (16, 0)])
@pytest.mark.parametrize("norm_kind", [None, "plain", "unit_offset"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (8, 1)])
def test_rotate_and_store(interleaved, width, rotary_dim, norm_kind, heads, kv_heads):
    tokens = 7
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * width + 3)[:, 1:-2]
    rotary = angles(tokens, rotary_dim, interleaved) if rotary_dim else None
    head_norm = None
    if norm_kind:
        head_norm = HeadNorm(torch.randn(width), torch.randn(width), 1e-5, norm_kind == "unit_offset")
    where = slots(tokens)
    got, expected = caches(tokens, kv_heads, width), caches(tokens, kv_heads, width)
    q = rotary_cache.rotate_and_store(qkv, heads, rotary, head_norm, *got, where)
    want = reference_rotary.rotate_and_store(qkv, heads, rotary, head_norm, *expected, where)
    torch.testing.assert_close(q, want, **CLOSE)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tokens", [1, 6, 20])
@pytest.mark.parametrize(("rank", "nope", "rope", "heads"), [(32, 16, 8, 3), (72, 12, 12, 5)])
def test_absorb_and_store(interleaved, tokens, rank, nope, rope, heads):
    latent, q = torch.randn(tokens, rank + rope), torch.randn(tokens, heads, nope + rope)
    up_k = torch.randn(heads, nope + 3, rank)[:, 3:] / nope**0.5
    rotary, weight, where = angles(tokens, rope, interleaved), torch.randn(rank), slots(tokens)
    results = []
    for module in (mla_projection, reference_projection):
        cache = torch.full((6, 5, rank + rope), torch.nan)
        results.append((module.absorb_and_store(latent, q, up_k, weight, 1e-6, rotary, cache, where), cache))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("tokens", [1, 9, 17])
def test_project_values(tokens):
    x, up_v = torch.randn(tokens, 3, 40), torch.randn(3, 30, 40)[:, 7:]
    ours, theirs = (module.project_values(x, up_v) for module in (mla_projection, reference_projection))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_empty_batches():
    assert norm.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6, False).shape == (0, 8)
    assert gated_activation.gated_activation(torch.empty(0, 8), "silu").shape == (0, 4)
    k, v = caches(0, 1, 8)
    nothing = torch.empty(0, dtype=torch.int64)
    assert rotary_cache.rotate_and_store(torch.empty(0, 32), 2, None, None, k, v, nothing).shape == (0, 2, 8)


def linear_options(columns, rows, width):
    return {
        "plain": {},
        "bias": {"bias": torch.randn(columns)},
        "norm": {"norm": InputNorm(torch.randn(width), 1e-5, False)},
        "all": {
            "bias": torch.randn(columns),
            "norm": InputNorm(torch.randn(width), 1e-5, True),
            "activation": "silu",
            "residual": torch.randn(rows, columns // 2),
        },
        "residual": {"residual": torch.randn(rows, 2 * columns)[:, :columns]},
    }


@pytest.mark.parametrize("option", ["plain", "bias", "norm", "all", "residual"])
@pytest.mark.parametrize(("columns", "width"), [(6, 40), (34, 1030)])
def test_linear_of_one_row(option, columns, width):
    x, weight = torch.randn(1, width), torch.randn(columns, width) / width**0.5
    options = {"bias": None, "norm": None, "activation": None, "residual": None} | linear_options(columns, 1, width)[
        option
    ]
    assert linear_small_batch.refuses_linear_small_batch(x, weight, *options.values(), torch.float32) is None
    got = linear_small_batch.linear_small_batch(x, weight, *options.values(), torch.float32)
    expected = reference_linear.linear_small_batch(x, weight, *options.values(), torch.float32)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", ["plain", "bias", "norm", "all", "residual"])
@pytest.mark.parametrize("batch", [2, 7, 16])
def test_linear_of_a_few_rows(option, batch):
    """fp32, which the interpreter multiplies as such; on a GPU this path takes 16-bit tensors."""
    columns, width = 34, 300
    x, weight = torch.randn(batch, width + 5)[:, :width], torch.randn(columns, width) / width**0.5
    options = {"bias": None, "norm": None, "activation": None, "residual": None}
    options |= linear_options(columns, batch, width)[option]
    got = linear_small_batch.linear_small_batch(x, weight, *options.values(), torch.float32)
    expected = reference_linear.linear_small_batch(x, weight, *options.values(), torch.float32)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


ROUTINGS = {
    "softmax": Routing(3, "softmax", 1, 1, False, 1.0),
    "groups": Routing(4, "softmax", 4, 2, True, 2.0),
    "sigmoid": Routing(5, "sigmoid", 1, 1, True, 2.5),
    "sigmoid groups": Routing(4, "sigmoid", 3, 2, True, 2.5),
    "one": Routing(1, "softmax", 6, 1, False, 1.0),
}


@pytest.mark.parametrize("name", list(ROUTINGS))
@pytest.mark.parametrize("biased", [False, True])
def test_route(name, biased):
    logits, bias = torch.randn(11, 24) * 3, torch.randn(24) if biased else None
    if biased and name == "one":
        bias = -torch.rand(24)  # no score may fall to where a closed group stands
    weights, experts = moe.route(logits, bias, ROUTINGS[name])
    expected_weights, expected_experts = reference_moe.route(logits, bias, ROUTINGS[name])
    assert torch.equal(experts, expected_experts)
    torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=1e-5)


def test_equal_scores_go_to_the_lower_expert():
    _, experts = moe.route(torch.zeros(2, 10), None, Routing(3, "softmax", 1, 1, False, 1.0))
    assert experts.tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_picks_experts_that_exist():
    """Else the products would read memory that is not theirs."""
    _, experts = moe.route(torch.full((2, 10), torch.nan), None, Routing(3, "softmax", 1, 1, False, 1.0))
    assert bool(((experts >= 0) & (experts < 10)).all())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("tokens", "top_k", "num_experts"), [(1, 3, 5), (6, 2, 9), (1, 1, 1)])
def test_mix_of_few_pairs(tokens, top_k, num_experts, shared):
    check_mix(moe._mix_pairs, tokens, top_k, num_experts, shared)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("tokens", "top_k", "num_experts"), [(1, 3, 5), (70, 2, 3), (40, 4, 30)])
def test_mix_by_expert(tokens, top_k, num_experts, shared):
    """Experts without tokens, with one, and with more than a tile."""
    check_mix(moe._mix_grouped, tokens, top_k, num_experts, shared)


@pytest.mark.parametrize("crowded", [False, True], ids=["spread", "all to the same"])
def test_mix_by_expert_where_only_the_device_knows_which_tiles_suit(crowded):
    """Both are launched, and each product is computed once. The last group of tiles is smaller than the others."""
    tokens, num_experts = 75, 18
    assert len(moe.grouped_tiles(tokens, 2 * tokens / num_experts)) == 2
    scores = torch.rand(tokens, num_experts)
    if crowded:
        scores[:, [3, 11]] += 1
    check_mix(moe._mix_grouped, tokens, 2, num_experts, True, dim=150, hidden=140, experts=scores.topk(2).indices)


@pytest.mark.parametrize("shared_hidden", [24, 48, 60, 7])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_a_shared_mlp_joins_few_pairs(shared_hidden, tokens):
    dim, hidden, top_k = 40, 24, 2
    x, extra = torch.randn(tokens, dim), torch.randn(tokens, dim)
    gate_up, down = torch.randn(5, 2 * hidden, dim) / 6, torch.randn(5, dim, hidden) / 5
    shared = torch.randn(2 * shared_hidden, dim) / 6, torch.randn(dim, shared_hidden) / 5
    weights, experts = torch.rand(tokens, top_k), torch.rand(tokens, 5).topk(top_k).indices
    got = moe.mix_experts(x, weights, experts, gate_up, down, "silu", extra, *shared)
    expected = reference_moe.mix_experts(x, weights, experts, gate_up, down, "silu", extra, *shared)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def check_mix(mix, tokens, top_k, num_experts, shared, dim=40, hidden=24, experts=None):
    x, extra = torch.randn(tokens, dim + 8)[:, :dim], torch.randn(tokens, dim) if shared else None
    gate_up, down = torch.randn(num_experts, 2 * hidden, dim) / 6, torch.randn(num_experts, dim, hidden) / 5
    weights = torch.rand(tokens, top_k)
    if experts is None:
        experts = torch.rand(tokens, num_experts).pow(3).topk(top_k).indices
    got = mix(x, weights, experts, gate_up, down, "silu", extra)
    expected = reference_moe.mix_experts(x, weights, experts, gate_up, down, "silu", extra)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
