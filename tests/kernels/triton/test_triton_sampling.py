"""The GPU's sampler, interpreted: it draws the very tokens that the plain reference draws."""

import pytest
import torch

from octavo.kernels.reference import sampling as reference
from octavo.kernels.triton import sampling


def parameters(rows, **given):
    """Rows that neither truncate nor warm; `given` values replace theirs."""
    values = {
        "temperature": torch.ones(rows),
        "top_k": torch.zeros(rows, dtype=torch.int32),
        "top_p": torch.ones(rows),
        "min_p": torch.zeros(rows),
        "seeds": torch.randint(-(2**62), 2**62, (rows,)),
        "positions": torch.arange(rows) * 7,
    }
    for name, value in given.items():
        values[name] = value if isinstance(value, torch.Tensor) else torch.full_like(values[name], value)
    return list(values.values())


def ours(logits, arguments, truncates=True):
    return sampling.sample_on_device(logits, *arguments, truncates)


def expected(logits, arguments):
    return reference.sample_on_device(logits, *arguments, True)


@pytest.fixture(autouse=True)
def few_parts(monkeypatch):
    """Four programs a row instead of sixteen, which the interpreter runs one by one."""
    monkeypatch.setattr(sampling, "PARTS", 4)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 40, "temperature": 2.0},
        {"top_p": 0.9},
        {"top_p": 0.01},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_k": 50, "top_p": 0.8, "min_p": 0.02, "temperature": 1.5},
        {"top_k": 2200, "temperature": 5.0},
        {"top_p": 0.99, "temperature": 20.0},
        {"top_k": 2500},
    ],
    ids=str,
)
def test_the_reference_s_tokens(given):
    logits = torch.randn(3, 2500) * 3
    arguments = parameters(3, **given)
    assert ours(logits, arguments).tolist() == expected(logits, arguments).tolist()


def test_each_row_has_its_own_parameters_and_none_depends_on_its_place():
    rows = 8
    logits = torch.randn(rows, 1000) * 3
    arguments = parameters(
        rows,
        temperature=torch.rand(rows) * (torch.arange(rows) % 5 > 0),
        top_k=torch.randint(0, 30, (rows,), dtype=torch.int32) * (torch.arange(rows, dtype=torch.int32) % 2),
        top_p=torch.where(torch.arange(rows) % 3 > 0, torch.rand(rows), 1.0),
    )
    tokens = ours(logits, arguments)
    assert torch.equal(tokens, expected(logits, arguments))
    order = torch.randperm(rows)
    assert torch.equal(ours(logits[order], [x[order] for x in arguments]), tokens[order])


@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_draws_a_token_of_the_vocabulary():
    logits = torch.full((2, 100), torch.nan)
    for given in ({}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}):
        assert (ours(logits, parameters(2, **given)) < 100).all()


@pytest.mark.parametrize(
    ("capacity", "passes", "given"),
    [
        (1024, 3, {"top_p": 0.6, "min_p": 0.05}),
        (400, 2, {"top_p": 0.5}),
        (400, 2, {"top_k": 700}),
        (400, 2, {"top_k": 900, "top_p": 0.7}),
        (8, 1, {"top_p": 0.5}),
    ],
    ids=["passes within the bracket", "the bracket alone", "by count", "by both", "whole row"],
)
def test_more_entries_than_can_be_gathered(monkeypatch, capacity, passes, given):
    """Rows of nearly even chances, so that some would draw an entry kept in error."""
    rows = 24
    monkeypatch.setattr(sampling, "CAPACITY", capacity)
    monkeypatch.setattr(sampling, "PASSES", passes)
    logits = torch.randn(rows, 1500)
    arguments = parameters(rows, temperature=5.0, **given)
    assert torch.equal(ours(logits, arguments), expected(logits, arguments))


def test_ties_masked_tokens_and_rows_that_do_not_fit_a_block():
    logits = torch.full((3, 77), float("-inf"))
    logits[:, [5, 30, 76]] = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 0.0], [3.0, 3.0, -1.0]])
    for given in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.9}, {"temperature": 0.0}):
        arguments = parameters(3, **given)
        tokens = ours(logits, arguments)
        assert torch.equal(tokens, expected(logits, arguments)), given
        assert torch.isfinite(logits.gather(1, tokens[:, None])).all()
    assert ours(logits, parameters(3, temperature=0.0), truncates=False).tolist() == [5, 30, 5]
