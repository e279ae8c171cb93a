"""The Triton kernels, interpreted, against the reference: every option, forward, LSE and gradients, in fp32 and fp16.

bf16 is left to the GPU suite: the interpreter rounds it wrongly.
"""

import itertools
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import octavo
from octavo.kernels.reference.flash_bwd import flash_bwd as reference_bwd
from octavo.kernels.reference.flash_fwd import flash_fwd as reference_fwd
from octavo.kernels.spec import AttentionSpec, AttentionTensors
from octavo.kernels.triton import flash_bwd as bwd_module
from octavo.kernels.triton import flash_fwd as fwd_module
from octavo.kernels.triton.flash_bwd import flash_bwd, refuses_flash_bwd
from octavo.kernels.triton.flash_fwd import flash_fwd, refuses_flash_fwd
from octavo.kernels.triton.tiles import BackwardTiles, Tile

# absolute errors of values of size about 1: fp32 within its rounding, fp16 within that of P and of the output
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3}
B, SQ, SK, HQ, HKV, D, DV = 2, 33, 75, 4, 2, 24, 40


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def dense(dtype, sq=SQ, sk=SK):
    return (
        randn(B, sq, HQ, D, dtype=dtype),
        randn(B, sk, HKV, D, dtype=dtype, seed=1),
        randn(B, sk, HKV, DV, dtype=dtype, seed=2),
    )


