"""The error rule over head sizes, those that are no multiple of 8 included, and lengths that are prime."""

import pytest
import torch

from octavo import ops


def plain(q, k, v):
    """Causal attention as one would write it in torch, in the dtype of its inputs, and its LSE."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q * q.shape[-1] ** -0.5, k)
    hidden = torch.ones(q.shape[1], k.shape[1]).triu(k.shape[1] - q.shape[1] + 1).bool()
    scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 24, 40, 59, 64, 96, 111, 128, 160, 192, 256])
def test_forward_lse_and_gradients(head_dim, dtype):
    torch.manual_seed(0)
    lengths_and_heads = ((61, 4), (97, 2), (97, 2))
    leaves = [torch.randn(2, s, h, head_dim).to(dtype).requires_grad_() for s, h in lengths_and_heads]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    dout = torch.randn(2, 61, 4, head_dim).to(dtype)
    results = []
    for (out, lse), inputs in (
        (ops.flash_attn_func(*leaves, causal=True, return_lse=True)[:2], leaves),
        (plain(*leaves), leaves),
        (plain(*exact), exact),
    ):
        results.append([out, lse, *torch.autograd.grad(out, inputs, dout.to(out.dtype))])
    for times, ours, theirs, truth in zip((2, 2, 3, 3, 3), *results, strict=True):
        errors = [(x.double() - truth).abs().max().item() for x in (ours, theirs)]
        assert errors[0] <= times * errors[1] + 1e-6 * truth.abs().max().item()
