"""`ops.sample_on_device` draws from the distribution that its parameters define, reproducibly."""

import pytest
import torch
from scipy import stats

from octavo import ops

DRAWS = 20_000


def draw(logits, seeds=None, positions=None, **given):
    rows = logits.shape[0]
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | given
    dtypes = {"top_k": torch.int32}
    tensors = {name: torch.full((rows,), value, dtype=dtypes.get(name)) for name, value in values.items()}
    seeds = torch.arange(rows) * 12345 if seeds is None else seeds
    positions = torch.zeros(rows, dtype=torch.int64) if positions is None else positions
    return ops.sample_on_device(logits, **tensors, seeds=seeds, positions=positions)


def assert_distributed(tokens, probs):
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    expected = probs.double() / probs.sum() * len(tokens)
    assert (counts[expected == 0] == 0).all(), "a token that was cut"
    used = expected > 0
    if used.sum() > 1:
        assert stats.chisquare(counts[used].numpy(), expected[used].numpy()).pvalue > 1e-4


LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -2.0, -3.0])


@pytest.mark.parametrize("over", ["seeds", "positions"])
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, 8),
        ({"temperature": 0.5}, 8),
        ({"top_k": 3}, 3),
        ({"top_p": 0.5}, 2),  # 0.38 + 0.23 reaches it
        ({"min_p": 0.2}, 4),  # e^-1.6
        ({"top_k": 4, "top_p": 0.8}, 3),  # renormalised over four: 0.45, 0.28, 0.17
        ({"temperature": 0.0}, 1),
    ],
    ids=str,
)
def test_distribution(given, kept, over):
    logits = LOGITS[torch.randperm(8, generator=torch.Generator().manual_seed(1))]
    numbers = torch.arange(DRAWS)
    fixed = torch.full((DRAWS,), 5)
    seeds, positions = (numbers, fixed) if over == "seeds" else (fixed, numbers)
    tokens = draw(logits.expand(DRAWS, -1), seeds, positions, **given)
    probs = (logits.double() / max(given.get("temperature", 1.0), 1e-5)).softmax(-1)
    probs[probs < probs.sort(descending=True).values[kept - 1]] = 0
    assert_distributed(tokens, probs)


def test_positions_and_seeds_are_independent_of_each_other():
    """Neighbouring seeds and positions: the pairs of tokens fill the square evenly."""
    seeds, positions = torch.arange(DRAWS) // 2, torch.arange(DRAWS) % 2
    tokens = draw(torch.zeros(DRAWS, 4), seeds, positions)
    assert_distributed(tokens[0::2] * 4 + tokens[1::2], torch.ones(16))
    tokens = draw(torch.zeros(DRAWS, 4), torch.arange(DRAWS))
    assert_distributed(tokens[0::2] * 4 + tokens[1::2], torch.ones(16))


def test_logits_of_one_row_only_matter():
    logits = torch.randn(6, 50)
    tokens = draw(logits, top_p=0.9)
    alone = [draw(logits[i : i + 1], torch.tensor([i * 12345]), top_p=0.9).item() for i in range(6)]
    assert tokens.tolist() == alone


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match="seeds"):
        draw(torch.zeros(3, 5), seeds=torch.zeros(2, dtype=torch.int64))
