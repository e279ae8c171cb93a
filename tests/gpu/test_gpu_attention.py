"""The GPU backends against the reference, by the error rule: at most twice the error of plain torch in the same dtype
(three times for gradients, softcap and ALiBi), over head sizes, lengths, options and layouts.

Run on a machine with a GPU: `scripts/test_gpu`.
"""

import importlib
from dataclasses import replace

import pytest
import torch

from octavo.kernels.reference import masks, packing
from octavo.kernels.reference.flash_bwd import flash_bwd as reference_bwd
from octavo.kernels.reference.flash_fwd import flash_fwd as reference_fwd
from octavo.kernels.reference.mla_decode import mla_decode as reference_mla
from octavo.kernels.reference.paged_attention import paged_attention as reference_paged
from octavo.kernels.spec import AttentionSpec, AttentionTensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: none here"),
    # torch says so when a backward's thread makes the first matmul of the process
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]
BACKENDS = ["triton", "hopper"]
portable = pytest.mark.parametrize("backend", ["triton"])  # Hopper's paged kernels have tests of their own
DEVICE = "cuda"
NO_TENSORS = AttentionTensors()


def kernel(backend, module, op, *arguments):
    """The backend's function, or a skip that says why it cannot take the call."""
    try:
        loaded = importlib.import_module(f"octavo.kernels.{backend}.{module}")
    except ModuleNotFoundError:
        pytest.skip(f"{backend} has no {module}")
    reason = getattr(loaded, f"refuses_{op}")(*arguments)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return getattr(loaded, op)


def randn(*shape, dtype, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed + sum(shape))
    return torch.randn(shape, device=DEVICE, dtype=torch.float32, generator=generator).to(dtype)


def plain_attention(q, k, v, spec, t):
    """Attention as one would write it in torch, in the dtype of its inputs; dense."""
    batch, sq, heads, _ = q.shape
    sk = k.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q * spec.softmax_scale, k)
    if t.qv is not None:
        s = s + torch.einsum("bihd,bjhd->bhij", t.qv * spec.softmax_scale, v)
    if spec.softcap:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    lengths_q = torch.full((batch,), sq, device=q.device) if t.seqused_q is None else t.seqused_q
    lengths_k = torch.full((batch,), sk, device=q.device) if t.seqused_k is None else t.seqused_k
    diagonal = masks.offsets_from_diagonal(lengths_q, lengths_k, sq, sk)
    if t.alibi_slopes is not None:
        s = s + masks.alibi(t.alibi_slopes, diagonal).to(s.dtype)
    if t.attn_bias is not None:
        s = s + t.attn_bias.to(s.dtype)
    seen = masks.visible(spec, diagonal, packing.used(lengths_q, sq), packing.used(lengths_k, sk, t.leftpad_k))
    s = s.masked_fill(~seen, -torch.inf)
    if t.learnable_sink is not None:
        s = torch.cat([s, t.learnable_sink.to(s.dtype)[None, :, None, None].expand(batch, -1, sq, 1)], dim=-1)
    p = torch.softmax(s, dim=-1).nan_to_num(0.0)[..., :sk]
    return torch.einsum("bhij,bjhd->bihd", p, v)


def assert_close(name, ours, reference, plain, times, floor=2e-5):
    """max |ours − reference| is at most `times` max |plain − reference|; `floor` is for errors of nearly nothing."""
    assert torch.isfinite(ours).all(), f"{name} is not finite"
    error = (ours.float() - reference).abs().max().item()
    allowed = times * (plain.float() - reference).abs().max().item() + floor
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_lse_close(ours, reference):
    dead = torch.isneginf(reference)
    assert torch.equal(torch.isneginf(ours), dead)
    torch.testing.assert_close(ours[~dead], reference[~dead], atol=2e-4, rtol=2e-5)


