"""Reference ops over a paged cache, against dense attention of the same keys; unused slots and entries are poisoned."""

import torch

from octavo.kernels.reference.cache import store_kv_cache, store_latent_cache
from octavo.kernels.reference.flash_fwd import flash_fwd
from octavo.kernels.reference.merge import merge_attention_states
from octavo.kernels.reference.mla_decode import mla_decode
from octavo.kernels.reference.paged_attention import paged_attention
from octavo.kernels.spec import AttentionSpec, AttentionTensors

SPEC = AttentionSpec(0.3, window_right=0)
LENGTHS, NEW, BLOCK_SIZE = [7, 13, 5], [1, 5, 5], 4


def paged_batch(width):
    """`(table, slots of every key, t)` for three sequences whose blocks lie scattered."""
    torch.manual_seed(2)
    table = torch.full((3, 5), 2**30, dtype=torch.int32)
    slots, free = [], iter(torch.randperm(17).tolist())
    for b, length in enumerate(LENGTHS):
        blocks = torch.tensor([next(free) for _ in range(-(-length // BLOCK_SIZE))])
        table[b, : len(blocks)] = blocks
        positions = torch.arange(length)
        slots.append(blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE)
    t = AttentionTensors(
        cu_seqlens_q=torch.tensor([0, 1, 6, 11], dtype=torch.int32),
        max_seqlen_q=5,
        seqused_k=torch.tensor(LENGTHS, dtype=torch.int32),
        block_table=table,
    )
    return slots, torch.full((17, BLOCK_SIZE, *width), torch.nan), t


def test_pages_hold_what_dense_tensors_hold():
    slots, k_cache, t = paged_batch((2, 8))
    v_cache = torch.full((17, BLOCK_SIZE, 2, 3), torch.nan)
    q = torch.randn(11, 4, 8)
    first = 0
    for b, length in enumerate(LENGTHS):
        k, v = torch.randn(length, 2, 8), torch.randn(length, 2, 3)
        store_kv_cache(k, v, k_cache, v_cache, slots[b])
        rows = slice(first, first := first + NEW[b])
        expected, expected_lse = flash_fwd(q[None, rows], k[None], v[None], SPEC, AttentionTensors())
        if b == len(LENGTHS) - 1:
            out, lse = paged_attention(q, k_cache, v_cache, SPEC, t)
            torch.testing.assert_close(out[rows], expected[0])
            torch.testing.assert_close(lse[:, rows], expected_lse[0])


def test_latents_are_keys_and_values():
    slots, cache, t = paged_batch((10,))
    latents = [torch.randn(length, 10) for length in LENGTHS]
    for latent, slot in zip(latents, slots, strict=True):
        store_latent_cache(latent, cache, slot)
    q = torch.randn(11, 4, 10)
    out, _ = mla_decode(q, cache, 6, SPEC, t)
    keys = latents[1][None, :, None]
    expected, _ = flash_fwd(q[None, 1:6], keys, keys[..., :6], SPEC, AttentionTensors())
    torch.testing.assert_close(out[1:6], expected[0])


def test_negative_slots_are_skipped():
    k = torch.ones(3, 2, 4)
    k_cache, v_cache = torch.zeros(5, 2, 2, 4), torch.zeros(5, 2, 2, 4)
    store_kv_cache(k, k, k_cache, v_cache, torch.tensor([-1, 9, -1]))
    assert k_cache.view(10, -1).any(dim=1).tolist() == [False] * 9 + [True]


def test_merged_parts_are_the_whole():
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 11, 2, 8), torch.randn(2, 11, 2, 8)
    spec, t = AttentionSpec(0.3), AttentionTensors()
    parts = [flash_fwd(q, k[:, a:b], v[:, a:b], spec, t) for a, b in ((0, 5), (5, 5), (5, 11))]
    parts[1][0].fill_(torch.nan)  # a part that saw nothing may hold anything
    out, lse = merge_attention_states(*zip(*parts, strict=True))
    torch.testing.assert_close((out, lse), flash_fwd(q, k, v, spec, t))
    nothing = [parts[1], parts[1]]
    out, lse = merge_attention_states(*zip(*nothing, strict=True))
    assert not out.any()
    assert (lse == -torch.inf).all()
