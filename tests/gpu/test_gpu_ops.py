"""octavo's public functions on the GPU: what dispatch chooses, autograd, torch.compile, CUDA graphs, memory."""

import pytest
import torch

import octavo
from octavo import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: none here"),
]
DEVICE = "cuda"


def qkv(batch=2, length=257, heads=(8, 2), head_dim=64, dtype=torch.bfloat16, grad=True):
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [
        torch.randn(batch, length, h, head_dim, device=DEVICE, generator=generator).to(dtype).requires_grad_(grad)
        for h in (heads[0], heads[1], heads[1])
    ]


def test_the_readme_example():
    query = torch.randn(32, 64, 8, 128).to(DEVICE, dtype=torch.bfloat16)
    assert octavo.flash_attn_func(query, query, query, causal=False).shape == (32, 64, 8, 128)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "window_size": (50, 0), "softcap": 20.0}], ids=str
)
def test_forward_and_gradients_agree_with_the_reference_backend(options):
    leaves = qkv()
    dout = torch.randn(2, 257, 8, 64, device=DEVICE, dtype=torch.bfloat16)
    out = ops.flash_attn_func(*leaves, **options)
    expected = ops.flash_attn_func(*leaves, backend="reference", **options)
    torch.testing.assert_close(out, expected, atol=8e-3, rtol=1.6e-2)
    for got, want in zip(
        torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True
    ):
        torch.testing.assert_close(got, want, atol=3e-2, rtol=3e-2)


def test_the_lse_has_a_gradient():
    leaves = qkv()
    for backend in (None, "reference"):
        _, lse = ops.flash_attn_func(*leaves, causal=True, return_lse=True, backend=backend)[:2]
        grads = torch.autograd.grad(lse.sum(), leaves[:2])
        if backend is None:
            ours = grads
    for got, want in zip(ours, grads, strict=True):
        torch.testing.assert_close(got, want, atol=3e-2, rtol=3e-2)


def test_head_dims_that_ops_pads():
    for head_dim in (59, 111):
        leaves = qkv(head_dim=head_dim)
        assert ops.explain(ops.flash_attn_func, *leaves, causal=True).backend in ("hopper", "triton")
        out, expected = (ops.flash_attn_func(*leaves, causal=True, backend=b) for b in (None, "reference"))
        torch.testing.assert_close(out, expected, atol=8e-3, rtol=1.6e-2)
        grads = [torch.autograd.grad(x.sum(), leaves) for x in (out, expected)]
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, atol=3e-2, rtol=3e-2)


def test_varlen_gradients():
    q, k, v = (x.detach().flatten(0, 1).requires_grad_() for x in qkv())
    cu = torch.tensor([0, 100, 100, 333, 514], dtype=torch.int32, device=DEVICE)
    outs = [ops.flash_attn_varlen_func(q, k, v, cu, cu, 233, 233, causal=True, backend=b) for b in (None, "reference")]
    torch.testing.assert_close(*outs, atol=8e-3, rtol=1.6e-2)
    dout = torch.randn_like(outs[0])
    grads = [torch.autograd.grad(out, (q, k, v), dout) for out in outs]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("page", [None, 16, 256])
def test_kvcache_append_and_attend(page):
    """Appends with RoPE, in place, then attends; contiguous and paged caches."""
    batch, capacity, new = 3, 512, 2
    generator = torch.Generator(DEVICE).manual_seed(1)
    rand = lambda *s: torch.randn(s, device=DEVICE, generator=generator).to(torch.bfloat16)  # noqa: E731
    q, k, v = rand(batch, new, 8, 64), rand(batch, new, 2, 64), rand(batch, new, 2, 64)
    angles = torch.rand(capacity, 16, device=DEVICE, generator=generator) * 6
    lengths = torch.tensor([0, 77, 300], dtype=torch.int32, device=DEVICE)
    shape, table = (batch, capacity, 2, 64), None
    if page:
        blocks = batch * capacity // page
        shape = (blocks, page, 2, 64)
        table = torch.randperm(blocks, device=DEVICE, dtype=torch.int32).view(batch, -1)
    k_cache, v_cache = rand(*shape), rand(*shape)
    results = []
    for backend in (None, "reference"):
        caches = k_cache.clone(), v_cache.clone()
        out = ops.flash_attn_with_kvcache(
            q, *caches, k, v, rotary_cos=angles.cos().bfloat16(), rotary_sin=angles.sin().bfloat16(),
            cache_seqlens=lengths, block_table=table, causal=True, backend=backend,
        )  # fmt: skip
        results.append((out, *caches))
    torch.testing.assert_close(results[0][0], results[1][0], atol=8e-3, rtol=1.6e-2)
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2])


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # inductor of torch 2.11 warns
def test_compiles_without_a_break():
    leaves = qkv()
    compiled = torch.compile(lambda q, k, v: ops.flash_attn_func(q, k, v, causal=True) * 2, fullgraph=True)
    out = compiled(*leaves)
    torch.testing.assert_close(out, ops.flash_attn_func(*leaves, causal=True) * 2)
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in leaves)


def test_forward_and_backward_in_a_cuda_graph():
    leaves = qkv(grad=True)
    dout = torch.randn(2, 257, 8, 64, device=DEVICE, dtype=torch.bfloat16)

    def step():
        return torch.autograd.grad(ops.flash_attn_func(*leaves, causal=True), leaves, dout)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("backend", ["triton"])
def test_memory_of_forward_and_backward_is_linear(backend):
    """Out, LSE, δ and three gradients: nothing that grows with the square of the length."""
    length, heads, head_dim = 8192, 4, 128
    leaves = qkv(1, length, (heads, heads), head_dim)
    dout = torch.randn(1, length, heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
    torch.autograd.grad(ops.flash_attn_func(*leaves, causal=True, backend=backend), leaves, dout)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(ops.flash_attn_func(*leaves, causal=True, backend=backend), leaves, dout)
    peak = torch.cuda.max_memory_allocated() - before
    needed = 4 * leaves[0].nbytes + 2 * length * heads * 4
    assert peak <= 1.05 * needed, f"{peak} bytes, {needed} needed"
