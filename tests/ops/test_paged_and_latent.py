"""The engine's ops: stores, paged attention and absorbed latent attention of mixed decode rows and prefill chunks."""

from dataclasses import replace

import pytest
import torch

from octavo import ops

LENGTHS, NEW, BLOCK_SIZE, NUM_BLOCKS = [7, 13, 5, 0], [1, 5, 5, 0], 4, 19


@pytest.fixture
def batch():
    """`(metadata, slots of every key of each sequence)`; table entries in no use are absurd."""
    torch.manual_seed(0)
    table = torch.full((4, 5), 2**30, dtype=torch.int32)
    free, slots = iter(torch.randperm(NUM_BLOCKS).tolist()), []
    for b, length in enumerate(LENGTHS):
        blocks = torch.tensor([next(free) for _ in range(-(-length // BLOCK_SIZE))], dtype=torch.int64)
        table[b, : len(blocks)] = blocks
        positions = torch.arange(length)
        slots.append(blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE)
    new_slots = torch.cat([s[len(s) - n :] for s, n in zip(slots, NEW, strict=True)])
    metadata = ops.AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, 1, 6, 11, 11], dtype=torch.int32),
        cache_seqlens=torch.tensor(LENGTHS, dtype=torch.int32),
        block_table=table,
        slot_mapping=new_slots,
        max_seqlen_q=5,
        max_seqlen_k=13,
    )
    return metadata, slots


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"window_size": (3, -1)}, {"softcap": 2.0, "softmax_scale": 0.5}, {"learnable_sink": torch.randn(6)}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_paged_attention_is_attention_over_each_sequence(batch, options, dtype, backend):
    metadata, slots = batch
    k_cache, v_cache = torch.full((2, NUM_BLOCKS, BLOCK_SIZE, 2, 16), torch.nan, dtype=dtype).unbind(0)
    keys = [torch.randn(2, n, 2, 16).to(dtype) for n in LENGTHS]
    for (k, v), slot in zip(keys, slots, strict=True):
        ops.store_kv_cache(k, v, k_cache, v_cache, slot)
    q = torch.randn(11 + 2, 6, 16).to(dtype)  # two rows of no sequence
    out = ops.paged_attention(q, k_cache, v_cache, metadata, backend=backend, **options)
    assert out.dtype == dtype
    assert not out[11:].any()
    for b, ((k, v), rows) in enumerate(zip(keys, metadata.cu_seqlens_q.tolist(), strict=False)):
        q_b = q[None, rows : rows + NEW[b]]
        expected = ops.flash_attn_func(q_b, k[None], v[None], causal=True, backend="reference", **options)
        tolerance = {} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
        torch.testing.assert_close(out[rows : rows + NEW[b]], expected[0], **tolerance)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_latent_attention_reads_keys_and_values_from_the_latent(batch, backend):
    metadata, slots = batch
    cache = torch.full((NUM_BLOCKS, BLOCK_SIZE, 24), torch.nan)
    latents = [torch.randn(n, 24) for n in LENGTHS]
    for latent, slot in zip(latents, slots, strict=True):
        ops.store_latent_cache(latent, cache, slot)
    q = torch.randn(11, 6, 24)
    out = ops.mla_attention(q, cache, 16, metadata, 0.25, backend=backend)
    for b, (latent, rows) in enumerate(zip(latents, metadata.cu_seqlens_q.tolist(), strict=False)):
        k = latent[None, :, None]
        q_b = q[None, rows : rows + NEW[b]]
        expected = ops.flash_attn_func(q_b, k, k[..., :16], softmax_scale=0.25, causal=True, backend="reference")
        torch.testing.assert_close(out[rows : rows + NEW[b]], expected[0])


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_flash_mla_call(batch, kv_heads):
    metadata, slots = batch
    cache = torch.full((NUM_BLOCKS, BLOCK_SIZE, kv_heads, 24), torch.nan)
    latents = [torch.randn(n, kv_heads, 24) for n in LENGTHS]
    for latent, slot in zip(latents, slots, strict=True):
        for head in range(kv_heads):
            ops.store_latent_cache(latent[:, head], cache[:, :, head], slot)
    q = torch.randn(4, 2, 6, 24)
    plan = ops.get_mla_metadata() if kv_heads == 1 else ops.get_mla_metadata(metadata.cache_seqlens, 4, kv_heads)
    out, lse = ops.flash_mla_with_kvcache(
        q, cache, metadata.block_table, metadata.cache_seqlens, 16, *plan, causal=True
    )
    assert out.shape == (4, 2, 6, 16)
    for b, latent in enumerate(latents):
        k = latent[None]
        expected = ops.flash_attn_func(q[None, b], k, k[..., :16], causal=True, return_lse=True, backend="reference")
        torch.testing.assert_close((out[None, b], lse[None, b]), expected)
    with pytest.raises(ValueError, match="is_fp8_kvcache"):
        ops.flash_mla_with_kvcache(
            q, cache, metadata.block_table, metadata.cache_seqlens, 16, *plan, is_fp8_kvcache=True
        )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_stores_skip_negative_slots_and_touch_nothing_else(backend):
    k, v = torch.randn(2, 5, 2, 3).unbind(0)
    k_cache, v_cache, latent_cache = torch.zeros(3, 4, 2, 3), torch.zeros(3, 4, 2, 3), torch.zeros(3, 4, 6)
    slots = torch.tensor([11, -1, 0, 6, -1])
    with ops.use_backend(backend):
        ops.store_kv_cache(k, v, k_cache, v_cache, slots)
        ops.store_latent_cache(k.flatten(1), latent_cache, slots)
    expected = torch.zeros(12, 2, 3)
    expected[[11, 0, 6]] = k[[0, 2, 3]]
    torch.testing.assert_close(k_cache.view(12, 2, 3), expected)
    torch.testing.assert_close(latent_cache.view(12, 2, 3), expected)
    assert v_cache.view(12, 6).any(dim=1).sum() == 3


