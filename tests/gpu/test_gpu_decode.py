"""Decode over paged caches on the GPU: keys and values, latents, quantised caches; graphs, poison, repeats."""

import contextlib
from dataclasses import replace

import pytest
import torch

from octavo import ops
from octavo.kernels.reference import cache as reference_cache
from octavo.kernels.reference.mla_decode import mla_decode as reference_mla
from octavo.kernels.reference.paged_attention import paged_attention as reference_paged
from octavo.kernels.spec import AttentionSpec, AttentionTensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: none here"),
]
FP8, INT8, BF16 = torch.float8_e4m3fn, torch.int8, torch.bfloat16
PRIMES = [1, 2, 61, 127, 0, 1009, 4099, 17, 64, 65]
CAUSAL = AttentionSpec(128**-0.5, window_right=0)
LATENT = AttentionSpec(192**-0.5, window_right=0)
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)


def poisoned(lengths, page, *shape, dtype=BF16, seed=0):
    """A cache, NaN wherever no token lies, and a table whose unused entries are absurd."""
    generator = torch.Generator("cuda").manual_seed(seed)
    counts = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(counts) + 3, generator=generator, device="cuda").tolist()
    table = torch.full((len(lengths), max(counts) + 2), 2**31 - 1, dtype=torch.int32)
    cache = torch.full((1 + len(order), page, *shape), torch.nan, device="cuda", dtype=dtype)[1:]
    for b, length in enumerate(lengths):
        for i in range(counts[b]):
            table[b, i] = block = order.pop()
            n = min(page, length - i * page)
            cache[block, :n] = torch.randn(n, *shape, generator=generator, device="cuda").to(dtype)
    return cache, table.cuda()


def batch_of(lengths, table, queries=1, **tensors):
    return AttentionTensors(
        cu_seqlens_q=torch.arange(len(lengths) + 1, dtype=torch.int32, device="cuda") * queries, max_seqlen_q=queries,
        max_seqlen_k=max(lengths), block_table=table,
        seqused_k=torch.tensor(lengths, dtype=torch.int32, device="cuda"), **tensors,
    )  # fmt: skip


def keys_and_values(lengths, page, heads=8, head_dim=128, **settings):
    kv, table = poisoned(lengths, page, 2, heads, head_dim, **settings)
    return kv[:, :, 0], kv[:, :, 1], table


def random(*shape, dtype=BF16):
    return torch.randn(shape, device="cuda").to(dtype)


def kernel(op, *arguments, backend=None):
    """The kernel that octavo chooses, and where it lives."""
    choice = ops.dispatch.choose(op, torch.device("cuda"), arguments, backend)
    return choice.module, choice.kernel(*arguments)


def assert_as_good_as_torch(got, exact, same_dtype):
    """Error at most twice that of the reference computed in the tensors' own dtype."""
    assert torch.isfinite(got).all()
    assert (got - exact).abs().max() <= 2 * (same_dtype - exact).abs().max() + 1e-5


def decoders(*arguments):
    """What each decode kernel that takes the call makes of it, by module."""
    found = {}
    for backend in ("hopper", "triton"):
        with contextlib.suppress(ValueError):
            module, result = kernel("paged_attention", *arguments, backend=backend)
            found[module] = result
    assert "triton.paged_decode" in found
    return found


