"""The oracle itself: against attention written as loops, and its spelled-out gradients against autograd."""

import math
from dataclasses import replace

import pytest
import torch

from octavo.kernels.reference.flash_bwd import flash_bwd
from octavo.kernels.reference.flash_fwd import flash_fwd, flash_fwd_with_probs
from octavo.kernels.spec import AttentionSpec, AttentionTensors


def attend_by_loops(q, k, v, spec, slopes, sink, bias):
    """One batch row, number by number, from the definition in kernels/spec.py."""
    (sq, heads, _), (sk, kv_heads, _) = q.shape, k.shape
    out, lse = torch.zeros(sq, heads, v.shape[-1], dtype=q.dtype), torch.full((heads, sq), -math.inf, dtype=q.dtype)
    for h in range(heads):
        g = h // (heads // kv_heads)
        for i in range(sq):
            p = i + sk - sq
            scores = {}
            for j in range(sk):
                after_left = spec.window_left < 0 or j >= p - spec.window_left
                before_right = spec.window_right < 0 or j <= p + spec.window_right
                if after_left and before_right:
                    s = spec.softmax_scale * float(q[i, h] @ k[j, g])
                    if spec.softcap:
                        s = spec.softcap * math.tanh(s / spec.softcap)
                    scores[j] = s - float(slopes[h]) * abs(p - j) + float(bias[h, i, j])
            total = sum(math.exp(s) for s in scores.values())
            if sink is not None:
                total += math.exp(float(sink[h]))
            if total:
                lse[h, i] = math.log(total)
            for j, s in scores.items():
                out[i, h] += math.exp(s) / total * v[j, g]
    return out, lse


@pytest.mark.parametrize(("sq", "sk"), [(3, 7), (7, 3), (1, 5)])
@pytest.mark.parametrize("sink", [None, torch.tensor([0.3, -1.0, 0.0, 2.0], dtype=torch.float64)])
@pytest.mark.parametrize(("left", "right", "softcap"), [(-1, -1, 0.0), (-1, 0, 0.0), (2, 1, 1.5)])
def test_forward_is_the_definition(sq, sk, sink, left, right, softcap):
    q, k, v = (torch.randn(1, s, h, 5, dtype=torch.float64) for s, h in ((sq, 4), (sk, 2), (sk, 2)))
    slopes, bias = torch.rand(4, dtype=torch.float64), torch.randn(1, 4, sq, sk, dtype=torch.float64)
    spec = AttentionSpec(0.4, window_left=left, window_right=right, softcap=softcap)
    t = AttentionTensors(alibi_slopes=slopes, learnable_sink=sink, attn_bias=bias)
    out, lse = flash_fwd(q, k, v, spec, t)
    expected_out, expected_lse = attend_by_loops(q[0], k[0], v[0], spec, slopes, sink, bias[0])
    torch.testing.assert_close(out[0], expected_out)
    torch.testing.assert_close(lse[0], expected_lse)


def test_spelled_out_gradients_are_autograds(attention_call):
    q, k, v, spec, t = attention_call
    optional = {n: getattr(t, n) for n in ("qv", "learnable_sink", "attn_bias") if getattr(t, n) is not None}
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *optional.values())]
    with_leaves = replace(t, **dict(zip(optional, leaves[3:], strict=True)))
    out, lse = flash_fwd(*leaves[:3], spec, with_leaves)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    actual = flash_bwd(dout, q, k, v, out.detach(), lse.detach(), spec, t, dlse)
    named = dict(zip(("dqv", "dsink", "dbias"), actual[3:], strict=True))
    of_name = {"qv": "dqv", "learnable_sink": "dsink", "attn_bias": "dbias"}
    torch.testing.assert_close((*actual[:3], *(named[of_name[n]] for n in optional)), expected)
    assert all(torch.isfinite(x).all() for x in expected)


def test_a_packed_call_is_its_sequences(build_call):
    q, k, v, spec, t = build_call("sink", packed=True)
    out, lse = flash_fwd(q, k, v, spec, t)
    one = AttentionTensors(learnable_sink=t.learnable_sink)
    for b in range(4):
        rows = slice(int(t.cu_seqlens_q[b]), int(t.cu_seqlens_q[b + 1]))
        keys = slice(int(t.cu_seqlens_k[b]), int(t.cu_seqlens_k[b + 1]))
        expected_out, expected_lse = flash_fwd(q[None, rows], k[None, keys], v[None, keys], spec, one)
        torch.testing.assert_close(out[rows], expected_out[0])
        torch.testing.assert_close(lse[:, rows], expected_lse[0])
    assert not out[37:].any()
    assert (lse[:, 37:] == -torch.inf).all()


def test_probabilities_show_what_dropout_dropped(build_call):
    q, k, v, spec, t = build_call("dropout", packed=False)
    _, _, probs = flash_fwd_with_probs(q, k, v, spec, t)
    plain = flash_fwd_with_probs(q, k, v, replace(spec, dropout_p=0.0), t)[2]
    torch.testing.assert_close(probs.abs(), plain)
    dropped = (probs < 0).sum() / (plain > 0).sum()
    assert 0.28 < dropped < 0.32


def test_what_lies_in_padding_does_not_matter(build_call):
    q, k, v, spec, t = build_call("used", packed=False)
    expected = flash_fwd(q, k, v, spec, t)
    for x, used in ((q, t.seqused_q), (k, t.seqused_k), (v, t.seqused_k)):
        for b, length in enumerate(used.tolist()):
            x[b, length:] = torch.nan
    torch.testing.assert_close(flash_fwd(q, k, v, spec, t), expected)