def assert_forward_and_gradients(q, k, v, spec, t=None, dlse=False):
    """Everything finite, close to the reference, and −inf where it says −inf."""
    t = AttentionTensors() if t is None else t
    tolerance = TOLERANCE[q.dtype]
    assert refuses_flash_fwd(q, k, v, spec, t) is None
    out, lse = flash_fwd(q, k, v, spec, t)
    up = replace(t, qv=None if t.qv is None else t.qv.float())
    expected, expected_lse = reference_fwd(q.float(), k.float(), v.float(), spec, up)
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    dout = randn(*out.shape, dtype=q.dtype, seed=3)
    grad_lse = randn(*lse.shape, seed=4) if dlse else None
    arguments = (dout, q, k, v, out, lse, spec, t, grad_lse)
    assert refuses_flash_bwd(*arguments) is None
    ours = flash_bwd(*arguments)
    wanted = reference_bwd(dout.float(), q.float(), k.float(), v.float(), expected, lse, spec, up, grad_lse)
    for name, got, want in zip(ours._fields, ours, wanted, strict=True):
        assert (got is None) == (want is None), name
        if got is not None:
            size = 1 + (want.abs().max().item() if want.numel() else 0)
            torch.testing.assert_close(
                got.float(), want, atol=tolerance * size, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


TENSORS = {
    "alibi_slopes": torch.tensor([[0.1, 0.5, 0.02, 0.9], [0.3, 0.0, 0.25, 0.01]]),
    "learnable_sink": torch.tensor([0.5, -1.0, 2.0, 0.0]),
    "attn_bias": randn(1, HQ, SQ, SK, seed=5),
    "qv": randn(B, SQ, HQ, DV, seed=6),
    "seqused_q": torch.tensor([33, 20], dtype=torch.int32),
    "seqused_k": torch.tensor([75, 9], dtype=torch.int32),
    "leftpad_k": torch.tensor([40, 3], dtype=torch.int32),
    "dropout_seed": 2**35 + 11,
}
OPTIONS = {
    "none": {},
    "causal": {"window_right": 0},
    "window": {"window_left": 20, "window_right": 3},
    "causal window": {"window_left": 10, "window_right": 0},
    "softcap": {"softcap": 2.0},
    "dropout": {"dropout_p": 0.3, "dropout_seed": None},
    "alibi": {"alibi_slopes": None},
    "sink": {"learnable_sink": None},
    "bias": {"attn_bias": None},
    "qv": {"qv": None},
    "used rows": {"seqused_q": None},
    "used keys": {"seqused_k": None},
    "leftpad": {"leftpad_k": None},
}
SPEC_FIELDS = {f.name for f in fields(AttentionSpec)}


def options_call(names, dtype):
    """The spec and tensors that turn on the named options together."""
    chosen = {key: value for name in names for key, value in OPTIONS[name].items()}
    scalars = {key: value for key, value in chosen.items() if key in SPEC_FIELDS}
    tensors = {key: TENSORS[key] for key in chosen if key not in SPEC_FIELDS}
    if "qv" in tensors:
        tensors["qv"] = tensors["qv"].to(dtype)
    return AttentionSpec(D**-0.5, **scalars), AttentionTensors(**tensors)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option(option, dtype):
    spec, t = options_call([option], dtype)
    assert_forward_and_gradients(*dense(dtype), spec, t, dlse=True)


WINDOWS = {"causal", "window", "causal window"}
PAIRS = [
    pair
    for pair in itertools.combinations(list(OPTIONS)[1:], 2)
    # one window at a time; the interpreter's Philox is slow: dropout meets three others here, and all in the next test
    if not set(pair) <= WINDOWS and ("dropout" not in pair or set(pair) & {"causal", "sink", "bias"})
]


@pytest.mark.parametrize("pair", PAIRS, ids=" + ".join)
def test_each_pair_of_options(pair):
    spec, t = options_call(pair, torch.float32)
    assert_forward_and_gradients(*dense(torch.float32), spec, t)


def test_all_options_at_once():
    spec, t = options_call([name for name in OPTIONS if name not in ("causal", "window")], torch.float32)
    assert_forward_and_gradients(*dense(torch.float32), spec, t, dlse=True)


@pytest.mark.parametrize("dims", [(59, 59), (40, 111)], ids=str)
def test_ops_pads_head_dims_that_the_kernels_do_not_take(dims):
    q, k, v = (randn(2, s, 2, d, seed=s).requires_grad_() for s, d in ((33, dims[0]), (75, dims[0]), (75, dims[1])))
    results = []
    for backend in ("triton", "reference"):
        out, lse = octavo.flash_attn_func(q, k, v, causal=True, return_lse=True, backend=backend)
        results.append((out, lse, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_dropout_at_offsets_beyond_32_bits():
    """A longest sequence of 3·10⁵ puts the Philox offsets of every head but the first above 2³²."""
    spec = AttentionSpec(0.2, window_right=0, dropout_p=0.3)
    t = AttentionTensors(dropout_seed=2**35 + 11, max_seqlen_q=300_000, max_seqlen_k=300_000)
    assert_forward_and_gradients(*dense(torch.float32), spec, t)


def test_a_bias_whose_gradient_nobody_wants_gets_none():
    q, k, v = dense(torch.float32)
    spec, t = AttentionSpec(0.2, wants_dbias=False), AttentionTensors(attn_bias=TENSORS["attn_bias"])
    grads = flash_bwd(q.new_ones(B, SQ, HQ, DV), q, k, v, *flash_fwd(q, k, v, spec, t), spec, t)
    assert grads.dbias is None


@pytest.mark.parametrize("shape", [(B, 1, 1, SK), (SQ, SK), (1, 1, SQ, 1), (B, HQ, 1, 1), (1, HQ, SQ, SK)], ids=str)
def test_bias_gradient_has_the_shape_of_the_bias(shape):
    t = AttentionTensors(attn_bias=randn(*shape, seed=8))
    assert_forward_and_gradients(*dense(torch.float32), AttentionSpec(0.2, window_right=0, softcap=3.0), t)


def test_a_bias_of_minus_infinity_hides_keys():
    bias = torch.zeros(B, 1, SQ, SK)
    bias[0, :, 5] = -torch.inf
    bias[1, :, :, 40:] = -torch.inf
    out, lse = flash_fwd(*dense(torch.float32), AttentionSpec(0.2), AttentionTensors(attn_bias=bias))
    assert (out[0, 5] == 0).all()
    assert torch.isneginf(lse[0, :, 5]).all()
    assert_forward_and_gradients(*dense(torch.float32), AttentionSpec(0.2), AttentionTensors(attn_bias=bias))


@pytest.mark.parametrize("sizes", [(1, 1), (1, 150), (90, 20), (64, 64), (130, 131), (5, 0)], ids=str)
@pytest.mark.parametrize("right", [-1, 0])
def test_lengths(sizes, right):
    assert_forward_and_gradients(*dense(torch.float32, *sizes), AttentionSpec(0.2, window_right=right))


@pytest.mark.parametrize("dims", [(8, 8), (64, 64), (96, 96), (192, 128), (64, 256), (256, 40)], ids=str)
def test_head_dims(dims):
    d, dv = dims
    q, k, v = randn(1, 40, 2, d), randn(1, 70, 1, d, seed=1), randn(1, 70, 1, dv, seed=2)
    assert_forward_and_gradients(q, k, v, AttentionSpec(d**-0.5, window_right=0))


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70)), min_size=1, max_size=4),
    right=st.sampled_from([-1, 0]),
    padding=st.integers(0, 3),
)
def test_packed_sequences_equal_the_padded_reference(lengths, right, padding):
    """Zero lengths included; tokens past the last sequence are NaN and give 0, −inf and zero gradients."""
    cu_q, cu_k = (
        torch.tensor([0, *x], dtype=torch.int32).cumsum(0).to(torch.int32) for x in zip(*lengths, strict=True)
    )
    total_q, total_k = int(cu_q[-1]), int(cu_k[-1])
    q = randn(total_q + padding, HQ, D)
    k, v = randn(total_k + padding, HKV, D, seed=1), randn(total_k + padding, HKV, DV, seed=2)
    t = AttentionTensors(
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max(a for a, _ in lengths),
        max_seqlen_k=max(b for _, b in lengths),
    )
    if padding:
        q[total_q:], k[total_k:], v[total_k:] = torch.nan, torch.nan, torch.nan
    spec = AttentionSpec(0.2, window_right=right)
    out, lse = flash_fwd(q, k, v, spec, t)
    expected, expected_lse = reference_fwd(q, k, v, spec, t)
    torch.testing.assert_close(out, expected, atol=5e-6, rtol=5e-6)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    dout = randn(*out.shape, seed=3)
    wanted = reference_bwd(dout, q, k, v, expected, expected_lse, spec, t)
    dout[total_q:] = torch.nan
    for got, want in zip(flash_bwd(dout, q, k, v, out, lse, spec, t)[:3], wanted[:3], strict=True):
        torch.testing.assert_close(got, want.nan_to_num(0.0), atol=5e-5, rtol=5e-5)


