"""The fused inference kernels on a GPU: errors beside plain torch's, CUDA graphs, early launches, choice of path."""

import pytest
import torch

from octavo import ops
from octavo.nn import Experts, GatedMLP, MixtureOfExperts, Router
from octavo.ops.linear_small_batch import InputNorm
from octavo.ops.moe import Routing, router_logits
from octavo.ops.rotary_cache import HeadNorm, Rotary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: none here"),
]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def double(x):
    if isinstance(x, torch.Tensor):
        return x.double() if x.is_floating_point() else x
    return type(x)(*map(double, x)) if isinstance(x, tuple) else x


def check(op, *arguments, **options):
    """The fused op's error against fp64 is at most twice plain torch's (and never NaN); returns the fused result."""
    fused = op(*arguments, **options)
    exact_options = {name: double(value) for name, value in options.items()}
    with ops.use_backend("reference"):
        plain = op(*arguments, **options)
        exact = op(*map(double, arguments), **exact_options)
    for ours, theirs, truth in zip(*([x] if torch.is_tensor(x) else x for x in (fused, plain, exact)), strict=True):
        error, allowed = (ours.double() - truth).abs().max(), 2 * (theirs.double() - truth).abs().max()
        assert error <= allowed + 1e-6 * truth.abs().max(), (error, allowed)
    return fused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(1, 1024), (37, 4096), (3, 100), (2, 16384)])
def test_norms(rows, width, dtype):
    x, residual, weight = (randn(*shape, dtype=dtype) for shape in ((rows, width), (rows, width), (width,)))
    for unit_offset in (False, True):
        check(ops.rms_norm, x, weight, unit_offset=unit_offset)
        check(ops.add_rms_norm, x, residual, weight, unit_offset=unit_offset)


