"""flash-attn's functions: their signatures, shapes and conventions, and how they behave inside torch."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import octavo
from octavo import ops
from octavo.ops import custom_ops, dispatch

COMMON = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic"]
CU_SEQLENS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
SIGNATURES = {  # flash-attn 2.8's positional parameters
    "flash_attn_func": ["q", "k", "v", *COMMON, "return_attn_probs"],
    "flash_attn_qkvpacked_func": ["qkv", *COMMON, "return_attn_probs"],
    "flash_attn_kvpacked_func": ["q", "kv", *COMMON, "return_attn_probs"],
    "flash_attn_varlen_func": ["q", "k", "v", *CU_SEQLENS, *COMMON, "return_attn_probs", "block_table"],
    "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen", *COMMON, "return_attn_probs"],
    "flash_attn_varlen_kvpacked_func": ["q", "kv", *CU_SEQLENS, *COMMON, "return_attn_probs"],
    "flash_attn_with_kvcache": [
        *["q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx"],
        *["cache_leftpad", "block_table", "softmax_scale", "causal", "window_size", "softcap", "rotary_interleaved"],
        *["alibi_slopes", "num_splits", "return_softmax_lse"],
    ],
}


def tensors(*shapes, dtype=torch.float32, grad=False):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype).requires_grad_(grad) for shape in shapes]


@pytest.mark.parametrize("name", SIGNATURES)
def test_parameters_come_in_flash_attns_order(name):
    parameters = inspect.signature(getattr(octavo, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == SIGNATURES[name]


def test_the_issues_example():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    query = torch.randn(32, 64, 8, 128).to(device, dtype=torch.bfloat16)
    output = octavo.flash_attn_func(query, query, query, causal=False)
    assert output.shape == torch.Size([32, 64, 8, 128])


@pytest.mark.parametrize(("sq", "sk", "seen"), [(2, 5, [4, 5]), (5, 2, [0, 0, 0, 1, 2])])
def test_causal_mask_aligns_bottom_right(sq, sk, seen):
    q, k = torch.zeros(1, sq, 1, 8), torch.zeros(1, sk, 1, 8)
    v = torch.eye(sk)[None, :, None]
    out, lse = ops.flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert (out[0, :, 0] > 0).sum(dim=1).tolist() == seen
    torch.testing.assert_close(lse[0, 0], torch.tensor(seen).log())


def test_packed_tensors_are_their_parts_and_gradients_come_back_packed():
    (qkv,) = tensors((2, 7, 3, 4, 16), grad=True)
    out = ops.flash_attn_qkvpacked_func(qkv, causal=True)
    torch.testing.assert_close(out, ops.flash_attn_func(*qkv.unbind(2), causal=True))
    torch.testing.assert_close(out, ops.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True))
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape
    cu_seqlens = torch.tensor([0, 7, 14], dtype=torch.int32)
    flat = qkv.detach().flatten(0, 1)
    varlen = ops.flash_attn_varlen_qkvpacked_func(flat, cu_seqlens, torch.tensor(7), causal=True)
    torch.testing.assert_close(varlen, out.detach().flatten(0, 1))
    q, kv = flat[:, 0], flat[:, 1:]
    varlen = ops.flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens, 7, 7, causal=True)
    torch.testing.assert_close(varlen, out.detach().flatten(0, 1))


def test_attention_weights_and_lse_on_request():
    q, k, v = tensors((2, 5, 4, 8), (2, 5, 4, 8), (2, 5, 4, 8))
    out, lse, weights = ops.flash_attn_func(q, k, v, return_attn_probs=True)
    assert lse.shape == (2, 4, 5)
    assert lse.dtype == torch.float32
    assert weights.numel() == 0
    torch.manual_seed(3)
    out, _, weights = ops.flash_attn_func(q, k, v, dropout_p=0.5, return_attn_probs=True)
    kept = weights.clamp(min=0) / 0.5
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", kept, v))


def test_varlen_over_pages_is_varlen():
    q, k, v = tensors((9, 4, 8), (13, 2, 8), (13, 2, 8))
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 9], [0, 6, 13]))
    expected = ops.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 7, causal=True)
    k_cache, v_cache = torch.full((2, 9, 3, 2, 8), torch.nan)
    table = torch.tensor([[4, 2, 999], [0, 7, 5]], dtype=torch.int32)
    for b, (first, end) in enumerate(((0, 6), (6, 13))):
        positions = torch.arange(end - first)
        slots = table[b].long()[positions // 3] * 3 + positions % 3
        ops.store_kv_cache(k[first:end], v[first:end], k_cache, v_cache, slots)
    out = ops.flash_attn_varlen_func(q, k_cache, v_cache, cu_q, cu_k, 7, 7, causal=True, block_table=table)
    torch.testing.assert_close(out, expected)


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4),
    window=st.tuples(st.integers(-1, 5), st.integers(-1, 5)),
    padding=st.integers(0, 3),
)
def test_varlen_is_each_sequence_alone(lengths, window, padding):
    """Any lengths, zero included; rows of no sequence give 0 and get zero gradients."""
    cu_q, cu_k = (
        torch.tensor([0, *(n[i] for n in lengths)], dtype=torch.int32).cumsum(0, dtype=torch.int32) for i in range(2)
    )
    total_q, total_k = int(cu_q[-1]), int(cu_k[-1])
    q, k, v = tensors((total_q + padding, 4, 8), (total_k + padding, 2, 8), (total_k + padding, 2, 8), grad=True)
    out = ops.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 9, 9, window_size=window)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert not out[total_q:].any()
    assert not any(x[total:].any() for x, total in zip(grads, (total_q, total_k, total_k), strict=True))
    assert all(torch.isfinite(x).all() for x in grads)
    for b in range(len(lengths)):
        rows, keys = slice(int(cu_q[b]), int(cu_q[b + 1])), slice(int(cu_k[b]), int(cu_k[b + 1]))
        alone = ops.flash_attn_func(q[None, rows], k[None, keys], v[None, keys], window_size=window)
        torch.testing.assert_close(out[rows], alone[0])


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "return_lse": True},
        {"window_size": (2, 1), "softcap": 1.5},
        {"dropout_p": 0.3},
        {"learnable_sink": torch.randn(2, dtype=torch.float64, requires_grad=True), "return_lse": True},
        {"attn_bias": torch.randn(1, 2, 1, 4, dtype=torch.float64, requires_grad=True)},
        {"qv": torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_gradcheck(options, backend):
    q, k, v = tensors((1, 3, 2, 2), (1, 4, 1, 2), (1, 4, 1, 3), dtype=torch.float64, grad=True)
    names = [n for n, x in options.items() if isinstance(x, torch.Tensor)]

    def attend(q, k, v, *extras):
        torch.manual_seed(0)
        return ops.flash_attn_func(q, k, v, **options | dict(zip(names, extras, strict=True)), backend=backend)

    inputs = (q, k, v, *(options[n] for n in names))
    assert torch.autograd.gradcheck(attend, inputs)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(attend, inputs)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_gradient_of_a_bias_is_computed_only_where_wanted(wanted):
    q, k, v = tensors(*[(1, 5, 2, 8)] * 3, grad=True)
    bias = torch.randn(1, 2, 5, 5, requires_grad=wanted)
    computed = []

    def watch(op, choice, arguments):
        results = choice.kernel(*arguments)
        computed.extend([results.dbias] if op == "flash_bwd" else [])
        return results

    with dispatch.intercept(watch):
        ops.flash_attn_func(q, k, v, attn_bias=bias).sum().backward()
    assert [dbias is not None for dbias in computed] == [wanted]


def test_double_backward_elsewhere_says_what_to_do():
    q, k, v = tensors((1, 3, 2, 4), (1, 3, 2, 4), (1, 3, 2, 4), grad=True)
    (dq,) = torch.autograd.grad(ops.flash_attn_func(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"use_backend\('reference'\)"):
        dq.sum().backward()


def test_compiles_whole_with_dynamic_shapes_and_fresh_dropout():
    def attend(q, k, v, dropout_p=0.0):
        return ops.flash_attn_func(q, k, v, dropout_p, causal=True, window_size=(3, 0))

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen in (5, 8):
        q, k, v = tensors(*[(2, seqlen, 4, 8)] * 3, grad=True)
        torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))
        expected = torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))
        torch.testing.assert_close(torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v)), expected)
    assert not torch.equal(compiled(q, k, v, 0.5), compiled(q, k, v, 0.5))


def test_exports_with_dynamic_shapes():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return ops.flash_attn_func(q, k, v, causal=True)

    example = tuple(tensors(*[(2, 5, 4, 8)] * 3))
    seqlen = torch.export.Dim("seqlen", min=2, max=64)
    program = torch.export.export(Attention(), example, dynamic_shapes=[{1: seqlen}] * 3)
    longer = tensors(*[(2, 9, 4, 8)] * 3)
    torch.testing.assert_close(program.module()(*longer), ops.flash_attn_func(*longer, causal=True))


def test_custom_ops_keep_torchs_rules():
    q, k, v = tensors((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8), grad=True)
    options = [None] * (len(custom_ops._TENSOR_OPTIONS) + 1) + [5, 7, 0.3, -1, 0, 0.0, 0.0, False, None]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    assert torch.library.opcheck(custom_ops._flash_fwd_op, (q, k, v, *options), test_utils=tests)
    cache = torch.zeros(3, 4, 2, 8)
    slots = torch.tensor([0, 5, 11])
    k = torch.randn(3, 2, 8)
    assert torch.library.opcheck(custom_ops._store_kv_cache_op, (k, k, cache, cache.clone(), slots))


def test_checkpointing_replays_dropout():
    q, k, v = tensors(*[(2, 6, 4, 8)] * 3, grad=True)

    def attend(q, k, v):
        return ops.flash_attn_func(q, k, v, dropout_p=0.4)

    torch.manual_seed(5)
    expected = torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))
    torch.manual_seed(5)
    out = torch.utils.checkpoint.checkpoint(attend, q, k, v, use_reentrant=False)
    torch.manual_seed(99)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (q, k, v)), expected)


def test_autocast_casts_inputs_and_returns_their_gradients_in_fp32():
    q, k, v = tensors(*[(2, 6, 4, 8)] * 3, grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.flash_attn_func(q, k, v)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def test_strides_do_not_matter():
    q, k, v = tensors((4, 2, 8, 6), (1, 1, 2, 8), (2, 16, 6, 2))
    views = (q.permute(1, 3, 0, 2), k.expand(2, 6, 2, 8), v.permute(0, 2, 3, 1)[..., ::2])
    views = tuple(x.requires_grad_() for x in views)
    dense = tuple(x.detach().contiguous().requires_grad_() for x in views)
    out, expected = ops.flash_attn_func(*views, softcap=3.0), ops.flash_attn_func(*dense, softcap=3.0)
    torch.testing.assert_close(out, expected)
    dout = torch.randn(1, 1, 4, 8).expand_as(out)
    torch.testing.assert_close(torch.autograd.grad(out, views, dout), torch.autograd.grad(expected, dense, dout))


def test_unused_rows_and_keys_may_hold_nan():
    q, k, v = tensors((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8))
    used_q, used_k = torch.tensor([3, 5], dtype=torch.int32), torch.tensor([7, 0], dtype=torch.int32)
    expected = ops.flash_attn_func(q[:1, :3], k[:1], v[:1], causal=True)
    q[0, 3:], k[1], v[1] = torch.nan, torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ops.flash_attn_func(*leaves, causal=True, seqused_q=used_q, seqused_k=used_k)
    torch.testing.assert_close(out[:1, :3], expected)
    assert not out[0, 3:].any()
    assert not out[1].any()
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.isfinite(x).all() for x in grads)


@pytest.mark.parametrize("shape", [(0, 5, 4, 8), (2, 0, 4, 8)])
def test_empty_tensors(shape):
    q, k, v = tensors(shape, shape, shape, grad=True)
    out, lse = ops.flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert out.shape == shape
    assert lse.shape == (shape[0], shape[2], shape[1])
    out.sum().backward()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("k: expected shape", {"k": torch.zeros(2, 5, 2, 7)}),
        ("v: expected shape", {"v": torch.zeros(2, 4, 2, 8)}),
        ("k: expected a number of heads that divides", {"k": torch.zeros(2, 5, 3, 8), "v": torch.zeros(2, 5, 3, 8)}),
        ("k: expected torch.float32", {"k": torch.zeros(2, 5, 2, 8, dtype=torch.bfloat16)}),
        ("dropout_p", {"dropout_p": 1.0}),
        ("softcap", {"softcap": -1.0}),
        ("window_size", {"window_size": (1, 2, 3)}),
        ("alibi_slopes: expected shape", {"alibi_slopes": torch.zeros(3)}),
        ("alibi_slopes: expected no requires_grad", {"alibi_slopes": torch.zeros(4, requires_grad=True)}),
        ("attn_bias: expected a shape", {"attn_bias": torch.zeros(2, 4, 5, 6)}),
        ("attn_bias: expected a float", {"attn_bias": torch.zeros(5, 5, dtype=torch.bool)}),
        ("learnable_sink", {"learnable_sink": torch.zeros(2)}),
        ("seqused_k: expected dtype torch.int32", {"seqused_k": torch.tensor([1, 2])}),
        ("qv: expected shape", {"qv": torch.zeros(2, 5, 4, 7)}),
        ("backend: expected one of", {"backend": "cuda"}),
    ],
)
def test_mistakes_name_the_argument(message, change):
    q, k, v = tensors((2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8))
    with pytest.raises(ValueError, match=message):
        ops.flash_attn_func(**{"q": q, "k": k, "v": v} | change)


def test_cu_seqlens_that_lie_are_refused():
    q, k, v = tensors((4, 4, 8), (4, 2, 8), (4, 2, 8))
    good, long = (torch.tensor(x, dtype=torch.int32) for x in ([0, 4], [0, 5]))
    with pytest.raises(ValueError, match="cu_seqlens: expected prefix sums"):
        ops.flash_attn_varlen_func(q, k, v, good, long, 4, 5, causal=True)
