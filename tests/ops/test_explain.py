"""octavo.explain: the numbers of calls counted by hand, and that explaining changes nothing."""

import pytest
import torch

import octavo
from octavo.ops import dispatch


def test_counts_of_a_causal_call_by_hand():
    q = torch.zeros(2, 5, 4, 16)
    k, v = torch.zeros(2, 7, 2, 16), torch.zeros(2, 7, 2, 8)
    account = octavo.explain(octavo.flash_attn_func, q, k, v, causal=True)
    pairs = 2 * (3 + 4 + 5 + 6 + 7)  # rows of each of 2 sequences, bottom-right
    assert account.flops == 2 * 4 * pairs * (16 + 8)
    out_and_lse = 2 * 5 * 4 * (8 + 1)
    assert account.bytes_moved == 4 * (q.numel() + k.numel() + v.numel() + out_and_lse)
    assert account.arithmetic_intensity == account.flops / account.bytes_moved
    assert account.roofline_seconds > 0
    assert account.backend == "cpu"
    assert not account.double_backward


def test_windows_and_uneven_lengths_are_counted():
    q, k = torch.zeros(9, 1, 8), torch.zeros(11, 1, 8)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 9], [0, 8, 11]))
    account = octavo.explain(octavo.flash_attn_varlen_func, q, k, k, cu_q, cu_k, 5, 8, window_size=(1, 0))
    assert account.flops == 2 * (4 * 2 + (0 + 0 + 1 + 2 + 2)) * 16


def test_decode_counts_keys_in_use_and_writes_no_cache():
    cache = torch.zeros(3, 50, 2, 16)
    q, new = torch.zeros(3, 1, 4, 16), torch.ones(3, 1, 2, 16)
    call = {"cache_seqlens": torch.tensor([9, 19, 29], dtype=torch.int32), "causal": True}
    account = octavo.explain(octavo.flash_attn_with_kvcache, q, cache, cache.clone(), new, new, **call)
    assert account.op == "paged_attention"
    assert account.bytes_moved == 4 * (q.numel() + 2 * (10 + 20 + 30) * 2 * 16 + 3 * 4 * (16 + 1))
    assert not cache.any()


def test_text_names_the_kernel_and_who_was_passed_over():
    q = torch.zeros(1, 4, 2, 16)
    account = octavo.explain(octavo.flash_attn_func, q, q, q, softcap=2.0, backend="reference")
    assert account.double_backward
    text = str(account)
    assert "reference.flash_fwd" in text
    assert "roofline time" in text
    assert "-bound" in text


def test_reasons_of_better_kernels_are_listed(monkeypatch):
    real = dispatch._load
    monkeypatch.setattr(dispatch, "_load", lambda b, m, op: "it is away" if b == "cpu" else real(b, m, op))
    monkeypatch.setattr(dispatch, "_candidates", dispatch._candidates.__wrapped__)  # not what was found before
    q = torch.zeros(1, 4, 2, 16)
    account = octavo.explain(octavo.flash_attn_func, q, q, q)
    assert account.passed_over == {"cpu.flash_fwd": "it is away"}
    assert "it is away" in str(account)


def test_a_module_is_explained_by_the_attention_in_it():
    class Layer(torch.nn.Module):
        def forward(self, x):
            return octavo.flash_attn_qkvpacked_func(x, causal=True).sum()

    assert octavo.explain(Layer(), torch.zeros(1, 4, 3, 2, 16)).op == "flash_fwd"


def test_a_call_without_attention_is_an_error():
    with pytest.raises(ValueError, match="reaches an octavo attention kernel"):
        octavo.explain(torch.relu, torch.zeros(3))
