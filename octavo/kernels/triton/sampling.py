"""Tokens drawn on the device without a host read: one program per row; nothing is sorted.

A row that does not truncate is one pass: the largest logit / T − log(exponential noise), which is a draw from the
softmax (Gumbel-max). One that does looks for the lowest logit it keeps, first: the largest threshold at which the kept
entries are still enough, by count (top_k) or by mass (top_p). Eight thresholds near the largest logit are weighed in
one pass; the entries above the tightest that is enough, if at most `CAPACITY`, are gathered, and the search goes on
among these, else in the whole row. Entries equal to the threshold are all kept.

Noise is a hash of (seed, position, token), the same in the reference.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.spec import Tensor
from octavo.kernels.triton.early_launch import early_launch_options

CAPACITY = 2048
FEW_ROWS = 32  # up to which a row that does not truncate is shared by PARTS programs; only two kernels to compile
PARTS = 16


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _row_keys(seed, position):
    """Two 32-bit words of this row and position."""
    state = _mix64(seed.to(tl.uint64) + (position.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15)
    return (state >> 32).to(tl.uint32), (state & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def _log_exponential(token, key_a, key_b):
    """log of −log(1 − v), v an odd multiple of 2^-33: of an exponential variate whose small values, which win, are
    exact."""
    h = _mix32(_mix32(token.to(tl.uint32) * 0x9E3779B1 + key_a) ^ key_b)
    v = (h.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = v * (1.0 + v * (0.5 + v * (0.33333334 + v * 0.25)))
    return tl.log(tl.where(v < 0.015625, series, -tl.log(tl.maximum(1.0 - v, 2.9802322e-08))))


@triton.jit
def _entries(source, start, i, count):
    return tl.load(source + start + i, mask=start + i < count, other=float("-inf")).to(tl.float32)


@triton.jit
def _draw(source, ids, gathered, first, count, inverse_t, floor, key_a, key_b, noise, BLOCK: tl.constexpr):
    """The largest x / T − log(noise) of entries first … count - 1 at or above floor, and its token, the lowest among
    equals."""
    i = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_token = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    following = _entries(source, first, i, count)
    for start in range(first, count, BLOCK):
        x = following
        following = _entries(source, start + BLOCK, i, count)
        token = start + i
        if gathered:
            token = tl.load(ids + token, mask=token < count, other=0)
        score = x * inverse_t
        if noise:
            score -= _log_exponential(token, key_a, key_b)
        score = tl.where(x >= floor, score, float("-inf"))
        better = (score > best) | ((score == best) & (token < best_token))
        better = better & (start + i < count)
        best = tl.where(better, score, best)
        best_token = tl.where(better, token, best_token)
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, best_token, 0x7FFFFFFF), 0)


@triton.jit
def _range(source, count, BLOCK: tl.constexpr):
    """The largest entry and the smallest that is finite."""
    i = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    following = _entries(source, 0, i, count)
    for start in range(0, count, BLOCK):
        x = following
        following = _entries(source, start + BLOCK, i, count)
        top = tl.maximum(top, x)
        low = tl.minimum(low, tl.where(x == float("-inf"), float("inf"), x))
    return tl.max(top, 0), tl.min(low, 0)


@triton.jit
def _weigh(source, count, thresholds, top, inverse_t, floor, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Number and mass exp((x − top) / T) of the entries at or above each threshold, and the mass of all; entries under
    floor do not count."""
    i = tl.arange(0, BLOCK)
    number = tl.zeros((BLOCK, SPLITS), tl.float32)
    mass = tl.zeros((BLOCK, SPLITS), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    following = _entries(source, 0, i, count)
    for start in range(0, count, BLOCK):
        x = following
        following = _entries(source, start + BLOCK, i, count)
        kept = (x >= floor) & (x > float("-inf"))
        weight = tl.where(kept, tl.exp((x - top) * inverse_t), 0.0)
        total += weight
        above = kept[:, None] & (x[:, None] >= thresholds[None, :])
        number += above.to(tl.float32)
        mass += tl.where(above, weight[:, None], 0.0)
    return tl.sum(number, 0), tl.sum(mass, 0), tl.sum(total, 0)


@triton.jit
def _lowest_kept(
    source, count, low, top, inverse_t, wanted, BY_MASS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """A threshold that keeps what the largest one with at least `wanted` at or above it keeps; at `low` there is."""
    j = tl.arange(0, SPLITS) + 1
    high = top + tl.abs(top) * 1e-6 + 1e-30  # nothing is at or above it
    floor = low
    middle = low + (high - low) * 0.5
    rounds = 0
    while (middle > low) & (middle < high) & (rounds < 64):
        step = (high - low) * (1.0 / (SPLITS + 1))
        thresholds = low + step * j.to(tl.float32)
        number, mass, _ = _weigh(source, count, thresholds, top, inverse_t, floor, SPLITS, BLOCK)
        weight = mass if BY_MASS else number
        enough = weight >= wanted
        new_low = tl.max(tl.where(enough, thresholds, low), 0)
        new_high = tl.min(tl.where(enough, high, thresholds), 0)
        if not BY_MASS:
            exact = tl.max(((number == wanted) & enough).to(tl.int32), 0)
            rounds = tl.where(exact > 0, 64, rounds)
        stuck = (new_low == low) & (new_high == high)
        rounds = tl.where(stuck, 64, rounds + 1)
        low = new_low
        high = new_high
        middle = low + (high - low) * 0.5
    return low


@triton.jit
def _gather(source, count, threshold, to_x, to_ids, BLOCK: tl.constexpr):
    """Writes the entries at or above the threshold and their tokens, in order."""
    i = tl.arange(0, BLOCK)
    written = tl.zeros((), tl.int32)
    following = _entries(source, 0, i, count)
    for start in range(0, count, BLOCK):
        x = following
        following = _entries(source, start + BLOCK, i, count)
        kept = (x >= threshold) & (start + i < count)
        number = kept.to(tl.int32)
        if tl.max(number, 0) > 0:
            at = written + tl.cumsum(number, 0) - number
            tl.store(to_x + at, x.to(to_x.dtype.element_ty), mask=kept)
            tl.store(to_ids + at, start + i, mask=kept)
            written += tl.sum(number, 0)
    tl.debug_barrier()  # what other threads wrote is read next
    return written


@triton.jit
def sample_kernel(
    logits, temperature, top_k, top_p, min_p, seeds, positions, tokens, part_scores, part_tokens, scratch, scratch_ids,
    vocab, part_size, stride, PARTS: tl.constexpr,
    CAPACITY: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SEARCH: tl.constexpr,
):  # fmt: skip
    """Row `pid` of logits (N, vocab), which PARTS programs share where it does not truncate; one of them does it alone
    where it does. scratch (N, CAPACITY) of logits' dtype, scratch_ids (N, CAPACITY) int32."""
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * stride
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    t = tl.load(temperature + r)
    k = tl.load(top_k + r)
    k = tl.where((k <= 0) | (k > vocab), vocab, k)
    p = tl.load(top_p + r)
    least = tl.load(min_p + r)
    greedy = t < 1e-5
    inverse_t = tl.where(greedy, 1.0, 1.0 / tl.maximum(t, 1e-5))
    key_a, key_b = _row_keys(tl.load(seeds + r), tl.load(positions + r))
    part = tl.program_id(1)
    if greedy | ((k == vocab) & (p >= 1.0) & (least <= 0.0)):
        first = part * part_size
        end = tl.minimum(first + part_size, vocab)
        everything = float("-inf")
        score, token = _draw(
            row, scratch_ids, False, first, end, inverse_t, everything, key_a, key_b, t >= 1e-5, BLOCK
        )  # fmt: skip
    else:
        score = tl.full((), float("-inf"), tl.float32)
        token = tl.full((), 0x7FFFFFFF, tl.int32)
        if part == 0:
            token = _draw_truncated(
                row, scratch + r * CAPACITY, scratch_ids + r * CAPACITY, vocab, t, inverse_t, k, p, least, key_a, key_b,
                CAPACITY, SPLITS, BLOCK, BLOCK_SEARCH,
            )  # fmt: skip
            score = tl.full((), float("inf"), tl.float32)
    if PARTS == 1:
        tl.store(tokens + r, tl.minimum(token, vocab - 1).to(tl.int64))
    else:
        tl.store(part_scores + r * PARTS + part, score)
        tl.store(part_tokens + r * PARTS + part, token)


@triton.jit
def best_part_kernel(part_scores, part_tokens, tokens, vocab, PARTS: tl.constexpr, PDL: tl.constexpr):
    """The token of the best part of each row, the lowest among equals."""
    r = tl.program_id(0)
    i = tl.arange(0, PARTS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    score = tl.load(part_scores + r * PARTS + i)
    token = tl.load(part_tokens + r * PARTS + i)
    token = tl.min(tl.where(score == tl.max(score, 0), token, 0x7FFFFFFF), 0)
    tl.store(tokens + r, tl.minimum(token, vocab - 1).to(tl.int64))


@triton.jit
def _draw_truncated(
    row, found, ids, vocab, t, inverse_t, k, p, least, key_a, key_b,
    CAPACITY: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SEARCH: tl.constexpr,
):  # fmt: skip
    """A token of one row (vocab,); found and ids (CAPACITY,) are room for its likely entries."""
    top, bottom = _range(row, vocab, BLOCK)
    floor = bottom
    if least > 0.0:
        floor = tl.maximum(floor, top + t * tl.log(least))
    source = row
    count = vocab
    gathered = False
    if (k < vocab) | (p < 1.0):
        j = tl.arange(0, SPLITS).to(tl.float32)
        unit = tl.maximum(t, 0.5) * 0.3
        thresholds = tl.maximum(top - unit * (j + 1.0) * (j + 2.0), floor)
        number, mass, total = _weigh(row, vocab, thresholds, top, inverse_t, floor, SPLITS, BLOCK_SEARCH)
        enough = tl.where(k < vocab, number >= k.to(tl.float32), mass >= p * total) | (thresholds <= floor)
        tightest = tl.max(tl.where(enough & (number <= CAPACITY), thresholds, float("-inf")), 0)
        if tightest > float("-inf"):
            count = _gather(row, vocab, tightest, found, ids, BLOCK_SEARCH)
            floor = tightest
            source = found
            gathered = True
        floor = _truncate(source, count, k, p, floor, top, inverse_t, total, vocab, SPLITS, BLOCK_SEARCH)
    _, token = _draw(source, ids, gathered, 0, count, inverse_t, floor, key_a, key_b, True, BLOCK_SEARCH)
    return token


@triton.jit
def _truncate(source, count, k, p, floor, top, inverse_t, total, vocab, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The lowest entry that top_k, then top_p keep, of those at or above floor; total: the mass before top_k."""
    if k < count:
        floor = _lowest_kept(source, count, floor, top, inverse_t, k.to(tl.float32), False, SPLITS, BLOCK)
    if p < 1.0:
        if k < vocab:
            j = tl.arange(0, SPLITS).to(tl.float32)
            _, _, total = _weigh(source, count, j, top, inverse_t, floor, SPLITS, BLOCK)
        floor = _lowest_kept(source, count, floor, top, inverse_t, p * total, True, SPLITS, BLOCK)
    return floor


def refuses_sample_on_device(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> str | None:
    """Why this backend cannot take the call, or None."""
    return None if logits.stride(1) == 1 and logits.dtype != torch.float64 else "it takes contiguous rows up to fp32"


def sample_on_device(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    """(N, V) → (N,) int64."""
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return tokens
    early = early_launch_options(logits.device)
    scratch = torch.empty((rows, CAPACITY), dtype=logits.dtype, device=logits.device)
    scratch_ids = torch.empty((rows, CAPACITY), dtype=torch.int32, device=logits.device)
    parts = PARTS if rows <= FEW_ROWS else 1
    scores = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    part_tokens = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    sample_kernel[(rows, parts)](
        logits, temperature, top_k, top_p, min_p, seeds, positions, tokens, scores, part_tokens, scratch, scratch_ids,
        vocab, triton.cdiv(triton.cdiv(vocab, parts), 16) * 16, logits.stride(0), PARTS=parts, CAPACITY=CAPACITY,
        SPLITS=8, BLOCK=8192 if parts == 1 else 4096, BLOCK_SEARCH=2048, num_warps=16, **early,
    )  # fmt: skip
    if parts > 1:
        best_part_kernel[(rows,)](scores, part_tokens, tokens, vocab, PARTS=parts, num_warps=1, **early)
    return tokens
