"""`import flash_attn` after `octavo.compat.install()`, and the helpers that callers of flash-attn import."""

import subprocess
import sys

import pytest
import torch

import octavo
from octavo.compat import flash_attn_interface as fa3
from octavo.compat.flash_attn import bert_padding
from octavo.compat.flash_attn import flash_attn_interface as fa2
from octavo.compat.flash_attn.layers import rotary

CALLER = """
import octavo.compat
octavo.compat.install(); octavo.compat.install()
import torch, importlib.util
import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func
from flash_attn.flash_attn_interface import _flash_attn_forward, _flash_attn_varlen_backward
from flash_attn.flash_attn_interface import _wrapped_flash_attn_backward
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from flash_attn.ops.triton.rotary import apply_rotary
from flash_attn_interface import flash_attn_func as flash_attn_3_func, get_scheduler_metadata
assert importlib.util.find_spec("flash_attn") is not None
print(flash_attn.__version__, flash_attn_func(*torch.randn(3, 2, 5, 4, 8)).shape)
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_code_written_for_flash_attn_runs():
    result = run(CALLER)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "2.8.4 torch.Size([2, 5, 4, 8])"


def test_a_real_flash_attn_is_not_replaced_under_its_callers():
    result = run("import sys, types; sys.modules['flash_attn'] = types.ModuleType('flash_attn');" + CALLER)
    assert "RuntimeError: flash_attn is imported already" in result.stderr


def test_what_is_not_served_is_an_import_error():
    result = run(CALLER + "import flash_attn.modules.mha")
    assert "ModuleNotFoundError: No module named 'flash_attn.modules'" in result.stderr


def test_unpad_and_pad_are_inverse():
    x = torch.randn(3, 5, 2, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert cu_seqlens.tolist() == [0, 2, 6, 6]
    assert cu_seqlens.dtype == torch.int32
    assert (longest, used.tolist()) == (4, [2, 4, 0])
    padded = bert_padding.pad_input(tokens, indices, 3, 5)
    torch.testing.assert_close(padded, x * mask[..., None])
    padded.sum().backward()
    torch.testing.assert_close(x.grad, mask[..., None].expand_as(x).float())


def test_unused_tokens_keep_their_place():
    mask, unused = torch.tensor([[1, 0, 0]]), torch.tensor([[0, 1, 0]])
    tokens, _, cu_seqlens, _, used = bert_padding.unpad_input(torch.arange(3)[None], mask, unused)
    assert (tokens.tolist(), cu_seqlens.tolist(), used.tolist()) == ([0, 1], [0, 2], [1])


def test_concatenated_sequences():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(
        torch.arange(12).view(2, 6), lengths
    )
    assert tokens.tolist() == indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert (cu_seqlens.tolist(), longest) == ([0, 2, 5, 11], 6)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_of_packed_tokens_and_in_place(interleaved):
    angle = torch.randn(20, 4)
    cos, sin = angle.cos(), angle.sin()
    x, offsets = torch.randn(2, 5, 3, 12), torch.tensor([3, 9])
    expected = rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets)
    cu_seqlens = torch.tensor([0, 5, 10], dtype=torch.int32)
    packed = rotary.apply_rotary_emb(x.flatten(0, 1), cos, sin, interleaved, False, offsets, cu_seqlens, 5)
    torch.testing.assert_close(packed, expected.flatten(0, 1))
    qkv = torch.stack([x, x, x], dim=2)
    rotary.apply_rotary_emb_qkv_(qkv, cos, sin, interleaved=interleaved, seqlen_offsets=offsets)
    torch.testing.assert_close(qkv, torch.stack([expected, expected, x], dim=2))


def test_rotary_module_turns_q_and_k():
    module = rotary.RotaryEmbedding(8)
    q, kv = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 2, 8)
    qkv = torch.cat([q[:, :, None], kv], dim=2)
    q_turned, kv_turned = module(q.clone(), kv.clone(), seqlen_offset=2)
    torch.testing.assert_close(module(qkv.clone(), seqlen_offset=2)[:, :, 0], q_turned)
    torch.testing.assert_close(kv_turned[:, :, 1], kv[:, :, 1])
    pairs = torch.view_as_real(torch.complex(q[0, 3, :, :4], q[0, 3, :, 4:]) * turn_at(5))
    torch.testing.assert_close(q_turned[0, 3], torch.cat([pairs[..., 0], pairs[..., 1]], dim=-1))


def test_xpos_makes_scores_decay_with_distance_alone():
    """q·k of tokens i and j carries ((channel + 0.4·dim) / 1.4·dim)^((i − j) / scale_base), whatever i is."""
    module, plain = rotary.RotaryEmbedding(8, scale_base=16.0), rotary.RotaryEmbedding(8)
    assert not module.state_dict()
    qkv = torch.ones(1, 12, 3, 1, 8)
    q, k, _ = module(qkv.clone())[0].unbind(1)
    q_plain, k_plain, _ = plain(qkv.clone())[0].unbind(1)
    scale = (torch.arange(0, 8, 2) + 0.4 * 8) / (1.4 * 8)
    for i, j in ((9, 4), (5, 0), (11, 11)):
        expected = q_plain[i, 0] * k_plain[j, 0] * (scale ** ((i - j) / 16.0)).repeat(2)
        torch.testing.assert_close(q[i, 0] * k[j, 0], expected)


def turn_at(position):
    """e^{i·position·ω} of the four frequencies of 8 channels."""
    return torch.polar(torch.ones(4), position * 10000.0 ** (-torch.arange(0, 8, 2) / 8))


def test_halves_for_ring_attention_sum_to_the_whole():
    """Each rank attends to its keys; outputs merge by their LSE, and gradients add up."""
    q, k, v = (torch.randn(2, 12, 4, 8, requires_grad=True) for _ in range(3))
    dout = torch.randn(2, 12, 4, 8)
    expected, expected_lse = octavo.flash_attn_func(q, k, v, return_lse=True)
    halves = [(k[:, :5].detach(), v[:, :5].detach()), (k[:, 5:].detach(), v[:, 5:].detach())]
    parts = [fa2._flash_attn_forward(q.detach(), *half, 0.0, None, False) for half in halves]
    out, lse = octavo.merge_attention_states([p[0] for p in parts], [p[1] for p in parts])
    torch.testing.assert_close((out, lse), (expected, expected_lse))
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    for half, keys in zip(halves, (slice(0, 5), slice(5, 12)), strict=True):
        dq_part = torch.empty_like(q)
        softmax_d = fa2._flash_attn_backward(
            dout, q.detach(), *half, out, lse, dq_part, dk[:, keys], dv[:, keys], 0.0, None, False
        )
        dq += dq_part
    torch.testing.assert_close((dq, dk, dv), torch.autograd.grad(expected, (q, k, v), dout))
    torch.testing.assert_close(softmax_d, (out * dout).sum(-1).transpose(1, 2))


def test_packed_halves_replay_the_dropout_of_their_rng_state():
    q, k, v = (torch.randn(9, 2, 8, requires_grad=True) for _ in range(3))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    packing = (cu, cu, 5, 5, 0.4, None, True)
    inputs = [x.detach() for x in (q, k, v)]
    out, lse, _, rng_state = fa2._flash_attn_varlen_forward(*inputs, *packing)
    dq, dk, dv = (torch.empty_like(x) for x in inputs)
    fa2._flash_attn_varlen_backward(out, *inputs, out, lse, dq, dk, dv, *packing, rng_state=rng_state)
    # out is linear in v, so the gradient of out²/2 along v is |out|² of the same mask
    torch.testing.assert_close((dv * v).sum(), out.square().sum())


def test_the_packed_forward_reads_pages_too():
    q, k, v = torch.randn(2, 4, 8), torch.randn(3, 4, 2, 8), torch.randn(3, 4, 2, 8)
    cu_q, cu_k = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 7, 10], dtype=torch.int32)
    table = torch.tensor([[2, 0], [1, 99]], dtype=torch.int32)
    out, lse, *_ = fa2._flash_attn_varlen_forward(q, k, v, cu_q, cu_k, 1, 8, 0.0, None, True, block_table=table)
    for b, keys in enumerate((torch.cat((k[2], k[0]))[:7], k[1][:3])):
        values = (torch.cat((v[2], v[0]))[:7], v[1][:3])[b]
        expected = octavo.flash_attn_func(q[None, b : b + 1], keys[None], values[None], return_lse=True)
        torch.testing.assert_close((out[None, b : b + 1], lse[None, :, b : b + 1]), expected)


def test_flash_attn_3s_module():
    q, k, v = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8)
    expected, expected_lse = octavo.flash_attn_func(q, k, v, causal=True, return_lse=True)
    out, lse = fa3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    torch.testing.assert_close((out, lse), (expected, expected_lse))
    torch.testing.assert_close(fa3.flash_attn_qkvpacked_func(torch.cat((q, k, v), 2), causal=True, num_heads_q=4), out)
    cu = torch.tensor([0, 6, 12], dtype=torch.int32)
    packed = fa3.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), cu, cu, 6, 6, causal=True)
    torch.testing.assert_close(packed, expected.flatten(0, 1))
    lengths = torch.tensor([6, 6], dtype=torch.int32)
    dense = fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)
    pages = torch.arange(2, dtype=torch.int32)[:, None]
    ragged = fa3.flash_attn_with_kvcache(
        q.flatten(0, 1), k, v, cache_seqlens=lengths, page_table=pages, cu_seqlens_q=cu, max_seqlen_q=6, causal=True
    )
    torch.testing.assert_close((dense, ragged), (expected, expected.flatten(0, 1)))
    parts = [octavo.flash_attn_func(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 2), slice(2, 6))]
    outs, lses = torch.stack([p[0] for p in parts]), torch.stack([p[1].transpose(1, 2) for p in parts])
    torch.testing.assert_close(fa3.flash_attn_combine(outs, lses)[0], octavo.flash_attn_func(q, k, v))
    with pytest.raises(ValueError, match="k_descale: not served"):
        fa3.flash_attn_func(q, k, v, k_descale=torch.ones(2, 2))


def test_top_level_functions_are_ours():
    from octavo.compat import flash_attn

    assert flash_attn.flash_attn_func is octavo.flash_attn_func