def check_paged(q, k, v, spec, t, hopper_too=True):
    found = decoders(q, k, v, spec, t, 0)
    assert ("hopper.paged_decode" in found) == (hopper_too and torch.cuda.get_device_capability() == (9, 0))
    k, v = (x if t.k_scale is not None else x.float() for x in (k, v))
    exact, exact_lse = reference_paged(q.float(), k, v, spec, t)
    if t.k_scale is not None:
        k, v = (reference_cache.dequantise(x, s, torch.float32) for x, s in ((k, t.k_scale), (v, t.v_scale)))
    plain = replace(t, k_scale=None, v_scale=None)
    own, _ = reference_paged(q, k.to(q.dtype), v.to(q.dtype), spec, plain)
    for out, lse in found.values():
        assert_as_good_as_torch(out.float(), exact, own.float())
        torch.testing.assert_close(lse, exact_lse, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("page", [8, 16, 24, 32, 48, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_paged(page, dtype):
    k, v, table = keys_and_values(PRIMES, page, dtype=dtype)
    q = random(len(PRIMES), 32, 128, dtype=dtype)
    check_paged(q, k, v, CAUSAL, batch_of(PRIMES, table), hopper_too=page % 16 == 0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 32, 128), (16, 1, 64), (64, 8, 64), (8, 2, 256), (14, 2, 96), (40, 2, 128)]
)
def test_paged_heads(heads, kv_heads, head_dim):
    k, v, table = keys_and_values(PRIMES, 16, kv_heads, head_dim)
    served = head_dim in (64, 128) and heads // kv_heads <= 16
    check_paged(random(len(PRIMES), heads, head_dim), k, v, CAUSAL, batch_of(PRIMES, table), hopper_too=served)


@pytest.mark.parametrize("queries", [1, 4])
def test_queries_of_one_number_a_sequence(queries):
    k, v, table = keys_and_values(PRIMES, 16)
    t = replace(batch_of(PRIMES, table), cu_seqlens_q=None, max_seqlen_q=0)
    check_paged(random(len(PRIMES), queries, 32, 128), k, v, CAUSAL, t)


def test_one_query_sees_all_keys_with_or_without_a_causal_mask():
    k, v, table = keys_and_values(PRIMES, 16)
    check_paged(random(len(PRIMES), 32, 128), k, v, AttentionSpec(0.1), batch_of(PRIMES, table))


def test_lengths_past_the_table_count_as_its_capacity():
    """On a GPU nobody looks at lengths before the launch; the kernels stop where the table does."""
    k, v, table = keys_and_values([64, 96, 32], 16)
    cache, latent_table = poisoned([64, 96, 32], 16, 576)
    for x in (table, latent_table):
        x[:, :6] = x[1, :6]
    q, q_latent = random(3, 32, 128), random(3, 16, 576)
    wrong, right = [97, 2**31 - 1, 10**6], [96] * 3

    def results(lengths):
        t, t_latent = (replace(batch_of(lengths, x[:, :6]), max_seqlen_k=96) for x in (table, latent_table))
        yield from decoders(q, k, v, CAUSAL, t, 0).items()
        for backend in (None, "triton"):
            yield kernel("mla_decode", q_latent, cache, 512, LATENT, t_latent, 0, backend=backend)

    for (module, got), (_, expected) in zip(results(wrong), results(right), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), module


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("scalars", [{}, {"window_left": 100}, {"softcap": 20.0, "window_left": 900}], ids=str)
def test_paged_options(scalars, queries):
    k, v, table = keys_and_values(PRIMES, 16)
    t = batch_of(PRIMES, table, queries, learnable_sink=torch.randn(32, device="cuda"))
    spec = AttentionSpec(0.1, window_right=0, **scalars)
    check_paged(random(len(PRIMES) * queries + 5, 32, 128), k, v, spec, t)


@pytest.mark.parametrize("seed", range(3))
def test_paged_random_lengths(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = (2 ** (12 * torch.rand(70, generator=generator))).int().tolist()
    k, v, table = keys_and_values(lengths, 16, 2, seed=seed)
    check_paged(random(70, 4, 128), k, v, CAUSAL, batch_of(lengths, table))


@pytest.mark.parametrize("dtype", [FP8, INT8])
@pytest.mark.parametrize("page", [16, 64])
def test_paged_quantised(dtype, page):
    k, v, table = keys_and_values(PRIMES, page)
    scales = torch.rand(8, device="cuda") / 50 + 0.01
    k, v = (reference_cache.quantise(x, scales, dtype) for x in (k, v))
    if dtype == FP8:  # poison stays NaN
        assert k.float().isnan().any()
    t = batch_of(PRIMES, table, k_scale=scales, v_scale=scales)
    check_paged(random(len(PRIMES), 32, 128), k, v, CAUSAL, t)


@pytest.mark.parametrize(("dtype", "largest", "bound"), [(FP8, 448.0, 0.04), (INT8, 127.0, 0.02)])
def test_what_quantisation_costs(dtype, largest, bound):
    """Normal keys and values, one scale a head: relative error of the output in the Frobenius norm."""
    lengths = [4096] * 4
    k, v, table = keys_and_values(lengths, 16)
    t = batch_of(lengths, table)
    q = random(4, 32, 128)
    exact = reference_paged(q.float(), k.float(), v.float(), CAUSAL, t)[0]
    scales = [x.nan_to_num().abs().amax((0, 1, 3)).float() / largest for x in (k, v)]
    k, v = (reference_cache.quantise(x.nan_to_num(), s, dtype) for x, s in zip((k, v), scales, strict=True))
    for out, _ in decoders(q, k, v, CAUSAL, replace(t, k_scale=scales[0], v_scale=scales[1]), 0).values():
        assert (out.float() - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_stores_what_the_reference_stores(dtype):
    k, v = random(2, 700, 8, 128, dtype=torch.float32) * 3
    scales = torch.rand(8, device="cuda") / 50 + 0.01
    slots = torch.randperm(1024, device="cuda")[:700]
    ours = [torch.zeros(64, 16, 8, 128, device="cuda").to(dtype) for _ in "kv"]
    theirs = [x.clone() for x in ours]
    ops.store_kv_cache(k, v, *ours, slots, k_scale=scales, v_scale=scales)
    reference_cache.store_kv_cache(k, v, *theirs, slots, scales, scales)
    for a, b in zip(ours, theirs, strict=True):  # the GPU's division may differ in the last bit before rounding
        assert (a.float() != b.float()).float().mean() < 1e-3
        torch.testing.assert_close(a.float(), b.float(), atol=1.0 if dtype == INT8 else 0.002, rtol=0.13)


def reference_of_each(q, cache, t):
    """The reference, a sequence at a time: it repeats the latent for every head."""
    outs, lses = [], []
    start = 0
    for b, (end, length) in enumerate(zip(t.cu_seqlens_q[1:].tolist(), t.seqused_k.tolist(), strict=True)):
        used = t.block_table[b, : -(-length // cache.shape[1])].long()
        table = torch.arange(len(used), dtype=torch.int32, device="cuda")[None]
        one = batch_of([length], table, end - start)
        out, lse = reference_mla(q[start:end], cache[used], 512, LATENT, one)
        outs.append(out)
        lses.append(lse)
        start = end
    rest = q.shape[0] - start  # rows of no one
    out = torch.cat([*outs, q.new_zeros(rest, q.shape[1], 512)])
    return out, torch.cat([*lses, lses[0].new_full((q.shape[1], rest), -torch.inf)], dim=1)


def check_latent(q, cache, t):
    module, (out, lse) = kernel("mla_decode", q, cache, 512, LATENT, t, 0)
    assert module == "hopper.mla_decode"
    exact, exact_lse = reference_of_each(q.float(), cache.float(), t)
    own, _ = reference_of_each(q, cache, t)
    assert_as_good_as_torch(out.float(), exact, own.float())
    torch.testing.assert_close(lse, exact_lse, atol=2e-3, rtol=1e-4)


@hopper
@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("heads", [1, 16, 64, 128])
def test_latent(page, heads):
    cache, table = poisoned(PRIMES, page, 576)
    check_latent(random(len(PRIMES), heads, 576), cache, batch_of(PRIMES, table))


@hopper
@pytest.mark.parametrize(("heads", "queries"), [(24, 3), (128, 2), (7, 5)])
def test_latent_with_several_queries_and_rows_of_no_one(heads, queries):
    cache, table = poisoned(PRIMES, 64, 576, dtype=torch.float16)
    q = random(len(PRIMES) * queries + 3, heads, 576, dtype=torch.float16)
    check_latent(q, cache, batch_of(PRIMES, table, queries))


@hopper
@pytest.mark.parametrize("seed", range(3))
def test_latent_random_lengths(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = (2 ** (12 * torch.rand(150, generator=generator))).int().tolist()
    cache, table = poisoned(lengths, 64, 576, seed=seed)
    check_latent(random(150, 16, 576), cache, batch_of(lengths, table))


@hopper
def test_latent_of_equal_lengths():
    """Parts are cut at the sequences' ends where that costs little."""
    lengths = [640] * 131
    cache, table = poisoned(lengths, 64, 576)
    check_latent(random(131, 64, 576), cache, batch_of(lengths, table))


def test_a_graph_replays_other_lengths_and_tables():
    first, second = [100, 3000, 5, 64], [2048, 1, 777, 1300]
    k, v, table = keys_and_values(second, 16)
    cache, latent_table = poisoned(second, 64, 576)
    q, q_latent = random(4, 32, 128), random(4, 16, 576)
    t, t_latent = batch_of(first, table.clone()), batch_of(first, latent_table.clone())
    for x in (t, t_latent):
        x.block_table.zero_()
    paged = ("paged_attention", q, k, v, CAUSAL, t, 0)
    calls = [(paged, None), (paged, "triton"), (("mla_decode", q_latent, cache, 512, LATENT, t_latent, 0), None)]
    for call, backend in calls:
        kernel(*call, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [kernel(*call, backend=backend)[1][0] for call, backend in calls]
    for x, right in ((t, table), (t_latent, latent_table)):
        x.block_table.copy_(right)
        x.seqused_k.copy_(torch.tensor(second, dtype=torch.int32))
    graph.replay()
    expected = [
        *[reference_paged(q.float(), k.float(), v.float(), CAUSAL, t)[0]] * 2,
        reference_mla(q_latent.float(), cache.float(), 512, LATENT, t_latent)[0],
    ]
    for out, wanted in zip(outs, expected, strict=True):
        torch.testing.assert_close(out.float(), wanted, atol=8e-3, rtol=1.6e-2)


def test_repeats_are_bitwise_equal():
    k, v, table = keys_and_values(PRIMES, 16)
    cache, latent_table = poisoned(PRIMES, 64, 576)
    calls = [
        ("paged_attention", random(len(PRIMES), 32, 128), k, v, CAUSAL, batch_of(PRIMES, table), 0),
        ("mla_decode", random(len(PRIMES), 128, 576), cache, 512, LATENT, batch_of(PRIMES, latent_table), 0),
    ]
    for call in calls:
        first = kernel(*call)[1]
        for _ in range(100):
            again = kernel(*call)[1]
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
