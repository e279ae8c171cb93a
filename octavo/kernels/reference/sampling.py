"""Draws with per-row parameters in plain torch, by a full sort; the same noise, hence the same tokens, as the GPU's."""

import torch

from octavo.kernels.spec import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 0xFFFFFFFF


def refuses_sample_on_device(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor,
    truncates: bool,
) -> str | None:  # fmt: skip
    """The reference takes every call."""
    return None


def sample_on_device(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor,
    truncates: bool,
) -> Tensor:  # fmt: skip
    """(N, V) → (N,) int64: temperature, min_p, top_k, top_p, then the largest logit / T − log(exponential noise)."""
    vocab = logits.shape[1]
    greedy = temperature < 1e-5
    x = logits.double() / torch.where(greedy, 1.0, temperature)[:, None].double()
    kept = x >= x.amax(-1, keepdim=True) + min_p.double().log()[:, None]
    limit = torch.where((top_k <= 0) | (top_k > vocab), vocab, top_k).long()
    by_size = x.masked_fill(~kept, float("-inf")).sort(-1, descending=True).values
    kept &= x >= by_size.gather(1, limit[:, None] - 1)
    by_size = x.masked_fill(~kept, float("-inf")).sort(-1, descending=True).values
    mass = (by_size - by_size[:, :1]).exp()
    before = mass.cumsum(-1) - mass
    nucleus = before < top_p.double()[:, None] * mass.sum(-1, keepdim=True)
    kept &= (x >= by_size.gather(1, nucleus.sum(-1, keepdim=True) - 1)) | (top_p >= 1)[:, None]
    noise = _exponential(seeds, positions, vocab).log()
    return (x - torch.where(greedy[:, None], 0.0, noise)).masked_fill(~kept, float("-inf")).argmax(-1)


def _exponential(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """(N, vocab) fp64: a hash of seed, position and token, as an exponential variate."""
    state = _mix64(seeds + (positions + 1) * _signed(_GOLDEN))
    tokens = torch.arange(vocab, device=seeds.device)[None, :]
    h = _mix32((tokens * 0x9E3779B1 + (state >> 32)[:, None]) & _WORD)
    h = _mix32(h ^ (state & _WORD)[:, None])
    return -torch.log1p(-(h.double() + 0.5) * 2.0**-32)


def _signed(word: int) -> int:
    """A 64-bit word as int64 holds it."""
    return word - (1 << 64) if word >> 63 else word


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) in wrapping int64."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _mix32(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser (Appleby 2011) of 32-bit words in int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _WORD
    return x ^ (x >> 16)
