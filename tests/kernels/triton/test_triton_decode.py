"""The balanced decode kernel, interpreted, against the reference: ragged lengths, options, quantised caches."""

import pytest
import torch

from octavo.kernels.reference import cache as reference_cache
from octavo.kernels.reference.paged_attention import paged_attention as reference_paged
from octavo.kernels.spec import AttentionSpec, AttentionTensors
from octavo.kernels.triton import cache
from octavo.kernels.triton.decode_launch import num_parts
from octavo.kernels.triton.paged_decode import paged_attention, refuses_paged_attention

FP8, INT8, FP32 = torch.float8_e4m3fn, torch.int8, torch.float32
CAUSAL = AttentionSpec(0.2, window_right=0)


def paged(lengths, page, heads, head_dim, seed=0):
    """Two fp16 caches, NaN wherever no key lies, and a table whose unused entries are absurd."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(counts) + 2, generator=generator, dtype=torch.int32).tolist()
    table = torch.full((len(lengths), max(counts) + 1), -(2**31), dtype=torch.int32)
    k, v = (torch.full((len(order), page, heads, head_dim), torch.nan, dtype=torch.float16) for _ in "kv")
    for b, length in enumerate(lengths):
        for i in range(counts[b]):
            table[b, i] = block = order.pop()
            n = min(page, length - i * page)
            k[block, :n], v[block, :n] = torch.randn(2, n, heads, head_dim, generator=generator).half()
    return k, v, table


def batch_of(lengths, table, queries=1, **tensors):
    return AttentionTensors(
        cu_seqlens_q=torch.arange(len(lengths) + 1, dtype=torch.int32) * queries, max_seqlen_q=queries,
        max_seqlen_k=max(lengths), block_table=table, seqused_k=torch.tensor(lengths, dtype=torch.int32), **tensors,
    )  # fmt: skip


def assert_like_reference(q, k, v, spec, t, **tolerance):
    """Within fp16's rounding of the reference in fp32; the fp16 P is what costs most of it."""
    assert refuses_paged_attention(q, k, v, spec, t) is None
    out, lse = paged_attention(q, k, v, spec, t)
    caches = (k, v) if t.k_scale is not None else (k.float(), v.float())
    expected, expected_lse = reference_paged(q.float(), *caches, spec, t)
    torch.testing.assert_close(out.float(), expected, **{"atol": 2e-3, "rtol": 2e-3, **tolerance})
    torch.testing.assert_close(lse, expected_lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("page", [8, 16, 24, 64, 256])
def test_ragged_lengths_that_share_parts(page):
    """One long sequence falls into all parts, several short ones into one; one is empty; two rows belong to no one."""
    lengths = [1, 700, 0, 17, 63, 64, 65, 128]
    k, v, table = paged(lengths, page, 2, 64)
    assert_like_reference(torch.randn(len(lengths) + 2, 6, 64).half(), k, v, CAUSAL, batch_of(lengths, table))


@pytest.mark.parametrize(
    "scalars", [{"window_left": 50}, {"softcap": 2.0}, {"window_left": 3, "softcap": 5.0}], ids=str
)
@pytest.mark.parametrize("queries", [1, 3])
def test_windows_softcap_sinks_and_several_queries(scalars, queries):
    lengths = [301, 33, 5]
    k, v, table = paged(lengths, 16, 2, 48)
    t = batch_of(lengths, table, queries, learnable_sink=torch.randn(4))
    spec = AttentionSpec(0.2, window_right=0, **scalars)
    assert_like_reference(torch.randn(3 * queries, 4, 48).half(), k, v, spec, t)


def test_one_query_sees_all_keys_with_or_without_a_causal_mask():
    lengths = [90, 33]
    k, v, table = paged(lengths, 16, 1, 32)
    assert_like_reference(torch.randn(2, 2, 32).half(), k, v, AttentionSpec(0.2), batch_of(lengths, table))


def test_lengths_past_the_table_count_as_its_capacity():
    """The table names 64 + 32 tokens; what lies behind it in memory is no block number."""
    k, v, table = paged([64, 96], 16, 1, 32)
    table = table[:, :6]
    table[0, 4:] = table[0, :2]
    q, t = torch.randn(2, 2, 32).half(), batch_of([97, 2**31 - 1], table)
    out, lse = paged_attention(q, k, v, CAUSAL, t)
    expected, expected_lse = paged_attention(q, k, v, CAUSAL, batch_of([96, 96], table))
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def test_dense_queries():
    lengths = [200, 33]
    k, v, table = paged(lengths, 16, 1, 32)
    t = AttentionTensors(block_table=table, seqused_k=torch.tensor(lengths, dtype=torch.int32), max_seqlen_k=200)
    assert_like_reference(torch.randn(2, 2, 5, 32).half(), k, v, CAUSAL, t)


@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_quantised_cache_is_read_exactly(dtype):
    """Against the reference on the same quantised numbers only the fp16 arithmetic differs."""
    lengths = [1, 300, 17]
    k, v, table = paged(lengths, 16, 2, 64)
    scales = torch.tensor([0.01, 0.03])
    k, v = (reference_cache.quantise(x.nan_to_num(), scales, dtype) for x in (k, v))
    t = batch_of(lengths, table, k_scale=scales, v_scale=scales)
    assert_like_reference(torch.randn(3, 4, 64).half(), k, v, CAUSAL, t)


@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_stores_what_the_reference_stores(dtype):
    """Numbers that fp8 holds exactly, since Triton's interpreter rounds 126.7 to 64; tests/gpu has the others."""
    k, v = torch.randn(2, 40, 3, 24)
    scales = torch.tensor([0.02, 0.05, 0.5])
    if dtype == FP8:
        k, v = (reference_cache.dequantise(reference_cache.quantise(x, scales, FP8), scales, FP32) for x in (k, v))
    k[0, 0, 0], k[1, 1, 1] = 1000.0, -1000.0
    slots = torch.randperm(64)[:40]
    slots[5] = -1
    ours = [torch.zeros(4, 16, 3, 24).to(dtype) for _ in "kv"]
    theirs = [x.clone() for x in ours]
    assert cache.refuses_store_kv_cache(k, v, *ours, slots, scales, scales) is None
    cache.store_kv_cache(k, v, *ours, slots, scales, scales)
    reference_cache.store_kv_cache(k, v, *theirs, slots, scales, scales)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True))


def test_parts_of_all_heads_fill_whole_waves():
    for heads in (1, 2, 3, 4, 8, 16, 32, 40, 64):
        programs = 264
        total = heads * num_parts(heads, programs)
        waves = -(-total // programs)
        assert total >= 0.98 * waves * programs


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"page": 4}, "4"),
        ({"heads": 128}, "64 rows"),
        ({"alibi_slopes": torch.ones(4)}, "alibi_slopes"),
        ({"splits": 2}, "num_splits"),
        ({"spec": AttentionSpec(0.1), "queries": 2}, "causal"),
        ({"spec": AttentionSpec(-0.1, window_right=0)}, "softmax_scale"),
    ],
)
def test_refuses_the_rest_and_says_why(change, says):
    heads = change.get("heads", 4)
    q = torch.zeros(1, heads, 32, dtype=change.get("dtype", torch.float16))
    kv = torch.zeros(4, change.get("page", 16), 1, 32, dtype=torch.float16)
    table = torch.zeros(1, 4, dtype=torch.int32)
    t = batch_of([5], table, change.get("queries", 1), alibi_slopes=change.get("alibi_slopes"))
    assert says in refuses_paged_attention(q, kv, kv, change.get("spec", CAUSAL), t, change.get("splits", 0))
