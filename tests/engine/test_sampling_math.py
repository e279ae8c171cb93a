"""Each way of drawing a token follows its definition: chi-square tests against probabilities computed plainly."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.sampling_math import (
    argmax,
    derive_seed,
    sample_distribution,
    sample_softmax,
    sample_truncated,
    top_entries,
    uniforms,
)

DRAWS = 20_000
SIGNIFICANCE = 1e-4  # seeds are fixed: these tests pass always or never


def draws(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(uniforms(np.full(DRAWS, seed, dtype=np.uint64), np.arange(DRAWS)))


def assert_follows(tokens: torch.Tensor, probs: torch.Tensor) -> None:
    """No token of probability 0, and the counts of the others fit (cells of fewer than 5 expected are merged)."""
    probs = probs.double() / probs.double().sum()
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    assert counts[probs == 0].sum() == 0
    expected = probs * len(tokens)
    big = expected >= 5
    observed, wanted = counts[big].tolist(), expected[big].tolist()
    if not bool(big.all()):
        observed.append(counts[~big].sum().item())
        wanted.append(expected[~big].sum().item())
    if wanted[-1] < 1e-9:
        observed, wanted = observed[:-1], wanted[:-1]
    if len(wanted) > 1:
        wanted = np.asarray(wanted) * (sum(observed) / sum(wanted))
        assert scipy.stats.chisquare(observed, wanted).pvalue > SIGNIFICANCE


def truncated_probs(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The definition: keep the k likeliest, renormalise, keep the shortest head that reaches p, renormalise."""
    order = logits.argsort(descending=True)
    probs = torch.zeros_like(logits, dtype=torch.float64)
    head = logits[order[:top_k]].double().softmax(-1)
    size = int((head.cumsum(-1) < top_p).sum()) + 1
    probs[order[:size]] = head[:size]
    return probs / probs.sum()


def logits_of(vocab: int, spread: float) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * spread


def test_uniforms_are_uniform_and_independent_of_their_neighbours():
    u = draws(3).numpy()
    assert u.min() >= 0
    assert u.max() < 1
    assert scipy.stats.kstest(u, "uniform").pvalue > SIGNIFICANCE
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / np.sqrt(DRAWS)
    across_seeds = uniforms(np.arange(DRAWS, dtype=np.uint64), np.zeros(DRAWS, dtype=np.int64))
    assert scipy.stats.kstest(across_seeds, "uniform").pvalue > SIGNIFICANCE
    assert uniforms(np.array([3], dtype=np.uint64), np.array([7]))[0] == u[7]


def test_uniforms_stay_what_they_were():
    """A saved seed must give the same text in the next version."""
    assert uniforms(np.array([0, 1], dtype=np.uint64), np.array([0, 5])).tolist() == GOLDEN_UNIFORMS


GOLDEN_UNIFORMS = [0.6524484863740322, 0.9939067515296562]


@given(st.integers(), st.integers(0, 1000), st.integers(0, 1000))
def test_streams_of_a_seed_differ(seed, one, other):
    assert (derive_seed(seed, one) == derive_seed(seed, other)) == (one == other)
    assert 0 <= derive_seed(seed, one) < 2**64


@pytest.mark.parametrize("vocab", [2, 63, 64, 65, 1000])
def test_whole_distribution(vocab):
    probs = logits_of(vocab, 2.0).softmax(-1)
    assert_follows(sample_distribution(probs.expand(DRAWS, -1), draws()), probs)


@pytest.mark.parametrize("spread", [0.0, 2.0, 6.0])
@pytest.mark.parametrize("vocab", [8193, 16384])
def test_softmax_by_rejection(vocab, spread):
    """Tokens are put in ten classes by their rank, since most of 16384 are drawn once or never."""
    logits = logits_of(vocab, spread)
    rows = 4000
    seeds, positions = np.full(rows, 5, dtype=np.uint64), np.arange(rows)
    tokens = sample_softmax(logits.expand(rows, -1), torch.full((rows, 1), 0.7), seeds, positions)
    probs = (logits.double() / 0.7).softmax(-1)
    order = probs.argsort(descending=True)
    classes = torch.empty(vocab, dtype=torch.int64)
    classes[order] = (probs[order].cumsum(-1) * 10).long().clamp(max=9)
    assert_follows(classes[tokens], torch.zeros(10, dtype=torch.float64).index_add(0, classes, probs))