def check(backend, q, k, v, spec, t=NO_TENSORS, dlse=False, times=2, backward=True):
    """Forward, LSE and every gradient of a dense call."""
    fwd = kernel(backend, "flash_fwd", "flash_fwd", q, k, v, spec, t)
    out, lse = fwd(q, k, v, spec, t)
    up = replace(t, qv=None if t.qv is None else t.qv.float())
    expected, expected_lse = reference_fwd(q.float(), k.float(), v.float(), spec, up)
    extras = [x for x in (t.qv, t.learnable_sink, t.attn_bias) if x is not None]
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, *extras)]
    names = [n for n in ("qv", "learnable_sink", "attn_bias") if getattr(t, n) is not None]
    plain = plain_attention(*leaves[:3], spec, replace(t, **dict(zip(names, leaves[3:], strict=True))))
    assert_close("out", out, expected, plain, times)
    assert_lse_close(lse, expected_lse)
    if not backward:
        return
    dout = randn(*out.shape, dtype=q.dtype, seed=9)
    grad_lse = randn(*lse.shape, dtype=torch.float32, seed=10) if dlse else None
    arguments = (dout, q, k, v, out, lse, spec, t, grad_lse)
    bwd = kernel(backend, "flash_bwd", "flash_bwd", *arguments)
    ours = bwd(*arguments)
    wanted = reference_bwd(dout.float(), q.float(), k.float(), v.float(), expected, expected_lse, spec, up, grad_lse)
    if t.seqused_q is not None:
        dout = dout * packing.used(t.seqused_q, q.shape[1])[:, :, None, None]
    grads = torch.autograd.grad(plain, leaves, dout)
    by_name = dict(
        zip(
            ["dq", "dk", "dv", *({"qv": "dqv", "learnable_sink": "dsink", "attn_bias": "dbias"}[n] for n in names)],
            grads,
            strict=True,
        )
    )
    for name, got, want in zip(ours._fields, ours, wanted, strict=True):
        assert (got is None) == (want is None), name
        if got is not None:
            # plain torch has no gradient through the LSE: then its error is only a lower bound of what is fair
            assert_close(
                name,
                got,
                want,
                want + (by_name[name].float() - wanted_without_lse(name, want, arguments, up, dlse)),
                3,
                1e-4,
            )
    if backend == "hopper" and not spec.deterministic:  # its sums of dq come in any order
        return
    again = bwd(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True) if a is not None), (
        "gradients differ between runs"
    )


def wanted_without_lse(name, want, arguments, up, dlse):
    """The reference gradient of the output alone, which is what plain torch computed."""
    if not dlse:
        return want
    dout, q, k, v, out, lse, spec, _, _ = arguments
    return getattr(reference_bwd(dout.float(), q.float(), k.float(), v.float(), out.float(), lse, spec, up), name)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


# every kernel is compiled for each head size, mask and dtype, which is what the time goes to: not all triples
@pytest.mark.parametrize(("causal", "dtype"), [(False, torch.bfloat16), (True, torch.float16)])
@pytest.mark.parametrize("head_dim", [8, 40, 64, 96, 128, 160, 192, 256])
def test_head_dims(backend, head_dim, causal, dtype):
    spec = AttentionSpec(head_dim**-0.5, window_right=0 if causal else -1)
    q, k, v = (randn(2, s, h, head_dim, dtype=dtype, seed=i) for i, (s, h) in enumerate([(257, 6), (521, 2), (521, 2)]))
    check(backend, q, k, v, spec)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 977), (113, 203), (512, 512), (1024, 1024), (799, 113), (640, 1280)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lengths(backend, head_dim, lengths):
    sq, sk = lengths
    q = randn(2, sq, 4, head_dim, dtype=torch.bfloat16)
    k, v = (randn(2, sk, 2, head_dim, dtype=torch.bfloat16, seed=s) for s in (1, 2))
    for right in (-1, 0):
        check(backend, q, k, v, AttentionSpec(head_dim**-0.5, window_right=right))


@pytest.mark.parametrize("dims", [(192, 128), (64, 512), (64, 128), (128, 64), (40, 24)])
def test_value_head_dim_differs(backend, dims):
    d, dv = dims
    q, k = randn(2, 200, 4, d, dtype=torch.bfloat16), randn(2, 331, 4, d, dtype=torch.bfloat16, seed=1)
    check(backend, q, k, randn(2, 331, 4, dv, dtype=torch.bfloat16, seed=2), AttentionSpec(d**-0.5, window_right=0))