def test_rows_that_are_not_aligned_get_a_kernel_of_their_own():
    """A compiled kernel is kept by what it was compiled for: 16-byte loads serve only pointers and strides that allow
    them, whichever came first."""
    weight = randn(512)
    whole = randn(9, 1040)
    for first_column, columns in ((0, 1024), (1, 1024), (8, 1030), (3, 1022), (0, 1024)):
        x = whole[:, first_column : first_column + columns]
        check(ops.gated_activation, x, "silu")
        check(ops.rms_norm, x[:, :512], weight)
        check(ops.add_rms_norm, x[:, :512], whole[:, :512], weight)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_gated_activation(activation):
    check(ops.gated_activation, 3 * randn(33, 2 * 3000), activation)


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize(("columns", "width"), [(4096, 1024), (1024, 3072), (576, 2048), (6144, 1000), (64, 16384)])
def test_linear_of_a_few_rows(rows, columns, width):
    x, weight = randn(rows, width), randn(columns, width) / width**0.5
    norm = InputNorm(randn(width), 1e-6, False)
    check(ops.linear_small_batch, x, weight)
    check(ops.linear_small_batch, x, weight, randn(columns), norm=norm, residual=randn(rows, columns))
    check(ops.linear_small_batch, x, weight, norm=norm, activation="silu", residual=randn(rows, columns // 2))
    logits = router_logits(x, weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ weight.float().t(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "rotary_dim"), [(128, 128), (256, 64), (80, 80)])
def test_rotate_and_store(interleaved, width, rotary_dim):
    tokens, heads, kv_heads = 50, 12, 4
    turns = torch.rand(tokens, rotary_dim // 2, device=DEVICE) * 9
    rotary = Rotary(turns.cos(), turns.sin(), interleaved)
    slots = torch.randperm(160, device=DEVICE)[:tokens]
    slots[7] = -1
    qkv, norm = randn(tokens, (heads + 2 * kv_heads) * width), HeadNorm(randn(width), randn(width), 1e-6, True)

    def op(qkv, norm, rotary):
        k, v = (torch.full((10, 16, kv_heads, width), 7, dtype=qkv.dtype, device=DEVICE) for _ in "kv")
        return ops.rotate_and_store(qkv, heads, rotary, k, v, slots, norm=norm), k, v

    check(op, qkv, norm, rotary)
    check(op, qkv, None, rotary)
    check(op, qkv, None, None)


@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_projections_of_latent_attention(tokens):
    heads, rank, nope, rope, width = 16, 512, 128, 64, 128
    turns = torch.rand(tokens, rope // 2, device=DEVICE) * 9
    rotary, slots = Rotary(turns.cos(), turns.sin(), True), torch.randperm(32, device=DEVICE)[:tokens]

    def op(latent, q, up_k, weight, rotary):
        cache = torch.full((4, 8, rank + rope), 7, dtype=q.dtype, device=DEVICE)
        return ops.absorb_and_store(latent, q, up_k, weight, rotary, cache, slots), cache

    up = randn(heads, nope + width, rank) / nope**0.5
    check(op, randn(tokens, rank + rope), randn(tokens, heads, nope + rope), up[:, :nope], randn(rank), rotary)
    check(ops.project_values, randn(tokens, heads, rank), up[:, nope:])


ROUTINGS = [
    (64, Routing(6, "softmax", 1, 1, False, 1.0), False),
    (160, Routing(6, "softmax", 8, 3, False, 16.0), False),
    (256, Routing(8, "sigmoid", 8, 4, True, 2.5), True),
    (128, Routing(8, "softmax", 1, 1, True, 1.0), False),
]


@pytest.mark.parametrize(("num_experts", "routing", "biased"), ROUTINGS, ids=["v2-lite", "v2", "v3", "qwen3"])
def test_route(num_experts, routing, biased):
    logits = 2 * randn(501, num_experts, dtype=torch.float32)
    bias = torch.rand(num_experts, device=DEVICE) / 10 if biased else None
    weights, experts = ops.route(logits, routing, bias=bias)
    with ops.use_backend("reference"):
        expected_weights, expected_experts = ops.route(logits, routing, bias=bias)
    same = (experts == expected_experts).all(1)
    assert same.float().mean() > 0.99  # sigmoids a rounding apart may change places
    torch.testing.assert_close(weights[same], expected_weights[same], atol=1e-6, rtol=1e-5)


def mixture(dim=512, hidden=352, num_experts=16, top_k=4):
    factory = {"device": DEVICE, "dtype": torch.bfloat16}
    return MixtureOfExperts(
        Router(dim, num_experts, top_k, **factory),
        Experts(num_experts, dim, hidden, **factory),
        GatedMLP(dim, hidden, **factory),
    )


@pytest.mark.parametrize("crowded", [False, True], ids=["spread", "all to the same"])
@pytest.mark.parametrize("tokens", [1, 3, 12, 13, 40, 100, 300, 1000])
def test_mixture_of_experts(tokens, crowded):
    """From products of vectors to the largest tiles; equal bits on a second run."""
    experts = mixture().experts
    x, shared = randn(tokens, 512), randn(tokens, 512)
    logits = randn(tokens, 16, dtype=torch.float32)
    if crowded:
        logits[:, 5:9] += 20
    weights, chosen = ops.route(logits, Routing(4, "softmax", 1, 1, False, 1.0))
    tensors = experts.gate_up_proj.weight, experts.down_proj.weight

    def op(x, gate_up, down, shared):
        return ops.mix_experts(
            x, weights.to(torch.promote_types(x.dtype, torch.float32)), chosen, gate_up, down, shared=shared
        )

    out = check(op, x, *tensors, shared)
    assert torch.equal(out, op(x, *tensors, shared))


@pytest.mark.parametrize("tokens", [1, 5, 8, 9])
def test_the_shared_mlp_joins_few_pairs(tokens):
    """Up to 8 tokens of 4 experts its weights go through the experts' kernels; the module adds the residual, too."""
    module, x, residual = mixture(), randn(tokens, 512), randn(tokens, 512)
    got = module(x, residual=residual.clone())
    expected = residual.double() + module.shared_experts(x).double() + module.experts(x, *module.router(x)).double()
    torch.testing.assert_close(got.double(), expected, atol=3e-2, rtol=1e-2)


def test_all_tokens_on_one_expert():
    experts = mixture().experts
    x, weights = randn(200, 512), torch.ones(200, 1, device=DEVICE)
    chosen = torch.full((200, 1), 5, device=DEVICE)
    got = experts(x, weights, chosen)
    gate, up = (x @ experts.gate_up_proj.weight[5].t()).chunk(2, -1)
    expected = (torch.nn.functional.silu(gate) * up) @ experts.down_proj.weight[5].t()
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_a_graph_of_early_launches_replays_the_same_bits(tokens):
    """Many layers one behind the other, each starting before the last has ended; inputs change between replays."""
    mixtures, mlps = [mixture() for _ in range(4)], [mixture().shared_experts for _ in range(4)]
    norms = [randn(512) for _ in range(8)]
    for layer in (*mixtures, *mlps):
        for weight in layer.parameters():
            weight.mul_(3)

    def step(x):
        for layer, norm in zip([*mixtures, *mlps], norms, strict=True):
            x = x + layer(ops.rms_norm(x, norm))
        return ops.sample_on_device(x, *parameters)

    rows = torch.zeros(tokens, device=DEVICE)
    seeds = torch.arange(tokens, device=DEVICE)
    parameters = (rows + 0.8, rows.int() + 20, rows + 0.9, rows, seeds, seeds)
    x = randn(tokens, 512)
    step(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(x)
    for _ in range(20):
        x.copy_(randn(tokens, 512))
        expected = step(x)
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("vocab", [1000, 49152, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [20, 60])  # shared by programs, and one program a row
def test_sampling_draws_the_reference_s_tokens(rows, vocab, dtype):
    logits = (3 * randn(rows, vocab, dtype=torch.float32)).to(dtype)
    i = torch.arange(rows, device=DEVICE)
    parameters = (
        torch.rand(rows, device=DEVICE) * (i % 5 > 0),
        torch.where(i % 2 > 0, i * 3, 0).int(),
        torch.where(i % 3 > 0, torch.rand(rows, device=DEVICE), 1.0),
        torch.where(i % 4 > 2, 0.05, 0.0),
        torch.randint(-(2**62), 2**62, (rows,), device=DEVICE),
        i * 11,
    )
    tokens = ops.sample_on_device(logits, *parameters)
    assert torch.equal(tokens, ops.sample_on_device(logits, *parameters))
    with ops.use_backend("reference"):
        expected = ops.sample_on_device(logits, *parameters)
    assert (tokens == expected).float().mean() >= 0.95  # a mass a rounding apart may move the border of a nucleus


def test_flat_logits_sample_beyond_what_is_gathered():
    rows, vocab = 2000, 20000
    logits = (0.01 * randn(1, vocab, dtype=torch.float32)).expand(rows, -1).contiguous()
    ones = torch.ones(rows, device=DEVICE)
    numbers = torch.arange(rows, device=DEVICE)
    tokens = ops.sample_on_device(logits, ones, ones.int() * 0, ones * 0.5, ones * 0, numbers, numbers)
    kept = logits[0].argsort(descending=True)[: vocab // 2 + 200]
    assert torch.isin(tokens, kept).all()
    assert len(tokens.unique()) > 1700


def test_a_gradient_is_never_lost():
    with torch.inference_mode(False):
        x = torch.randn(2, 64, device=DEVICE, requires_grad=True)
        assert not ops.fuses(x)
        ops.rms_norm(x, torch.ones(64, device=DEVICE)).square().sum().backward()
        assert x.grad is not None
    assert ops.fuses(randn(2, 64))
