"""The CPU forward and backward against the reference, with tiles so small that every loop runs several times."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.kernels.cpu import dense_calls, flash_bwd, flash_fwd, tiled_scores
from octavo.kernels.reference.flash_bwd import flash_bwd as reference_bwd
from octavo.kernels.reference.flash_fwd import flash_fwd as reference_fwd
from octavo.kernels.spec import AttentionSpec, AttentionTensors


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled_scores, "TILE_ELEMENTS", 512)
    for module in (tiled_scores, flash_fwd, flash_bwd):
        monkeypatch.setattr(module, "KEYS_PER_TILE", 16)


def test_every_option_in_fp64(attention_call, small_tiles):
    q, k, v, spec, t = attention_call
    expected = reference_fwd(q, k, v, spec, t)
    out, lse = flash_fwd.flash_fwd(q, k, v, spec, t)
    torch.testing.assert_close((out, lse), expected)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    actual = flash_bwd.flash_bwd(dout, q, k, v, out, lse, spec, t, dlse)
    torch.testing.assert_close(actual, reference_bwd(dout, q, k, v, out, lse, spec, t, dlse))


@pytest.mark.parametrize("name", ["plain", "causal", "softcap", "sink", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_torch(build_call, name, dtype, packed, small_tiles):
    """Three times for gradients; plain torch computes matmuls and softmax in `dtype`. 8 ulp of fp32 are free.

    In fp32 torch's own fused kernel, which serves some of these calls, is up to 4 times further off than its matmuls.
    """
    q, k, v, spec, t = build_call(name, packed=packed, dtype=dtype, head_dim_v=23)
    exact = reference_fwd(q.double(), k.double(), v.double(), spec, t)
    out, lse = flash_fwd.flash_fwd(q, k, v, spec, t)
    dout = torch.randn_like(out)
    exact_grads = reference_bwd(dout.double(), q.double(), k.double(), v.double(), *exact, spec, t)
    grads = flash_bwd.flash_bwd(dout, q, k, v, out, lse, spec, t)
    plain, plain_grads = in_plain_torch(q, k, v, spec, t, dout)
    ulps = 8 * torch.finfo(torch.float32).eps
    assert (out - exact[0]).abs().max() <= 2 * (plain - exact[0]).abs().max() + ulps * exact[0].abs().max()
    torch.testing.assert_close(lse.double(), exact[1], atol=1e-5, rtol=1e-5)
    for actual, ideal, rough in zip(grads[:3], exact_grads[:3], plain_grads, strict=True):
        assert (actual - ideal).abs().max() <= 3 * (rough - ideal).abs().max() + ulps * ideal.abs().max()


def in_plain_torch(q, k, v, spec, t, dout):
    """Forward and gradients with every intermediate in q's dtype, sequence by sequence."""
    spans_q = t.cu_seqlens_q.tolist() if t.cu_seqlens_q is not None else None
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = torch.zeros_like(dout)
    parts = []
    for b in range(4 if spans_q else 2):
        if spans_q:
            rows = slice(*spans_q[b : b + 2])
            keys = slice(*t.cu_seqlens_k.tolist()[b : b + 2])
            q_b, k_b, v_b = (x[s] for x, s in zip(leaves, (rows, keys, keys), strict=True))
        else:
            rows = b
            q_b, k_b, v_b = (x[b] for x in leaves)
        if q_b.shape[0] == 0 or k_b.shape[0] == 0:
            continue
        k_b, v_b = (x.repeat_interleave(q_b.shape[1] // x.shape[1], dim=1) for x in (k_b, v_b))
        scores = torch.einsum("ihd,jhd->hij", q_b * spec.softmax_scale, k_b)
        if spec.softcap:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        sq, sk = scores.shape[1:]
        diagonal = torch.arange(sk) - torch.arange(sq)[:, None] - (sk - sq)
        hidden = torch.zeros(sq, sk, dtype=torch.bool)
        if spec.window_left >= 0:
            hidden |= diagonal < -spec.window_left
        if spec.window_right >= 0:
            hidden |= diagonal > spec.window_right
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        if t.learnable_sink is not None:
            sink = t.learnable_sink.to(scores.dtype)[:, None, None].expand(-1, sq, 1)
            scores = torch.cat([scores, sink], dim=-1)
        probs = torch.softmax(scores, dim=-1)[..., :sk].masked_fill(hidden, 0)
        part = torch.einsum("hij,jhd->ihd", probs, v_b)
        out[rows] = part.detach()
        parts.append((part, dout[rows]))
    return out, torch.autograd.grad([p for p, _ in parts], leaves, [d for _, d in parts])


def test_repeats_give_the_same_bits(build_call):
    q, k, v, spec, t = build_call("window", packed=False, dtype=torch.bfloat16)
    out, lse = flash_fwd.flash_fwd(q, k, v, spec, t)
    runs = [flash_bwd.flash_bwd(out, q, k, v, out, lse, spec, t) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run[:3], runs[0][:3], strict=True))


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operator makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("options", [{"window_right": 0}, {"softcap": 5.0}])
def test_memory_does_not_grow_with_the_square(options, monkeypatch):
    monkeypatch.setattr(dense_calls, "WORTH_COMPILING", 1 << 62)
    seqlen = 4099
    q, k, v = (torch.randn(1, seqlen, 2, 16) for _ in range(3))
    spec, t = AttentionSpec(0.25, **options), AttentionTensors(max_seqlen_q=seqlen, max_seqlen_k=seqlen)
    with LargestTensor() as largest:
        out, lse = flash_fwd.flash_fwd(q, k, v, spec, t)
        flash_bwd.flash_bwd(out, q, k, v, out, lse, spec, t)
    assert largest.elements <= tiled_scores.TILE_ELEMENTS < 2 * seqlen**2 // 16


def test_grouped_heads_are_not_expanded():
    q, k = torch.randn(1, 300, 8, 16), torch.randn(1, 300, 1, 16)
    spec, t = AttentionSpec(0.25, window_right=0), AttentionTensors(max_seqlen_q=300, max_seqlen_k=300)
    out, lse = flash_fwd.flash_fwd(q, k, k, spec, t)
    torch.testing.assert_close((out, lse), reference_fwd(q, k, k, spec, t))
    actual = flash_bwd.flash_bwd(out, q, k, k, out, lse, spec, t)
    torch.testing.assert_close(actual, reference_bwd(out, q, k, k, out, lse, spec, t), atol=1e-4, rtol=1e-4)