def test_float32(backend):
    q, k, v = (randn(2, s, 4, 64, dtype=torch.float32, seed=s) for s in (129, 300, 300))
    check(backend, q, k, v, AttentionSpec(0.125, window_right=0), times=3)


OPTIONS = {
    "window": ({"window_left": 100, "window_right": 30}, ()),
    "causal window": ({"window_left": 64, "window_right": 0}, ()),
    "softcap": ({"softcap": 15.0}, ()),
    "alibi": ({"window_right": 0}, ("alibi_slopes",)),
    "sink": ({"window_right": 0}, ("learnable_sink",)),
    "bias": ({}, ("attn_bias",)),
    "causal bias": ({"window_right": 0}, ("attn_bias",)),
    "qv": ({"window_right": 0}, ("qv",)),
    "used": ({"window_right": 0}, ("seqused_q", "seqused_k", "leftpad_k")),
    "all": (
        {"window_left": 150, "window_right": 0, "softcap": 20.0},
        ("alibi_slopes", "learnable_sink", "attn_bias", "seqused_k"),
    ),
}


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
@pytest.mark.parametrize("option", OPTIONS)
def test_options(backend, option, head_dim, dtype):
    scalars, tensors = OPTIONS[option]
    available = {
        "alibi_slopes": torch.rand(2, 4, device=DEVICE) * 0.3,
        "learnable_sink": randn(4, dtype=torch.float32),
        "attn_bias": randn(1, 4, 190, 301, dtype=dtype, seed=5),
        "qv": randn(2, 190, 4, head_dim, dtype=dtype, seed=6),
        "seqused_q": torch.tensor([190, 77], dtype=torch.int32, device=DEVICE),
        "seqused_k": torch.tensor([301, 120], dtype=torch.int32, device=DEVICE),
        "leftpad_k": torch.tensor([0, 33], dtype=torch.int32, device=DEVICE),
    }
    q = randn(2, 190, 4, head_dim, dtype=dtype)
    k, v = (randn(2, 301, 2, head_dim, dtype=dtype, seed=s) for s in (1, 2))
    t = AttentionTensors(**{name: available[name] for name in tensors})
    times = 3 if scalars.get("softcap") or "alibi_slopes" in tensors else 2
    check(backend, q, k, v, AttentionSpec(head_dim**-0.5, **scalars), t, dlse=option in ("sink", "window"), times=times)


@pytest.mark.parametrize("longest", [0, 300_000], ids=["", "offsets beyond 32 bits"])
def test_dropout_draws_the_reference_mask(backend, longest):
    """No rule for the error of plain torch here, whose mask differs; fp16 output within its rounding.

    A longest sequence of 3·10⁵ puts the Philox offsets of every head but the first above 2³².
    """
    spec = AttentionSpec(0.125, window_right=0, dropout_p=0.3)
    t = AttentionTensors(dropout_seed=2**40 + 7, max_seqlen_q=longest, max_seqlen_k=longest)
    q, k, v = (randn(2, s, 4, 64, dtype=torch.float16, seed=s) for s in (150, 333, 333))
    out, lse = kernel(backend, "flash_fwd", "flash_fwd", q, k, v, spec, t)(q, k, v, spec, t)
    expected, expected_lse = reference_fwd(q.float(), k.float(), v.float(), spec, t)
    torch.testing.assert_close(out.float(), expected, atol=4e-3, rtol=4e-3)
    assert_lse_close(lse, expected_lse)
    dout = randn(*out.shape, dtype=torch.float16, seed=4)
    arguments = (dout, q, k, v, out, lse, spec, t)
    ours = kernel(backend, "flash_bwd", "flash_bwd", *arguments)(*arguments)
    wanted = reference_bwd(dout.float(), q.float(), k.float(), v.float(), expected, expected_lse, spec, t)
    for got, want in zip(ours[:3], wanted[:3], strict=True):
        torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(64, 64), (128, 128), (192, 128)])
