"""PagedRows and make_caches: one sequence per row, without the engine."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.nn import MultiHeadAttention, MultiHeadLatentAttention, PagedRows, make_caches


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 7), min_size=3, max_size=3), min_size=1, max_size=5), st.integers(1, 5))
def test_every_token_gets_a_slot_of_its_own_in_its_own_row(steps: list[list[int]], block_size: int) -> None:
    steps = [*steps, [1, 1, 1]]
    rows = PagedRows(3, 40, block_size=block_size)
    slots: list[int] = []
    for counts in steps:
        before = list(rows.lengths)
        step = rows.append(counts)
        m = step.metadata
        assert m.cu_seqlens_q.tolist() == [0, counts[0], counts[0] + counts[1], sum(counts)]
        assert m.cache_seqlens.tolist() == rows.lengths == [a + b for a, b in zip(before, counts, strict=True)]
        assert (m.max_seqlen_q, m.max_seqlen_k) == (max(counts), max(rows.lengths))
        assert (m.cu_seqlens_q.dtype, m.cache_seqlens.dtype, m.block_table.dtype) == (torch.int32,) * 3
        assert (m.slot_mapping.dtype, step.positions.dtype) == (torch.int64,) * 2
        row_of = torch.arange(3).repeat_interleave(torch.tensor(counts))
        blocks = m.block_table[row_of, step.positions // block_size]
        assert torch.equal(m.slot_mapping, blocks.long() * block_size + step.positions % block_size)
        slots += m.slot_mapping.tolist()
    assert len(set(slots)) == len(slots)
    assert max(slots) < rows.num_blocks * block_size


def test_rows_refuse_what_does_not_fit() -> None:
    rows = PagedRows(2, 10)
    rows.append(8)
    with pytest.raises(ValueError, match="a row would reach 11 tokens, max_length is 10"):
        rows.append([1, 3])
    assert rows.lengths == [8, 8]
    with pytest.raises(ValueError, match=r"one entry per row \(2\), got 3"):
        rows.append([1, 1, 1])
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        PagedRows(2, 0)


def test_make_caches_finds_a_models_attention_layers_in_order() -> None:
    model = torch.nn.Sequential(
        MultiHeadAttention(16, 4, 2, causal=True),
        torch.nn.Linear(16, 16),
        MultiHeadLatentAttention(16, 2, None, 8, nope_head_dim=4, rope_head_dim=4, v_head_dim=4),
    )
    rows, (kv, latent) = make_caches(model, 3, 20, block_size=8, dtype=torch.bfloat16)
    assert rows.num_blocks == 9
    assert [t.shape for t in kv.tensors] == [(9, 8, 2, 4)] * 2
    assert [t.shape for t in latent.tensors] == [(9, 8, 12)]
    assert {t.dtype for cache in (kv, latent) for t in cache.tensors} == {torch.bfloat16}
    with pytest.raises(ValueError, match="no attention layer"):
        make_caches(torch.nn.Linear(2, 2), 1, 8)


def test_importing_nn_loads_neither_engine_nor_triton() -> None:
    code = """
import sys
import octavo.nn
heavy = ("octavo.engine", "octavo.models", "octavo.llm", "triton", "numba", "transformers", "matplotlib")
print([name for name in sys.modules if name.startswith(heavy)])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
