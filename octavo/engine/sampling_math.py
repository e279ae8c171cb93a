"""The arithmetic of drawing tokens on a CPU, on whole batches: noise, softmax by rejection, top-k and nucleus.

A draw needs a few uniform numbers, taken from a counter-based hash of (seed, candidate, position). So a request's
tokens depend on nothing but its own seed and logits: not on its neighbours, on preemption, or on the order of the batch
(a shared generator, or one with state, would give that up).

Nothing here exponentiates or sorts a vocabulary unless it must. Drawing from the whole softmax reads the logits once,
for the largest of every 16, proposes tokens by those and rejects to the exact distribution. Truncation looks at the
largest 64 entries; a wider nucleus takes the entries above a threshold, and sorts these. (On a GPU
`octavo.ops.sample_on_device` serves instead.)
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

Tensor = torch.Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_GROUP = 16  # entries behind one maximum, in strides of V / 16
_PROPOSALS = 32  # at a time: one in 16 or more is accepted
_SMALL_VOCABULARY = 8192  # up to which all entries are exponentiated, or sorted, for all rows at once
_MOST_PROPOSALS = 1024
_NUCLEUS_WIDTH = 64  # the usual nucleus has fewer entries; the full sort costs 50 times as much


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), element by element: a bijection with full avalanche."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_seed(seed: int, stream: int) -> int:
    """The seed of an independent stream (a candidate of `n`, a sequence) under `seed`; any Python ints."""
    words = np.array([seed & 0xFFFFFFFFFFFFFFFF, stream & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    return int(mix64(mix64(words[:1] + _GOLDEN) + words[1:] * _GOLDEN)[0])


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position), 53 bits, the same on every machine."""
    state = mix64(seeds + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (mix64(state + _GOLDEN) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _proposals(
    seeds: NDArray[np.uint64], positions: NDArray[np.int64], first: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two numbers in [0, 1) for each (seed, position) and attempt first, first + 1, …: (N, _PROPOSALS) each; none of
    them is one of `uniforms`."""
    state = mix64(seeds + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    attempts = np.arange(first, first + _PROPOSALS, dtype=np.uint64)
    counters = np.stack((2 * attempts + 2, 2 * attempts + 3))
    bits = mix64(state[:, None] + counters[:, None, :] * _GOLDEN) >> np.uint64(11)
    one, other = bits.astype(np.float64) * 2.0**-53
    return one, other


def argmax(logits: Tensor) -> Tensor:
    """(N, V) → (N,) int64. NumPy's is 13 times as fast as torch's on one CPU core."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def sample_softmax(
    logits: Tensor, temperature: Tensor, seeds: NDArray[np.uint64], positions: NDArray[np.int64]
) -> Tensor:
    """Draws from softmax(logits / temperature), logits (N, V) fp32, temperature (N, 1).

    Rejection (von Neumann 1951): a group of 16 entries is proposed by the weight of its largest, one of its entries
    evenly, which is accepted with the ratio of its weight to the group's largest. A row without luck in 1024 attempts
    is drawn by inverse CDF.
    """
    n, vocab = logits.shape
    if vocab <= _SMALL_VOCABULARY:
        return sample_distribution((logits / temperature).softmax(-1), torch.from_numpy(uniforms(seeds, positions)))
    groups = -(-vocab // _GROUP)
    if vocab != groups * _GROUP:
        logits = torch.nn.functional.pad(logits, (0, groups * _GROUP - vocab), value=float("-inf"))
    best = logits.view(n, _GROUP, groups).amax(1)
    scaled = (best - best.amax(-1, keepdim=True)) / temperature
    cumulative = scaled.exp().double().cumsum(-1)
    tokens = torch.empty(n, dtype=torch.int64)
    rows = torch.arange(n)
    for first in range(0, _MOST_PROPOSALS, _PROPOSALS):
        to_group, to_entry = _proposals(seeds[rows.numpy()], positions[rows.numpy()], first)
        weights = cumulative if first == 0 else cumulative[rows]
        group = _invert(weights, torch.from_numpy(to_group) * weights[:, -1:])
        entry = torch.from_numpy(to_entry) * _GROUP
        member = entry.floor()
        token = member.long() * groups + group
        below = (logits[rows[:, None], token] - best[rows[:, None], group]) / temperature[rows]
        accepted = entry - member < below.double().exp()
        found = accepted.any(1)
        first_accepted = accepted.long().argmax(1, keepdim=True)
        tokens[rows[found]] = token.gather(1, first_accepted).squeeze(1)[found]
        rows = rows[~found]
        if not len(rows):
            return tokens
    uniform = torch.from_numpy(uniforms(seeds[rows.numpy()], positions[rows.numpy()]))
    tokens[rows] = sample_distribution((logits[rows] / temperature[rows]).softmax(-1), uniform).clamp_(max=vocab - 1)
    return tokens


def sample_distribution(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draws one index per row of unnormalised `probs` (N, V) fp32 by inverse CDF; `uniform` (N,) float64 in [0, 1).

    Two levels: sums of strided groups of 64 entries, then the entries of the chosen group. A flat fp32 sum over a
    vocabulary would lose its small entries, a flat fp64 one is four times slower. An entry of probability 0 is never
    drawn.
    """
    n, vocab = probs.shape
    groups = -(-vocab // 64)
    if vocab != groups * 64:
        probs = torch.nn.functional.pad(probs, (0, groups * 64 - vocab))
    grid = probs.view(n, 64, groups)  # entry i lies in group i % groups
    cumulative = grid.sum(1).double().cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    group = _invert(cumulative, target)
    below = torch.where(group > 0, cumulative.gather(1, (group - 1).clamp(min=0)), 0.0)
    members = grid.gather(2, group[:, None].expand(n, 64, 1)).squeeze(2).double().cumsum(-1)
    member = _invert(members, target - below)
    return (member * groups + group).squeeze(1).clamp_(max=vocab - 1)  # only NaN reaches the padding


def _invert(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first index of each row whose cumulative weight (N, K) exceeds `target` (N, 1); never an entry of weight 0.

    Rounding may lift a target to the total, so it is held just below; a row of NaN gives its last index, not an error.
    """
    below_total = torch.nextafter(cumulative[:, -1:], torch.zeros_like(target))
    index = torch.searchsorted(cumulative, torch.minimum(target, below_total), right=True)
    return index.clamp_(max=cumulative.shape[1] - 1)


def top_entries(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (N, V), descending, and their indices: torch.topk, 2 to 4 times as fast on a CPU.

    The k largest lie in the k strided groups with the largest maxima, so most of the row is only read for its maxima.
    """
    n, vocab = x.shape
    size = 16
    groups = vocab // size
    if k > groups // 4 or vocab % size:
        values, indices = x.topk(min(k, vocab), dim=-1)
        return values, indices
    best = x.view(n, size, groups).amax(1).topk(k, dim=-1, sorted=False).indices
    indices = (best[:, None, :] + torch.arange(size, device=x.device)[:, None] * groups).view(n, -1)
    values, order = x.gather(1, indices).topk(k, dim=-1)
    return values, indices.gather(1, order)


def sample_truncated(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Draws from the nucleus `top_p` (N,) of the `top_k` (N,) likeliest entries of logits (N, V) / temperature (N, 1).

    The nucleus is the shortest run of the likeliest entries whose renormalised probability reaches top_p (Holtzman et
    al. 2020); the first entry always belongs to it. top_k must be in [1, V].
    """
    vocab = logits.shape[1]
    limited = top_k[top_k < vocab]
    width = min(max(_NUCLEUS_WIDTH, int(limited.max()) if len(limited) else 0), vocab)
    values, ids = top_entries(logits, width)
    inside_k = torch.arange(width) < top_k[:, None]
    weights = ((values - values[:, :1]) / temperature).exp().double() * inside_k
    through = weights.cumsum(-1)
    mass = through[:, -1].clone()
    partly = torch.nonzero(top_k > width).squeeze(1)  # rows whose mass is not all in these entries
    wide = {}
    found, shares = through[:, -1].tolist(), top_p.tolist()
    for row, exponentials in _exponentials(logits, values[:, :1], temperature, partly):
        mass[row] = total = float(exponentials.sum())
        if found[row] < shares[row] * total:
            lightest = float(weights[row, -1])
            wide[row] = _pick_wide(exponentials, lightest, shares[row] * total, float(uniform[row]))
    through = (weights * (through - weights < (top_p.double() * mass)[:, None])).cumsum(-1)
    index = _invert(through, uniform[:, None] * through[:, -1:])
    tokens = ids.gather(1, index).squeeze(1)
    if wide:
        tokens[list(wide)] = torch.tensor(list(wide.values()))
    return tokens


def _exponentials(
    logits: Tensor, top: Tensor, temperature: Tensor, rows: Tensor
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(row, exp((logits − top) / temperature)) of each of `rows`, to be read before the next is taken: a large row is
    made in one buffer, which stays in the L2 cache, while small ones are made at once."""
    if logits.shape[1] <= _SMALL_VOCABULARY:
        together = ((logits[rows] - top[rows]) / temperature[rows]).exp_().numpy()
        yield from zip(rows.tolist(), together, strict=True)
        return
    buffer = np.empty(logits.shape[1], dtype=np.float32)
    for row in rows.tolist():
        np.subtract(logits[row].numpy(), np.float32(top[row]), out=buffer)
        np.multiply(buffer, np.float32(1 / temperature[row]), out=buffer)
        yield row, np.exp(buffer, out=buffer)


def _pick_wide(weights: NDArray[np.float32], lightest: float, wanted: float, uniform: float) -> int:
    """A token of one row (V,), of the heaviest before which less than `wanted` lies, which needs some lighter than
    `lightest`: ever lighter ones are gathered until they are enough."""
    while True:
        lightest = lightest / 8 if lightest > 1e-30 else 0.0
        ids = np.flatnonzero(weights >= lightest)
        kept = weights[ids].astype(np.float64)
        if lightest == 0.0 or kept.sum() >= wanted:
            break
    order = np.argsort(-kept, kind="stable")
    through = kept[order].cumsum()
    size = int(np.searchsorted(through, wanted)) + 1  # the first of them reaches it
    through = through[:size]
    drawn = min(int(np.searchsorted(through, uniform * through[-1], side="right")), len(through) - 1)
    return int(ids[order[drawn]])