@pytest.mark.parametrize("causal", [False, True])
def test_varlen(backend, head_dim, head_dim_v, causal):
    """Packed sequences equal the same sequences one at a time; rows of no sequence are NaN and give 0 and −inf."""
    lengths = [(128, 128), (0, 50), (333, 333), (1, 700), (17, 5), (60, 0)]
    starts = torch.tensor([[0, 0], *lengths], dtype=torch.int32, device=DEVICE).cumsum(0).to(torch.int32)
    cu_q, cu_k = starts[:, 0].contiguous(), starts[:, 1].contiguous()
    total_q, total_k = int(cu_q[-1]), int(cu_k[-1])
    q = randn(total_q + 9, 4, head_dim, dtype=torch.bfloat16)
    k, v = (randn(total_k + 5, 2, d, dtype=torch.bfloat16, seed=s) for s, d in ((1, head_dim), (2, head_dim_v)))
    for x, total in ((q, total_q), (k, total_k), (v, total_k)):
        x[total:] = torch.nan
    spec = AttentionSpec(head_dim**-0.5, window_right=0 if causal else -1)
    t = AttentionTensors(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=333, max_seqlen_k=700)
    fwd = kernel(backend, "flash_fwd", "flash_fwd", q, k, v, spec, t)
    out, lse = fwd(q, k, v, spec, t)
    dout = randn(*out.shape, dtype=q.dtype, seed=3)
    dout[total_q:] = torch.nan
    arguments = (dout, q, k, v, out, lse, spec, t)
    grads = kernel(backend, "flash_bwd", "flash_bwd", *arguments)(*arguments)
    for x, total in ((out, total_q), (grads.dq, total_q), (grads.dk, total_k), (grads.dv, total_k)):
        assert (x[total:] == 0).all()
    assert torch.isneginf(lse[:, total_q:]).all()
    for b, (sq, sk) in enumerate(lengths):
        rows, keys = slice(int(cu_q[b]), int(cu_q[b + 1])), slice(int(cu_k[b]), int(cu_k[b + 1]))
        if sq == 0 or sk == 0:
            assert (out[rows] == 0).all()
            assert (grads.dk[keys] == 0).all()
            continue
        one = [x[part][None].detach().requires_grad_() for x, part in ((q, rows), (k, keys), (v, keys))]
        upcast = [x.detach().float() for x in one]
        expected, expected_lse = reference_fwd(*upcast, spec, AttentionTensors())
        plain = plain_attention(*one, spec, AttentionTensors())
        assert_close("out", out[rows][None], expected, plain, 2)
        assert_lse_close(lse[:, rows][None], expected_lse)
        wanted = reference_bwd(dout[rows][None].float(), *upcast, expected, expected_lse, spec, AttentionTensors())
        theirs = torch.autograd.grad(plain, one, dout[rows][None])
        for name, part in (("dq", rows), ("dk", keys), ("dv", keys)):
            at = grads._fields.index(name)
            assert_close(name, grads[at][part][None], wanted[at], theirs[at], 3, 1e-4)


