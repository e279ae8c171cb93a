"""Offsets beyond 2³¹ elements on the CPU, in tensors that span more but of which little is touched."""

import pytest
import torch

from octavo import AttentionMetadata, ops

SPAN = 2**31 + 2**20


def spread(rows: int, *shape: int) -> torch.Tensor:
    """(rows, *shape) of bf16 random numbers over SPAN elements; the system gives memory only to what is written."""
    wide = torch.empty(SPAN, dtype=torch.bfloat16)
    size = torch.Size(shape).numel()
    view = wide.as_strided((rows, *shape), (2**31 // (rows - 1), *torch.empty(shape).stride()))
    assert (rows - 1) * view.stride(0) + size <= SPAN
    return view.copy_(torch.randn(rows, *shape))


@pytest.mark.parametrize("length", [33, 4097], ids=["a small call", "the compiled kernels"])
def test_forward_and_backward(length: int) -> None:
    torch.manual_seed(0)
    wide = [spread(length, 1, 64)[None].requires_grad_() for _ in "qkv"]
    near = [x.detach().contiguous().requires_grad_() for x in wide]
    outs = [ops.flash_attn_func(*leaves, causal=True) for leaves in (wide, near)]
    assert torch.equal(*outs)
    dout = torch.randn_like(outs[0])
    for ours, expected in zip(
        torch.autograd.grad(outs[0], wide, dout), torch.autograd.grad(outs[1], near, dout), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pages(backend: str) -> None:
    torch.manual_seed(0)
    used = torch.tensor([[2**20 + 7, 0, 3], [2**20 + 6, 2**20 + 1, 1]])
    wide = [torch.empty(2**20 + 8, 16, 2, 64, dtype=torch.bfloat16) for _ in "kv"]
    near = [torch.randn(6, 16, 2, 64).bfloat16() for _ in "kv"]
    for one, other in zip(wide, near, strict=True):
        one[used.flatten()] = other
    q, k, v = torch.randn(2, 4, 64).bfloat16(), torch.randn(2, 2, 64).bfloat16(), torch.randn(2, 2, 64).bfloat16()
    results = []
    for caches, table in ((wide, used), (near, torch.arange(6).view(2, 3))):
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.arange(3, dtype=torch.int32),
            cache_seqlens=torch.tensor([40, 48], dtype=torch.int32),
            block_table=table.int(),
            slot_mapping=table[:, 0] * 16 + 5,
            max_seqlen_q=1,
            max_seqlen_k=48,
        )
        with ops.use_backend(backend):
            ops.store_kv_cache(k, v, *caches, metadata.slot_mapping)
            results.append(ops.paged_attention(q, *caches, metadata))
    assert torch.equal(*results)
    assert all(torch.equal(a[used.flatten()], b) for a, b in zip(wide, near, strict=True))
