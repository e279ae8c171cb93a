"""The Hopper forward over a paged cache, on such a GPU: chunks of prompts and decode rows in one call."""

import pytest
import torch

from octavo.kernels.reference.flash_fwd import flash_fwd as reference_fwd
from octavo.kernels.spec import AttentionSpec, AttentionTensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0: none here",
    ),
]
#       new tokens and keys in the cache, these included
SEQUENCES = [(100, 100), (1, 77), (333, 700), (64, 64), (200, 777), (1, 1), (0, 5), (430, 2000)]


def poisoned_cache(lengths, heads_k, head_dim, page, seed):
    """k_cache, v_cache with NaN in every row that is not in use, an absurd table, and each sequence's keys, values."""
    generator = torch.Generator("cuda").manual_seed(seed)
    blocks = sum(-(-n // page) for n in lengths) + 2
    caches = [torch.full((blocks, page, heads_k, head_dim), torch.nan, device="cuda").bfloat16() for _ in "kv"]
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.full((len(lengths), -(-max(lengths) // page) + 1), 2**30, dtype=torch.int32)
    sequences = []
    for b, length in enumerate(lengths):
        k, v = (torch.randn(length, heads_k, head_dim, device="cuda", generator=generator).bfloat16() for _ in "kv")
        sequences.append((k, v))
        for j in range(-(-length // page)):
            block = order.pop()
            table[b, j] = block
            for cache, x in zip(caches, (k, v), strict=True):
                part = x[j * page : (j + 1) * page]
                cache[block, : len(part)] = part
    return *caches, table.cuda(), sequences


@pytest.mark.parametrize("page", [16, 32, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_chunks_and_decode_rows(head_dim, page):
    from octavo.kernels.hopper.paged_prefill import paged_attention

    lengths = [length for _, length in SEQUENCES]
    k_cache, v_cache, table, sequences = poisoned_cache(lengths, 2, head_dim, page, seed=page)
    cu = torch.tensor([0, *(new for new, _ in SEQUENCES)], device="cuda").cumsum(0).int()
    total = int(cu[-1])
    q = torch.randn(total + 5, 4, head_dim, device="cuda").bfloat16()
    used = torch.tensor(lengths, device="cuda", dtype=torch.int32)
    spec = AttentionSpec(head_dim**-0.5, window_right=0)
    t = AttentionTensors(cu, max_seqlen_q=430, max_seqlen_k=2000, seqused_k=used, block_table=table)
    out, lse = paged_attention(q, k_cache, v_cache, spec, t)
    for b, (k, v) in enumerate(sequences):
        rows = slice(int(cu[b]), int(cu[b + 1]))
        if rows.start == rows.stop:
            continue
        want, want_lse = reference_fwd(
            q[None, rows].float(), k[None].float(), v[None].float(), spec, AttentionTensors()
        )
        # twice what rounding P and the output to bf16 gives
        assert (out[rows].float() - want[0]).abs().max() <= 2 * 2.0**-8 * v.float().abs().max()
        torch.testing.assert_close(lse[:, rows], want_lse[0], atol=1e-3, rtol=1e-4)
    assert not out[total:].any()
    assert lse[:, total:].isneginf().all()