def paged_case(lengths, max_blocks, page, heads, head_dim, dtype):
    """Caches whose unused blocks and slots are NaN, and a table whose unused entries point far outside."""
    batch = len(lengths)
    blocks = sum(-(-n // page) for n in lengths) + 3
    order = torch.randperm(blocks, device=DEVICE, dtype=torch.int32)
    table = torch.full((batch, max_blocks), 2**30, dtype=torch.int32, device=DEVICE)
    k_cache, v_cache = (
        torch.full((blocks, page, heads, head_dim), torch.nan, dtype=dtype, device=DEVICE) for _ in "kv"
    )
    used = 0
    for b, length in enumerate(lengths):
        count = -(-length // page)
        table[b, :count] = order[used : used + count]
        used += count
        for i in range(count):
            n = min(page, length - i * page)
            k_cache[table[b, i], :n] = randn(n, heads, head_dim, dtype=dtype, seed=b * 1000 + i)
            v_cache[table[b, i], :n] = randn(n, heads, head_dim, dtype=dtype, seed=b * 1000 + i + 500)
    return k_cache, v_cache, table


@portable
@pytest.mark.parametrize(
    ("page", "num_splits"), [(1, 0), (16, 0), (24, 0), (64, 0), (256, 0), (1, 5), (16, 1), (16, 5), (64, 5)]
)
@pytest.mark.parametrize("heads", [(32, 8), (6, 2), (4, 4)])
def test_paged_decode(backend, heads, page, num_splits):
    lengths = [1, 700, 16, 1024, 333]
    head_dim = 128 if heads[0] == 32 else 64
    k_cache, v_cache, table = paged_case(lengths, 2000 // page + 1, page, heads[1], head_dim, torch.bfloat16)
    t = AttentionTensors(
        max_seqlen_q=1, max_seqlen_k=2000, block_table=table,
        seqused_k=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        cu_seqlens_q=torch.arange(len(lengths) + 1, dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    q = randn(len(lengths), heads[0], head_dim, dtype=torch.bfloat16)
    for scalars in ({}, {"window_left": 200}, {"softcap": 10.0}) if page == 16 else ({},):  # each is compiled
        spec = AttentionSpec(head_dim**-0.5, window_right=0, **scalars)
        decode = kernel(backend, "paged_attention", "paged_attention", q, k_cache, v_cache, spec, t, num_splits)
        out, lse = decode(q, k_cache, v_cache, spec, t, num_splits)
        expected, expected_lse = reference_paged(q.float(), k_cache.float(), v_cache.float(), spec, t)
        torch.testing.assert_close(out.float(), expected, atol=8e-3, rtol=2.01 / 128)
        assert_lse_close(lse, expected_lse)


@portable
@pytest.mark.parametrize("page", [16, 64])
def test_paged_chunks_of_all_sizes(backend, page):
    """Decode rows and prompt chunks in one batch, sinks too."""
    queries, lengths = [1, 40, 300, 1, 7], [900, 40, 512, 3, 640]
    k_cache, v_cache, table = paged_case(lengths, 64, page, 2, 128, torch.bfloat16)
    cu = torch.tensor([0, *queries], device=DEVICE).cumsum(0).to(torch.int32)
    sink = randn(8, dtype=torch.float32)
    q = randn(sum(queries), 8, 128, dtype=torch.bfloat16)
    t = AttentionTensors(
        cu_seqlens_q=cu, max_seqlen_q=300, max_seqlen_k=900, block_table=table, learnable_sink=sink,
        seqused_k=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    spec = AttentionSpec(128**-0.5, window_right=0)
    decode = kernel(backend, "paged_attention", "paged_attention", q, k_cache, v_cache, spec, t, 0)
    out, lse = decode(q, k_cache, v_cache, spec, t)
    expected, expected_lse = reference_paged(q.float(), k_cache.float(), v_cache.float(), spec, t)
    torch.testing.assert_close(out.float(), expected, atol=8e-3, rtol=2.01 / 128)
    assert_lse_close(lse, expected_lse)


@portable
def test_paged_decode_in_a_cuda_graph(backend):
    """One graph, replayed after the lengths, the table and the caches have changed under it."""
    lengths = [200, 900, 64]
    k_cache, v_cache, table = paged_case(lengths, 64, 16, 2, 128, torch.bfloat16)
    seqused = torch.tensor([10, 12, 9], dtype=torch.int32, device=DEVICE)
    t = AttentionTensors(
        cu_seqlens_q=torch.arange(4, dtype=torch.int32, device=DEVICE), max_seqlen_q=1, max_seqlen_k=1024,
        block_table=table, seqused_k=seqused,
    )  # fmt: skip
    spec = AttentionSpec(128**-0.5, window_right=0)
    q = randn(3, 8, 128, dtype=torch.bfloat16)
    decode = kernel(backend, "paged_attention", "paged_attention", q, k_cache, v_cache, spec, t, 0)
    decode(q, k_cache, v_cache, spec, t)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = decode(q, k_cache, v_cache, spec, t)
    seqused.copy_(torch.tensor(lengths))
    graph.replay()
    expected, _ = reference_paged(q.float(), k_cache.float(), v_cache.float(), spec, t)
    torch.testing.assert_close(out.float(), expected, atol=8e-3, rtol=2.01 / 128)


@pytest.mark.parametrize("heads", [1, 16, 64, pytest.param(128, marks=pytest.mark.xdist_group("large"))])
@pytest.mark.parametrize("page", [1, 64])
@pytest.mark.parametrize("queries", [1, 2])
def test_mla_decode(backend, heads, page, queries):
    """FlashMLA's own tolerances: abs 8e-4 or rel 2.01/128 here on outputs of size 1, so abs 8e-3."""
    lengths = [2, 700, 64, 1500] if heads < 128 else [2, 250, 64, 500]  # the reference has a copy for each head
    cache, _, table = paged_case(lengths, 1600 // page + 1, page, 1, 576, torch.bfloat16)
    cache = cache[:, :, 0]
    q = randn(len(lengths) * queries, heads, 576, dtype=torch.bfloat16)
    t = AttentionTensors(
        cu_seqlens_q=torch.arange(len(lengths) + 1, dtype=torch.int32, device=DEVICE) * queries, max_seqlen_q=queries,
        max_seqlen_k=1600, block_table=table, seqused_k=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    spec = AttentionSpec(192**-0.5, window_right=0)
    decode = kernel(backend, "mla_decode", "mla_decode", q, cache, 512, spec, t, 0)
    out, lse = decode(q, cache, 512, spec, t)
    expected, expected_lse = reference_mla(q.float(), cache.float(), 512, spec, t)
    torch.testing.assert_close(out.float(), expected, atol=8e-3, rtol=2.01 / 128)
    assert_lse_close(lse, expected_lse)


@pytest.mark.xdist_group("large")  # 19 GB
def test_more_than_2_31_elements(backend):
    """Offsets are 64-bit: the last rows of tensors of 2.3e9 elements."""
    length = 560_000
    q, k, v = (torch.zeros(1, length, 32, 128, dtype=torch.bfloat16, device=DEVICE) for _ in "qkv")
    for x, seed in ((q, 1), (k, 2), (v, 3)):
        x[:, -200:] = randn(1, 200, 32, 128, dtype=torch.bfloat16, seed=seed)
    spec = AttentionSpec(128**-0.5, window_left=150, window_right=0)
    out, lse = kernel(backend, "flash_fwd", "flash_fwd", q, k, v, spec, AttentionTensors())(
        q, k, v, spec, AttentionTensors()
    )
    tail = [x[:, -200:].float() for x in (q, k, v)]
    expected, expected_lse = reference_fwd(*tail, spec, AttentionTensors())
    torch.testing.assert_close(out[:, -40:].float(), expected[:, -40:], atol=8e-3, rtol=2.01 / 128)
    assert_lse_close(lse[:, :, -40:], expected_lse[:, :, -40:])


@pytest.mark.parametrize("kind", ["transposed", "expanded", "qkv slice", "last axis strided"])
def test_layouts(backend, kind):
    """Strided inputs give what their contiguous copies give, bit for bit."""
    shape = (2, 320, 4, 64)
    if kind == "transposed":
        q, k, v = (randn(2, 4, 320, 64, dtype=torch.bfloat16, seed=s).transpose(1, 2) for s in range(3))
    elif kind == "expanded":
        q = randn(*shape, dtype=torch.bfloat16)
        k, v = (randn(1, 320, 1, 64, dtype=torch.bfloat16, seed=s).expand(shape) for s in (1, 2))
    elif kind == "qkv slice":
        q, k, v = randn(2, 320, 3, 4, 64, dtype=torch.bfloat16).unbind(2)
    else:
        q, k, v = (randn(2, 320, 4, 128, dtype=torch.bfloat16, seed=s)[..., ::2] for s in range(3))
    spec, t = AttentionSpec(0.125, window_right=0), AttentionTensors()
    fwd = kernel(backend, "flash_fwd", "flash_fwd", q, k, v, spec, t)
    out, lse = fwd(q, k, v, spec, t)
    same, same_lse = fwd(q.contiguous(), k.contiguous(), v.contiguous(), spec, t)
    assert torch.equal(out, same)
    assert torch.equal(lse, same_lse)
    dout = randn(*shape, dtype=torch.bfloat16, seed=5)
    bwd = kernel(backend, "flash_bwd", "flash_bwd", dout, q, k, v, out, lse, spec, t)
    ours = bwd(dout, q, k, v, out, lse, spec, t)
    again = bwd(dout, q.contiguous(), k.contiguous(), v.contiguous(), out, lse, spec, t)
    assert all(torch.equal(a, b) for a, b in zip(ours[:3], again[:3], strict=True))
