"""`import flash_attn` after `octavo.compat.install()`, and the helpers that callers of flash-attn import."""

import subprocess
import sys

import pytest
import torch

import octavo
from octavo.compat.flash_attn import bert_padding
from octavo.compat.flash_attn.layers import rotary

CALLER = """
import octavo.compat
octavo.compat.install(); octavo.compat.install()
import torch, importlib.util
import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
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


def turn_at(position):
    """e^{i·position·ω} of the four frequencies of 8 channels."""
    return torch.polar(torch.ones(4), position * 10000.0 ** (-torch.arange(0, 8, 2) / 8))


def test_top_level_functions_are_ours():
    from octavo.compat import flash_attn

    assert flash_attn.flash_attn_func is octavo.flash_attn_func
