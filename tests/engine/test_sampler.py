"""The sampler against the definition of each parameter, in mixed batches that change from step to step."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo import ops
from octavo.engine.logit_rules import apply_bitmask, bad_word_ids
from octavo.engine.request import Request
from octavo.engine.sampler import Sampler
from octavo.engine.sampling_params import BeamSearchParams, SamplingParams
from octavo.engine.step import ScheduledSequence

VOCAB = 97
ENDS = (96,)
SIGNIFICANCE = 1e-4  # seeds are fixed: these tests pass always or never


def logits_for(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def sequence(params, prompt=(1, 2, 3), output=(), name="r"):
    request = Request(name, prompt, params, eos_token_ids=ENDS)
    (seq,) = request.sequences
    seq.token_ids.extend(output)
    return seq


def entries_of(*sequences, num_samples=1):
    return [ScheduledSequence(seq, 1, num_samples) for seq in sequences]


def one_token(params, logits, sampler=None, **options) -> int:
    sampler = sampler or Sampler(VOCAB)
    return sampler.sample(logits[None].clone(), entries_of(sequence(params, **options))).token_ids[0]


def reference_probs(params: SamplingParams, logits: torch.Tensor, prompt, output) -> np.ndarray:
    """Every rule, one row, as plainly as it can be said."""
    x = logits.double().clone()
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    if params.allowed_token_ids is not None:
        x[[t for t in range(VOCAB) if t not in params.allowed_token_ids]] = -torch.inf
    if len(output) < params.min_tokens:
        x[list(ENDS) + list(params.stop_token_ids)] = -torch.inf
    for token in {*prompt, *output}:
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in output:
        x[token] -= params.frequency_penalty
    for token in set(output):
        x[token] -= params.presence_penalty
    p = (x / params.temperature).softmax(-1).numpy()
    p[p < params.min_p * p.max()] = 0
    order = np.argsort(-p)
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= params.top_p]] = 0
    return p / p.sum()


RULES = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 20},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_p": 0.9, "top_k": 30, "min_p": 0.01},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.7, "frequency_penalty": -1.0},
    {"logit_bias": {5: 3.0, 6: -100.0}},
    {"allowed_token_ids": [3, 5, 8, 13, 96]},
    {"min_tokens": 9, "logit_bias": {96: 5.0}, "stop_token_ids": [7]},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_tokens_follow_the_definition(rules):
    """Rows of one batch that differ in nothing but their seed are independent draws of one distribution."""
    rows, prompt, output = 4000, (1, 5, 5), (5, 8, 8, 30)
    logits = logits_for(1, seed=4)[0]
    sequences = [sequence(SamplingParams(seed=i, **rules), prompt, output, str(i)) for i in range(rows)]
    tokens = Sampler(VOCAB).sample(logits.expand(rows, -1).clone(), entries_of(*sequences)).token_ids
    probs = reference_probs(SamplingParams(**rules), logits, prompt, output)
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[probs == 0].sum() == 0
    big = probs * rows >= 5
    observed, expected = [*counts[big], counts[~big].sum()], [*(probs[big] * rows), probs[~big].sum() * rows]
    if expected[-1] < 1e-9:
        observed, expected = observed[:-1], expected[:-1]
    assert scipy.stats.chisquare(observed, expected).pvalue > SIGNIFICANCE


def test_draws_of_one_seed_are_independent_over_positions():
    """The output of one sequence, position after position, follows the distribution too."""
    logits, sampler, seq = logits_for(1)[0], Sampler(VOCAB), sequence(SamplingParams(seed=11))
    entries, tokens = entries_of(seq), []
    for _ in range(3000):
        token = sampler.sample(logits[None].clone(), entries).token_ids[0]
        seq.token_ids.append(token)
        tokens.append(token)
    probs = logits.double().softmax(-1).numpy()
    big = probs * len(tokens) >= 5
    counts = np.bincount(tokens, minlength=VOCAB)
    observed = [*counts[big], counts[~big].sum()]
    expected = [*(probs[big] * len(tokens)), probs[~big].sum() * len(tokens)]
    assert scipy.stats.chisquare(observed, np.array(expected) * (sum(observed) / sum(expected))).pvalue > SIGNIFICANCE
    pairs = np.array(tokens[:-1]) * VOCAB + np.array(tokens[1:])
    likely = int(logits.argmax())
    share = np.mean(pairs == likely * VOCAB + likely)
    assert share == pytest.approx(probs[likely] ** 2, abs=4 * np.sqrt(probs[likely] ** 2 / len(tokens)))


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0, 3.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    top_k=st.sampled_from([0, 1, 5, 200]),
    min_p=st.sampled_from([0.0, 0.05]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(-5, 5),
    logprobs=st.sampled_from([None, 0, 3]),
    min_tokens=st.sampled_from([0, 3]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(params_strategy, min_size=1, max_size=6), st.data())
def test_a_row_does_not_depend_on_its_neighbours(all_params, data):
    """A batch whose members come and go gives each sequence what it gets alone."""
    steps = 5
    together = [sequence(params, name=str(i)) for i, params in enumerate(all_params)]
    alone = [sequence(params, name=str(i)) for i, params in enumerate(all_params)]
    sampler = Sampler(VOCAB)
    for _ in range(steps):
        present = data.draw(st.lists(st.sampled_from(range(len(together))), unique=True, min_size=1))
        logits = logits_for(len(together), seed=len(together[present[0]].token_ids))
        result = sampler.sample(logits[present].clone(), entries_of(*(together[i] for i in present)))
        for row, i in enumerate(present):
            expected = Sampler(VOCAB).sample(logits[i : i + 1].clone(), entries_of(alone[i]))
            assert result.token_ids[row] == expected.token_ids[0]
            if row in result.top_logprobs:
                ours, its = result.top_logprobs[row], expected.top_logprobs[0]
                assert (ours.token_ids, ours.rank) == (its.token_ids, its.rank)
                assert ours.logprobs == pytest.approx(its.logprobs)
            together[i].token_ids.append(result.token_ids[row])
            alone[i].token_ids.append(result.token_ids[row])


def test_candidates_of_a_prompt_differ_and_go_on_as_they_began():
    """n samples from one row; afterwards each candidate is a sequence whose stream is its own."""
    seq = sequence(SamplingParams(seed=3, n=8))
    logits = logits_for(1) * 0.1
    sampler = Sampler(VOCAB)
    first = sampler.sample(logits.clone(), entries_of(seq, num_samples=8)).token_ids
    assert len(set(first)) > 4
    again = Sampler(VOCAB).sample(logits.clone(), entries_of(seq, num_samples=8)).token_ids
    assert first == again
    mixed = sampler.sample(
        torch.cat([logits, logits]), [*entries_of(seq, num_samples=8), *entries_of(sequence(SamplingParams(seed=9)))]
    )
    assert mixed.token_ids[:8] == first


def test_the_engines_seed_and_the_requests_name_decide_without_a_seed():
    logits = logits_for(1)[0] * 0
    draw = [
        one_token(SamplingParams(), logits, Sampler(VOCAB, seed=seed), name=name)
        for seed, name in ((1, "a"), (1, "a"), (2, "a"), (1, "b"))
    ]
    assert draw[0] == draw[1]
    assert len({draw[0], draw[2], draw[3]}) == 3


def test_a_tiny_temperature_is_greedy():
    logits = logits_for(1)[0]
    for temperature in (0.0, 1e-7, 1e-300):
        assert one_token(SamplingParams(temperature=temperature, seed=0), logits) == int(logits.argmax())


def test_penalties_count_what_the_sequence_holds():
    """Also when it moved without the sampler: a fork, or a step that failed and is repeated."""
    params = SamplingParams(temperature=0, frequency_penalty=2.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 11] = 3.0, 2.5
    seq, sampler = sequence(params), Sampler(VOCAB)
    entries, tokens = entries_of(seq), []
    for _ in range(4):
        tokens += sampler.sample(logits.clone(), entries).token_ids
        seq.token_ids.append(tokens[-1])
    assert tokens == [10, 11, 10, 11]  # 3, 2.5 → 1, 2.5 → 1, 0.5 → −1, 0.5
    assert sampler.sample(logits.clone(), entries).token_ids == sampler.sample(logits.clone(), entries).token_ids
    del seq.token_ids[-2:]
    assert sampler.sample(logits.clone(), entries).token_ids == [10]


def test_bad_words_are_never_completed():
    encode = {"cat": [10, 11], " cat": [12, 11], "x": [20], " x": [21]}.__getitem__
    assert bad_word_ids(["cat", "x"], encode) == [[10, 11], [12, 11], [20], [21]]
    params = SamplingParams(temperature=0, bad_words=["cat", "x"])
    logits = torch.zeros(VOCAB)
    logits[11], logits[20], logits[30] = 3.0, 2.0, 1.0
    sampler = Sampler(VOCAB, encode=encode)
    assert one_token(params, logits, sampler, output=[5]) == 11
    assert one_token(params, logits, sampler, output=[10]) == 30
    assert one_token(params, logits, sampler, output=[12]) == 30
    assert one_token(params, logits, sampler, prompt=[10], output=[]) == 11  # the prompt does not count


def test_end_tokens_are_held_back_until_min_tokens():
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[50])
    logits = torch.zeros(VOCAB)
    logits[96], logits[50], logits[3] = 3.0, 2.0, 1.0
    assert [one_token(params, logits, output=[1] * n) for n in range(3)] == [3, 3, 96]


def test_a_bitmask_leaves_only_its_tokens():
    bits = np.zeros(128, dtype=np.uint8)
    bits[[5, 33, 90]] = 1
    mask = torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32).copy())
    logits = logits_for(1)[0]
    masked = logits.clone()
    apply_bitmask(masked, mask)
    assert (masked > -torch.inf).nonzero().flatten().tolist() == [5, 33, 90]
    free, bound = sequence(SamplingParams(seed=1, top_p=0.9)), sequence(SamplingParams(seed=1, top_p=0.9))
    result = Sampler(VOCAB).sample(logits.expand(2, -1).clone(), entries_of(free, bound), {bound.seq_id: mask})
    assert result.token_ids[0] == one_token(SamplingParams(seed=1, top_p=0.9), logits)
    assert result.token_ids[1] in (5, 33, 90)


def test_logprobs_are_of_the_raw_distribution_with_ranks():
    logits = logits_for(2)
    loud = sequence(SamplingParams(seed=2, logprobs=4, temperature=3.0, top_k=50))
    quiet = sequence(SamplingParams(temperature=0))
    result = Sampler(VOCAB).sample(logits.clone(), entries_of(quiet, loud))
    expected = logits[1].log_softmax(-1)
    token = result.token_ids[1]
    assert set(result.top_logprobs) == {1}
    assert result.logprobs[1] == pytest.approx(expected[token].item())
    top = result.top_logprobs[1]
    assert top.token_ids == expected.topk(4).indices.tolist()
    assert top.logprobs == pytest.approx(expected.topk(4).values.tolist())
    assert top.rank == int((expected > expected[token]).sum()) + 1
    assert Sampler(VOCAB).sample(logits[:1].clone(), entries_of(quiet)).logprobs is None


def test_a_beam_gets_enough_continuations_at_its_own_temperature():
    logits = logits_for(1)
    seq = sequence(BeamSearchParams(beam_width=3, max_tokens=5, temperature=2.0))
    top = Sampler(VOCAB).sample(logits.clone(), entries_of(seq)).top_logprobs[0]
    expected = (logits[0] / 2).log_softmax(-1).topk(6)
    assert top.token_ids == expected.indices.tolist()
    assert top.logprobs == pytest.approx(expected.values.tolist())


def test_more_alternatives_than_tokens():
    logits = torch.randn(1, 4)
    result = Sampler(4).sample(logits, entries_of(sequence(SamplingParams(logprobs=20, top_k=100, seed=0))))
    assert len(result.top_logprobs[0].token_ids) == 4


def test_nothing_is_kept_of_sequences_that_have_left():
    sampler = Sampler(VOCAB)
    params = SamplingParams(frequency_penalty=1.0)
    for i in range(50):
        sampler.sample(logits_for(3), entries_of(*(sequence(params, name=f"{i}-{j}") for j in range(3))))
    assert len(sampler._slots) == 3
    assert len(sampler._penalties._owner) <= 8


def test_a_batch_of_nothing_but_masks_and_nan_does_not_crash():
    """A model that gives NaN gives nonsense, not a dead engine."""
    sequences = [sequence(SamplingParams(seed=i, top_p=p)) for i, p in enumerate((1.0, 0.5))]
    tokens = Sampler(VOCAB).sample(torch.full((2, VOCAB), torch.nan), entries_of(*sequences)).token_ids
    assert all(0 <= token < VOCAB for token in tokens)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_draws_what_its_plain_reference_draws():
    """Rules applied and all. A CPU draws from the same distribution by another method, hence other tokens."""
    sequences = [sequence(SamplingParams(seed=i, **rules), output=(5, 8)) for i, rules in enumerate(RULES * 4)]
    logits = logits_for(len(sequences)).cuda()
    tokens = Sampler(VOCAB, "cuda").sample(logits.clone(), entries_of(*sequences)).token_ids
    with ops.use_backend("reference"):
        expected = Sampler(VOCAB, "cuda").sample(logits.clone(), entries_of(*sequences)).token_ids
    assert tokens == expected
    assert tokens[:6] == [89, 83, 22, 46, 5, 53], "as the reference draws on a CPU"