def test_gradients_repeat_bit_for_bit():
    q, k, v = dense(torch.float16)
    spec, t = AttentionSpec(0.2, window_right=0), AttentionTensors()
    out, lse = flash_fwd(q, k, v, spec, t)
    first, second = (flash_bwd(out, q, k, v, out, lse, spec, t) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


def test_tensor_descriptors_change_no_bit(monkeypatch):
    """The tiles that sm_90 reads by TMA are those that pointers read, of dense, packed and sliced tensors."""
    q, k, v = randn(2, 150, 3, 2, 64, dtype=torch.float16).unbind(2)
    packed = torch.tensor([0, 100, 150], dtype=torch.int32)
    calls = [
        (q, k, v, AttentionTensors()),
        (
            q[0],
            k[0],
            v[0],
            AttentionTensors(cu_seqlens_q=packed, cu_seqlens_k=packed, max_seqlen_q=100, max_seqlen_k=100),
        ),
    ]
    spec = AttentionSpec(0.125, window_right=0)
    results = []
    tile = Tile(32, 32, 4, 1)
    for tma in (False, True):
        for module in (fwd_module, bwd_module):
            monkeypatch.setattr(module, "is_hopper", lambda _, tma=tma: tma)
        monkeypatch.setattr(fwd_module, "forward_tile", lambda *_: tile)
        monkeypatch.setattr(bwd_module, "backward_tiles", lambda *_: BackwardTiles(tile, tile))
        assert (fwd_module.row_descriptor(k, False, 32, 64) is not None) == tma
        for q_, k_, v_, t in calls:
            out, lse = flash_fwd(q_, k_, v_, spec, t)
            results.append((out, lse, *flash_bwd(out, q_, k_, v_, out, lse, spec, t)[:3]))
    for plain, by_tma in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, by_tma, strict=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "float16, bfloat16 and float32"),
        ({"head_dim": 640}, "head_dim up to 576"),
        ({"head_dim": 60}, "multiples of 8"),
        ({"scale": -1.0}, "positive softmax_scale"),
    ],
)
def test_refusals_say_why(change, reason):
    x = torch.zeros(1, 2, 1, change.get("head_dim", 64), dtype=change.get("dtype", torch.float32))
    got = refuses_flash_fwd(x, x, x[..., :64], AttentionSpec(change.get("scale", 1.0)), AttentionTensors())
    assert got is not None
    assert reason in got


def test_no_backward_through_a_paged_cache():
    x = torch.zeros(1, 2, 1, 64)
    t = AttentionTensors(block_table=torch.zeros(1, 1, dtype=torch.int32))
    assert "paged" in refuses_flash_bwd(x, x, x, x, x, torch.zeros(1, 1, 2), AttentionSpec(1.0), t)
