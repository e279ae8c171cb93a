"""Paged and latent decode, cache writes and merging, interpreted, against the reference; unused slots are NaN."""

import pytest
import torch

from octavo.kernels.reference import cache as reference_cache
from octavo.kernels.reference.merge import merge_attention_states as reference_merge
from octavo.kernels.reference.mla_decode import mla_decode as reference_mla
from octavo.kernels.reference.paged_attention import paged_attention as reference_paged
from octavo.kernels.spec import AttentionSpec, AttentionTensors
from octavo.kernels.triton import cache, flash_fwd
from octavo.kernels.triton.merge import merge_attention_states, refuses_merge_attention_states
from octavo.kernels.triton.mla_decode import mla_decode
from octavo.kernels.triton.paged_attention import paged_attention, refuses_paged_attention
from octavo.kernels.triton.tiles import Tile


def paged(lengths, page, heads, head_dim, max_blocks, seed=0):
    """Two caches, NaN wherever no key lies, and a table whose unused entries point far outside."""
    generator = torch.Generator().manual_seed(seed)
    blocks = sum(-(-n // page) for n in lengths) + 2
    order = torch.randperm(blocks, generator=generator, dtype=torch.int32).tolist()
    table = torch.full((len(lengths), max_blocks), 2**30, dtype=torch.int32)
    k, v = (torch.full((blocks, page, heads, head_dim), torch.nan) for _ in "kv")
    for b, length in enumerate(lengths):
        for i in range(-(-length // page)):
            table[b, i] = block = order.pop()
            n = min(page, length - i * page)
            k[block, :n], v[block, :n] = torch.randn(2, n, heads, head_dim, generator=generator)
    return k, v, table


def batch_of(queries, lengths, table, max_k, **tensors):
    cu = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0).to(torch.int32)
    return AttentionTensors(
        cu_seqlens_q=cu, max_seqlen_q=max(queries), max_seqlen_k=max_k, block_table=table,
        seqused_k=torch.tensor(lengths, dtype=torch.int32), **tensors,
    )  # fmt: skip


def assert_equal(got, expected):
    torch.testing.assert_close(got[0], expected[0], atol=5e-6, rtol=5e-6)
    torch.testing.assert_close(got[1], expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_splits", [0, 3])
def test_lengths_past_the_table_count_as_its_capacity(num_splits):
    k, v, table = paged([64, 96], 16, 1, 32, 7)
    table = table[:, :6]
    table[0, 4:] = table[0, :2]
    q, latents = torch.randn(2, 2, 32), k[:, :, 0]
    wrong, right = (batch_of([1, 1], lengths, table, 96) for lengths in ([97, 2**31 - 1], [96, 96]))
    calls = [
        lambda t: paged_attention(q, k, v, AttentionSpec(0.2, window_right=0), t, num_splits),
        lambda t: mla_decode(q, latents, 16, AttentionSpec(0.2, window_right=0), t, num_splits),
    ]
    for call in calls:
        for got, expected in zip(call(wrong), call(right), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("page", [1, 16, 24, 64, 256])
def test_decode(page, num_splits):
    """Grouped heads, ragged lengths, any page size, any number of splits."""
    lengths = [1, 300, 16, 170]
    k, v, table = paged(lengths, page, 2, 40, 400 // page + 1)
    t = batch_of([1] * 4, lengths, table, 400)
    q = torch.randn(4, 6, 40)
    spec = AttentionSpec(0.2, window_right=0)
    assert refuses_paged_attention(q, k, v, spec, t, num_splits) is None
    assert_equal(paged_attention(q, k, v, spec, t, num_splits), reference_paged(q, k, v, spec, t))


@pytest.mark.parametrize(
    "scalars", [{"window_left": 50}, {"softcap": 2.0}, {"window_left": 3, "softcap": 5.0}], ids=str
)
@pytest.mark.parametrize("num_splits", [0, 4])
def test_decode_options(scalars, num_splits):
    lengths = [200, 33]
    k, v, table = paged(lengths, 16, 2, 32, 13)
    tensors = {"learnable_sink": torch.randn(4), "alibi_slopes": torch.rand(4), "qv": torch.randn(2, 4, 32)}
    t = batch_of([1, 1], lengths, table, 208, **tensors)
    q = torch.randn(2, 4, 32)
    spec = AttentionSpec(0.2, window_right=0, **scalars)
    assert_equal(paged_attention(q, k, v, spec, t, num_splits), reference_paged(q, k, v, spec, t))


@pytest.mark.parametrize("num_splits", [0, 2])
def test_prompt_chunks_and_decode_rows_together(num_splits):
    queries, lengths = [1, 20, 70, 3, 0], [150, 20, 130, 300, 40]
    k, v, table = paged(lengths, 16, 1, 24, 20)
    t = batch_of(queries, lengths, table, 320, learnable_sink=torch.randn(3))
    q = torch.randn(sum(queries), 3, 24)
    spec = AttentionSpec(0.2, window_right=0)
    assert_equal(paged_attention(q, k, v, spec, t, num_splits), reference_paged(q, k, v, spec, t))


def test_splits_share_all_keys_evenly():
    """Two long sequences among short ones get most of the slots, and the grid follows from shapes alone."""
    tile = Tile(16, 64, 4, 2)
    few = flash_fwd.split_slots(4, 8, 100_000, 0, True, tile, 132)
    assert few == (4 * 132 // 8 + 4, 4 * 132 // 8)
    assert flash_fwd.split_slots(4, 8, 200, 0, True, tile, 132) == (0, 0)
    assert flash_fwd.split_slots(4, 8, 200, 3, True, tile, 132) == (12, 1)
    assert flash_fwd.split_slots(4, 8, 100_000, 1, True, tile, 132) == (0, 0)


@pytest.mark.parametrize(("latent", "rope"), [(64, 16), (64, 64), (48, 16), (128, 0)])
@pytest.mark.parametrize("queries", [1, 2])
def test_latent_decode(latent, rope, queries):
    """The value is the first part of the key; widths that are no powers of two take the general path."""
    lengths = [140, 9, 64]
    kv, _, table = paged(lengths, 16, 1, latent + rope, 12)
    kv = kv[:, :, 0]
    t = batch_of([queries] * 3, lengths, table, 192)
    q = torch.randn(3 * queries, 20, latent + rope)
    spec = AttentionSpec(0.1, window_right=0)
    assert_equal(mla_decode(q, kv, latent, spec, t), reference_mla(q, kv, latent, spec, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_store_kv_cache_writes_its_slots_and_nothing_else(dtype):
    k, v = torch.randn(5, 3, 24, dtype=dtype), torch.randn(5, 3, 40, dtype=dtype)
    slots = torch.tensor([17, -1, 0, 63, 5])
    ours = [torch.full((4, 16, 3, n), 7.0, dtype=dtype) for n in (24, 40)]
    wanted = [x.clone() for x in ours]
    assert cache.refuses_store_kv_cache(k, v, *ours, slots) is None
    cache.store_kv_cache(k, v, *ours, slots)
    reference_cache.store_kv_cache(k, v, *wanted, slots)
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_store_into_a_strided_cache_and_from_strided_tokens():
    both = torch.zeros(2, 4, 16, 3, 24)
    k, v = torch.randn(6, 2, 3, 24).unbind(1)
    slots = torch.tensor([3, 60, 20, 21, -1, 40])
    cache.store_kv_cache(k, v, both[0], both[1], slots)
    wanted = torch.zeros_like(both)
    reference_cache.store_kv_cache(k, v, wanted[0], wanted[1], slots)
    assert torch.equal(both, wanted)


def test_store_latent_cache():
    latent, slots = torch.randn(4, 72), torch.tensor([0, 33, -1, 15])
    ours, wanted = torch.zeros(3, 16, 72), torch.zeros(3, 16, 72)
    assert cache.refuses_store_latent_cache(latent, ours, slots) is None
    cache.store_latent_cache(latent, ours, slots)
    reference_cache.store_latent_cache(latent, wanted, slots)
    assert torch.equal(ours, wanted)
    assert "contiguous" in cache.refuses_store_latent_cache(latent, ours.transpose(1, 2), slots)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_merge(parts, packed):
    """Parts that saw nothing hold NaN and weigh nothing; rows that no part saw give 0 and −inf."""
    shape, lse_shape = ((9, 3, 24), (3, 9)) if packed else ((2, 9, 3, 24), (2, 3, 9))
    outs, lses = [torch.randn(shape) for _ in range(parts)], [3 * torch.randn(lse_shape) for _ in range(parts)]
    for lse in lses:
        lse[..., 2] = -torch.inf
    lses[0][..., 4] = -torch.inf
    for out, lse in zip(outs, lses, strict=True):
        out.masked_fill_(torch.isneginf(lse).transpose(-1, -2)[..., None], torch.nan)
    assert refuses_merge_attention_states(outs, lses) is None
    assert_equal(merge_attention_states(outs, lses), reference_merge(outs, lses))