def test_softmax_of_a_row_that_rejects_nearly_all():
    """Groups of 16 with one likely entry each, and one row of nothing but -inf and a token."""
    logits = torch.full((3, 10000), -40.0)
    logits[0, ::625] = 0.0
    logits[1] = float("-inf")
    logits[1, 9999] = -3.0
    seeds = np.zeros(3, dtype=np.uint64)
    for position in range(20):
        tokens = sample_softmax(logits, torch.ones(3, 1), seeds, np.full(3, position)).tolist()
        assert tokens[0] % 625 == 0
        assert tokens[1] == 9999


def test_a_row_s_proposals_do_not_depend_on_its_neighbours():
    logits = torch.randn(5, 9000) * 3
    seeds, positions = np.arange(5, dtype=np.uint64), np.arange(5)
    together = sample_softmax(logits, torch.ones(5, 1), seeds, positions)
    alone = [
        sample_softmax(logits[i : i + 1], torch.ones(1, 1), seeds[i : i + 1], positions[i : i + 1]) for i in range(5)
    ]
    assert together.tolist() == [int(x) for x in alone]


def test_zero_probability_is_never_drawn_even_at_the_ends():
    probs = torch.zeros(4, 130)
    probs[:, 77] = 1e-30
    uniform = torch.tensor([0.0, 1 - 2**-53, 0.5, 1e-300], dtype=torch.float64)
    assert sample_distribution(probs, uniform).tolist() == [77] * 4


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (3, 1.0), (300, 0.9), (300, 0.2), (7, 0.6), (300, 1e-9), (90, 0.99)]
)
def test_truncated_distribution(top_k, top_p):
    logits = logits_of(300, 2.0)
    tokens = sample_truncated(
        logits.expand(DRAWS, -1),
        torch.ones(DRAWS, 1),
        torch.full((DRAWS,), top_k),
        torch.full((DRAWS,), top_p),
        draws(),
    )
    assert_follows(tokens, truncated_probs(logits, top_k, top_p))


def test_a_nucleus_wider_than_the_first_attempts():
    """Flat logits need more than 64 and more than 1024 candidates; other rows of the batch are done before."""
    vocab, rows = 9000, 6000
    flat = torch.zeros(vocab)
    flat[:1900] = 1e-3 * torch.randn(1900, generator=torch.Generator().manual_seed(1))
    flat[1900:] = -20.0
    peaked = torch.full((vocab,), -30.0)
    peaked[5:8] = torch.tensor([1.0, 0.5, 0.0])
    logits = torch.stack([flat, peaked] * (rows // 2))
    uniform = draws()[:rows]
    tokens = sample_truncated(
        logits, torch.ones(rows, 1), torch.full((rows,), vocab), torch.full((rows,), 0.9), uniform
    )
    assert_follows(tokens[0::2], truncated_probs(flat, vocab, 0.9))
    assert_follows(tokens[1::2], truncated_probs(peaked, vocab, 0.9))


@settings(max_examples=30)
@given(
    st.integers(1, 5), st.sampled_from([16, 256, 1000, 4096]), st.integers(1, 300), st.randoms(use_true_random=False)
)
def test_top_entries_are_those_of_topk(rows, vocab, k, random):
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(random.getrandbits(32)))
    k = min(k, vocab)
    values, indices = top_entries(x, k)
    assert torch.equal(values, x.topk(k).values)
    assert torch.equal(x.gather(1, indices), values)


def test_argmax_takes_the_first_of_equals():
    assert argmax(torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 0.0]])).tolist() == [1, 0]
    assert argmax(torch.tensor([[0.0, 2.0]], dtype=torch.bfloat16)).tolist() == [1]
