"""The compiled dense forward and backward, against the reference; only large calls may come there."""

import pytest
import torch

from octavo.kernels.cpu import dense_calls, flash_bwd, flash_fwd
from octavo.kernels.reference.flash_bwd import flash_bwd as reference_bwd
from octavo.kernels.reference.flash_fwd import flash_fwd as reference_fwd
from octavo.kernels.spec import AttentionSpec, AttentionTensors

OPTIONS = {
    "plain": {},
    "causal": {"window_right": 0},
    "window": {"window_left": 90, "window_right": 20},
    "softcap": {"softcap": 2.0, "window_right": 0},
}
CU_Q, CU_K = [0, 31, 31, 157, 200], [0, 97, 121, 121, 290]  # one sequence without rows, one without keys
NO_TENSORS = AttentionTensors()


@pytest.fixture(autouse=True)
def compile_for_small_calls(monkeypatch):
    monkeypatch.setattr(dense_calls, "WORTH_COMPILING", 0)


def make_call(packed, heads=(6, 2), dims=(64, 64), dtype=torch.float32, sink=False):
    """`(q, k, v, t)`; rows of no sequence are NaN."""
    torch.manual_seed(0)
    rows, keys = ((210,), (300,)) if packed else ((2, 131), (2, 203))
    q, k = torch.randn(*rows, heads[0], dims[0]), torch.randn(*keys, heads[1], dims[0])
    v, t = torch.randn(*keys, heads[1], dims[1]), AttentionTensors(max_seqlen_q=131, max_seqlen_k=203)
    if packed:
        q[200:], k[290:], v[290:] = torch.nan, torch.nan, torch.nan
        t = AttentionTensors(*(torch.tensor(x, dtype=torch.int32) for x in (CU_Q, CU_K)), 126, 169)
    sinks = torch.randn(heads[0]) if sink else None
    t = AttentionTensors(t.cu_seqlens_q, t.cu_seqlens_k, t.max_seqlen_q, t.max_seqlen_k, learnable_sink=sinks)
    return q.to(dtype), k.to(dtype), v.to(dtype), t


def assert_right(q, k, v, spec, t, tolerance, with_dlse=True):
    """Output, LSE and gradients within `tolerance` of the reference's, relative to their largest number."""
    assert dense_calls.takes(q, k, v, spec, t)
    out, lse = flash_fwd.flash_fwd(q, k, v, spec, t)
    expected, expected_lse = reference_fwd(q.float(), k.float(), v.float(), spec, t)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    dout = torch.randn_like(expected).to(q.dtype)
    dlse = torch.randn_like(lse) if with_dlse else None
    ours = flash_bwd.flash_bwd(dout, q, k, v, out, lse, spec, t, dlse)
    wanted = reference_bwd(dout.float(), q.float(), k.float(), v.float(), expected, expected_lse, spec, t, dlse)
    for name, got, want in zip(("out", *wanted._fields), (out, *ours), (expected, *wanted), strict=True):
        assert (got is None) == (want is None), name
        if got is not None:
            assert got.dtype == (q.dtype if name != "dsink" else torch.float32)
            assert (got.float() - want).abs().max() <= tolerance * want.abs().max(), name


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_against_the_reference(option, packed):
    q, k, v, t = make_call(packed, sink=option != "plain")
    assert_right(q, k, v, AttentionSpec(0.2, **OPTIONS[option]), t, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("option", ["causal", "window"])
def test_half_precision_rounds_as_often_as_it_must(dtype, option):
    """Inputs are exact, P, dS and results are rounded: an error of a few units in the last place of the largest."""
    unit = torch.finfo(dtype).eps
    q, k, v, t = make_call(False, dtype=dtype)
    assert_right(q, k, v, AttentionSpec(0.125, **OPTIONS[option]), t, 1.5 * unit, with_dlse=False)


@pytest.mark.parametrize(("heads", "dims"), [((4, 4), (96, 32)), ((8, 1), (32, 160))], ids=["mha", "mqa"])
def test_head_dims_and_groups(heads, dims):
    assert_right(*make_call(True, heads, dims)[:3], AttentionSpec(0.15, window_right=0), make_call(True)[3], 2e-6)


def test_a_group_is_cut_where_threads_would_idle(monkeypatch):
    """Two sequences, one key head, five threads: its six query heads in three parts, whose dK and dV are summed."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    q, k, v, t = make_call(False, (6, 1))
    assert_right(q, k, v, AttentionSpec(0.2, window_right=0), t, 2e-6)


def test_any_strides():
    q, k, v, t = make_call(False)
    spec = AttentionSpec(0.2, window_right=0)
    expected = flash_fwd.flash_fwd(q, k, v, spec, t)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    every_second = [torch.stack((x, x), dim=-1).flatten(-2)[..., ::2] for x in (q, k, v)]
    for views in (strided, every_second):
        torch.testing.assert_close(flash_fwd.flash_fwd(*views, spec, t), expected, rtol=0, atol=0)
    dout = torch.randn_like(q)
    grads = flash_bwd.flash_bwd(dout, q, k, v, *expected, spec, t)
    again = flash_bwd.flash_bwd(dout.transpose(0, 1).contiguous().transpose(0, 1), *strided, *expected, spec, t)
    assert all(torch.equal(a, b) for a, b in zip(grads[:3], again[:3], strict=True))


def test_nan_in_a_row_stays_in_it():
    q, k, v, t = make_call(False)
    q[0, 70, 1] = torch.nan
    out, lse = flash_fwd.flash_fwd(q, k, v, AttentionSpec(0.2), t)
    assert out[0, 70, 1].isnan().all()
    assert lse[0, 1, 70].isnan()
    assert out.isnan().sum() == 64


def test_small_calls_and_other_options_stay_away(monkeypatch):
    q, spec = torch.zeros(1, 1024, 16, 64), AttentionSpec(0.2)
    monkeypatch.undo()
    assert dense_calls.takes(q, q, q, spec, NO_TENSORS)
    assert not dense_calls.takes(*[q[:, :512]] * 3, spec, NO_TENSORS)
    assert not dense_calls.takes(q, q, q, AttentionSpec(0.2, dropout_p=0.1), NO_TENSORS)
    assert not dense_calls.takes(q, q, q, spec, AttentionTensors(attn_bias=torch.zeros(1, 1, 1, 1)))
    assert not dense_calls.takes(*[q[..., :40]] * 3, spec, NO_TENSORS)
    assert not dense_calls.takes(*[q.double()] * 3, spec, NO_TENSORS)
