"""The arithmetic of drawing tokens, on whole batches: noise, top-k, nucleus and inverse-CDF sampling.

A draw needs one uniform number per token, taken from a counter-based hash of (seed, candidate, position). So a
request's tokens depend on nothing but its own seed and logits: not on its neighbours, on preemption, or on the order of
the batch (a shared generator, or one with state, would give that up). The number then picks a token from the cumulative
distribution; noise for every vocabulary entry (Gumbel, exponential) would cost 30 times as much on a CPU.

Nothing here sorts a vocabulary unless it must: truncation looks at the largest 64 entries, then 1024, then all.
"""

import numpy as np
import torch
from numpy.typing import NDArray

Tensor = torch.Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_NUCLEUS_WIDTHS = (64, 1024)  # a 64-token nucleus is the usual case; the full sort costs 50 times as much


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


def argmax(logits: Tensor) -> Tensor:
    """(N, V) → (N,) int64. NumPy's is 13 times as fast as torch's on one CPU core."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


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


def sample_truncated(logits: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Draws from the nucleus `top_p` (N,) of the `top_k` (N,) likeliest entries of `logits` (N, V), temperature
    applied.

    The nucleus is the shortest run of the likeliest entries whose renormalised probability reaches top_p (Holtzman et
    al. 2020); the first entry always belongs to it. top_k must be in [1, V].
    """
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    rows = torch.arange(len(logits), device=logits.device)
    vocab = logits.shape[1]
    limited = top_k[top_k < vocab]
    widest_k = int(limited.max()) if len(limited) else 0
    for width in (*(w for w in _NUCLEUS_WIDTHS if w < vocab), vocab):
        if width < widest_k and width < vocab:
            continue
        drawn, enough = _sample_from_top(logits, top_k, top_p, uniform, width)
        tokens[rows[enough]] = drawn[enough]
        if bool(enough.all()):
            break
        missing = ~enough
        rows, logits, top_k, top_p, uniform = (t[missing] for t in (rows, logits, top_k, top_p, uniform))
    return tokens


def _sample_from_top(
    logits: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """One attempt with `width` candidates; the second result says for which rows they were enough."""
    values, ids = top_entries(logits, width)
    inside_k = torch.arange(width, device=logits.device) < top_k[:, None]
    weights = (values - values[:, :1]).exp().double() * inside_k
    through = weights.cumsum(-1)
    complete = top_k <= width
    mass = through[:, -1]
    if not bool(complete.all()):
        mass = torch.where(complete, mass, (logits.logsumexp(-1) - values[:, 0]).double().exp())
    wanted = (top_p.double() * mass)[:, None]
    enough = complete | (through[:, -1] >= wanted[:, 0])
    through = (weights * (through - weights < wanted)).cumsum(-1)
    index = _invert(through, uniform[:, None] * through[:, -1:])
    return ids.gather(1, index).squeeze(1), enough