def test_gradients_through_a_cache_are_refused(batch):
    metadata, _ = batch
    q = torch.randn(11, 6, 16, requires_grad=True)
    cache = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, 2, 16)
    with pytest.raises(NotImplementedError, match="no backward"):
        ops.paged_attention(q, cache, cache, metadata).sum().backward()


def test_paged_ops_compile_whole(batch):
    metadata, _ = batch
    q, k = torch.randn(11, 6, 16), torch.randn(11, 2, 16)

    def step(q, k, k_cache, v_cache, metadata):
        ops.store_kv_cache(k, k, k_cache, v_cache, metadata.slot_mapping)
        return ops.paged_attention(q, k_cache, v_cache, metadata)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        caches = torch.ones(2, NUM_BLOCKS, BLOCK_SIZE, 2, 16).unbind(0)
        results.append((function(q, k, *caches, metadata), *caches))
    torch.testing.assert_close(results[0], results[1])


def test_merge_is_differentiable_and_checks_its_parts():
    q, k, v = (torch.randn(1, n, 2, 4, dtype=torch.float64, requires_grad=True) for n in (3, 6, 6))

    def in_parts(q, k, v):
        parts = [ops.flash_attn_func(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 2), slice(2, 6))]
        return ops.merge_attention_states(*zip(*parts, strict=True))

    torch.testing.assert_close(in_parts(q, k, v), ops.flash_attn_func(q, k, v, return_lse=True))
    assert torch.autograd.gradcheck(in_parts, (q, k, v))
    with pytest.raises(ValueError, match=r"softmax_lses\[0\]: expected shape \(1, 2, 3\)"):
        ops.merge_attention_states([q], [torch.zeros(1, 3, 2)])


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("k_cache: expected shape", {"k_cache": torch.zeros(3, 4, 2, 8)}),
        ("v_cache: expected shape", {"v_cache": torch.zeros(3, 5, 2, 16)}),
        ("k_cache: expected torch.float32", {"k_cache": torch.zeros(3, 4, 2, 16, dtype=torch.float16)}),
        ("q: expected shape", {"q": torch.zeros(1, 11, 6, 16)}),
    ],
)
def test_mistakes_name_the_argument(batch, message, change):
    cache = torch.zeros(3, 4, 2, 16)
    arguments = {"q": torch.zeros(11, 6, 16), "k_cache": cache, "v_cache": cache} | change
    with pytest.raises(ValueError, match=message):
        ops.paged_attention(**arguments, metadata=batch[0])


def test_lengths_past_the_table_are_refused_where_looking_is_free(batch):
    metadata = replace(batch[0], cache_seqlens=torch.tensor([7, 21, 5, 0], dtype=torch.int32))
    cache = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, 1, 16)
    with pytest.raises(ValueError, match="cache_seqlens: expected at most 20 keys per row, got 21"):
        ops.paged_attention(torch.zeros(11, 2, 16), cache, cache, metadata)
    with pytest.raises(ValueError, match="cache_seqlens: expected at most 20 keys per row, got 21"):
        ops.mla_attention(torch.zeros(11, 2, 16), cache[:, :, 0], 8, metadata, 0.1)
