"""Tokens drawn on the device without a host read; nothing is sorted.

A row that does not truncate is one pass: the largest logit / T − log(exponential noise), which is a draw from the
softmax (Gumbel-max). One that does looks for the lowest logit it keeps, first: the largest threshold at which the kept
entries are still enough, by count (top_k) or by mass (top_p). Eight thresholds near the largest logit are weighed in
one pass; the entries above the tightest that is enough, if at most `CAPACITY`, are gathered, and the search goes on
among these, else in the whole row. Entries equal to the threshold are all kept.

A program does a whole row. Where rows are few, `PARTS` programs share each, pass by pass: one launch for the largest
logit (or the draw), one each to weigh, to gather and to finish; rows without truncation skip the middle.

Noise is a hash of (seed, position, token), the same in the reference.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.spec import Tensor
from octavo.kernels.triton.early_launch import early_launch_options

CAPACITY = 8192
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
def _range(source, first, count, BLOCK: tl.constexpr):
    """The largest of entries first … count - 1 and the smallest that is finite."""
    i = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    following = _entries(source, first, i, count)
    for start in range(first, count, BLOCK):
        x = following
        following = _entries(source, start + BLOCK, i, count)
        top = tl.maximum(top, x)
        low = tl.minimum(low, tl.where(x == float("-inf"), float("inf"), x))
    return tl.max(top, 0), tl.min(low, 0)


@triton.jit
def _weigh(source, first, count, thresholds, top, inverse_t, floor, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Number and mass exp((x − top) / T) of the entries at or above each threshold, and the mass of all; entries under
    floor do not count."""
    i = tl.arange(0, BLOCK)
    number = tl.zeros((BLOCK, SPLITS), tl.float32)
    mass = tl.zeros((BLOCK, SPLITS), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    following = _entries(source, first, i, count)
    for start in range(first, count, BLOCK):
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
        number, mass, _ = _weigh(source, 0, count, thresholds, top, inverse_t, floor, SPLITS, BLOCK)
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
def _gather(source, first, count, threshold, to_x, to_ids, BLOCK: tl.constexpr):
    """Writes the entries at or above the threshold and their tokens, in order."""
    i = tl.arange(0, BLOCK)
    written = tl.zeros((), tl.int32)
    following = _entries(source, first, i, count)
    for start in range(first, count, BLOCK):
        x = following
        following = _entries(source, start + BLOCK, i, count)
        kept = (x >= threshold) & (start + i < count)
        number = kept.to(tl.int32)
        if tl.max(number, 0) > 0:
            at = written + tl.cumsum(number, 0) - number
            tl.store(to_x + at, x.to(to_x.dtype.element_ty), mask=kept)
            tl.store(to_ids + at, start + i, mask=kept)
            written += tl.sum(number, 0)
    return written


@triton.jit
def _parameters(r, temperature, top_k, top_p, min_p, vocab):
    """(T, 1 / T, top_k, top_p, min_p, whether the row truncates) of row r; a greedy row does not."""
    t = tl.load(temperature + r)
    k = tl.load(top_k + r)
    k = tl.where((k <= 0) | (k > vocab), vocab, k)
    p = tl.load(top_p + r)
    least = tl.load(min_p + r)
    greedy = t < 1e-5
    inverse_t = tl.where(greedy, 1.0, 1.0 / tl.maximum(t, 1e-5))
    return t, inverse_t, k, p, least, ((k < vocab) | (p < 1.0) | (least > 0.0)) & (t >= 1e-5)


@triton.jit
def _thresholds(top, bottom, t, least, SPLITS: tl.constexpr):
    """(lowest logit that min_p allows, SPLITS thresholds from there to the largest logit)."""
    floor = bottom
    if least > 0.0:
        floor = tl.maximum(floor, top + t * tl.log(least))
    j = tl.arange(0, SPLITS).to(tl.float32)
    return floor, tl.maximum(top - tl.maximum(t, 0.5) * 0.3 * (j + 1.0) * (j + 2.0), floor)


@triton.jit
def _tightest(number, mass, total, thresholds, floor, k, p, vocab, CAPACITY: tl.constexpr):
    """The largest threshold above which there is enough, and not too much to gather; −inf if there is none."""
    enough = tl.where(k < vocab, number >= k.to(tl.float32), mass >= p * total) | (thresholds <= floor)
    return tl.max(tl.where(enough & (number <= CAPACITY), thresholds, float("-inf")), 0)


@triton.jit
def sample_kernel(
    logits, temperature, top_k, top_p, min_p, seeds, positions, tokens, part_tops, part_bottoms, part_tokens, scratch,
    scratch_ids, vocab, part_size, stride, PARTS: tl.constexpr,
    CAPACITY: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SEARCH: tl.constexpr,
):  # fmt: skip
    """Part `pid 1` of row `pid 0` of logits (N, vocab). One part: the token. More: the best of the part, or its range
    where the row truncates; part_… (N, PARTS). scratch (N, CAPACITY) of logits' dtype, scratch_ids int32."""
    r = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = logits + r * stride
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    t, inverse_t, k, p, least, truncates = _parameters(r, temperature, top_k, top_p, min_p, vocab)
    key_a, key_b = _row_keys(tl.load(seeds + r), tl.load(positions + r))
    first = part * part_size
    end = tl.minimum(first + part_size, vocab)
    token = tl.full((), 0, tl.int32)
    score = tl.full((), 0.0, tl.float32)
    if not truncates:
        score, token = _draw(
            row, scratch_ids, False, first, end, inverse_t, float("-inf"), key_a, key_b, t >= 1e-5, BLOCK
        )  # fmt: skip
    elif PARTS == 1:
        token = _draw_truncated(
            row, scratch + r * CAPACITY, scratch_ids + r * CAPACITY, vocab, t, inverse_t, k, p, least, key_a, key_b,
            CAPACITY, SPLITS, BLOCK, BLOCK_SEARCH,
        )  # fmt: skip
    else:
        score, bottom = _range(row, first, end, BLOCK)
        tl.store(part_bottoms + r * PARTS + part, bottom)
    if PARTS == 1:
        tl.store(tokens + r, tl.minimum(token, vocab - 1).to(tl.int64))
    else:
        tl.store(part_tops + r * PARTS + part, score)
        tl.store(part_tokens + r * PARTS + part, token)


@triton.jit
def _draw_truncated(
    row, found, ids, vocab, t, inverse_t, k, p, least, key_a, key_b,
    CAPACITY: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SEARCH: tl.constexpr,
):  # fmt: skip
    """A token of one row (vocab,); found and ids (CAPACITY,) are room for its likely entries."""
    top, bottom = _range(row, 0, vocab, BLOCK)
    floor, thresholds = _thresholds(top, bottom, t, least, SPLITS)
    number, mass, total = _weigh(row, 0, vocab, thresholds, top, inverse_t, floor, SPLITS, BLOCK_SEARCH)
    tightest = _tightest(number, mass, total, thresholds, floor, k, p, vocab, CAPACITY)
    source = row
    count = vocab
    gathered = False
    if tightest > float("-inf"):
        count = _gather(row, 0, vocab, tightest, found, ids, BLOCK_SEARCH)
        tl.debug_barrier()  # what other threads wrote is read next
        floor = tightest
        source = found
        gathered = True
    floor = _truncate(source, count, k, p, floor, top, inverse_t, total, vocab, SPLITS, BLOCK_SEARCH)
    _, token = _draw(source, ids, gathered, 0, count, inverse_t, floor, key_a, key_b, True, BLOCK_SEARCH)
    return token


@triton.jit
def _range_of_parts(r, part_tops, part_bottoms, PARTS: tl.constexpr):
    i = tl.arange(0, PARTS)
    top = tl.max(tl.load(part_tops + r * PARTS + i), 0)
    return top, tl.min(tl.load(part_bottoms + r * PARTS + i), 0)


@triton.jit
def _weights_of_parts(r, part_weights, PARTS: tl.constexpr, SPLITS: tl.constexpr):
    """(number of each part and threshold, their sums, masses, mass of all)."""
    at = part_weights + (r * PARTS + tl.arange(0, PARTS)[:, None]) * (3 * SPLITS) + tl.arange(0, SPLITS)[None, :]
    numbers = tl.load(at)
    total = tl.max(tl.sum(tl.load(at + 2 * SPLITS), 0), 0)
    return numbers, tl.sum(numbers, 0), tl.sum(tl.load(at + SPLITS), 0), total


@triton.jit
def weigh_part_kernel(
    logits, temperature, top_k, top_p, min_p, part_tops, part_bottoms, part_weights, vocab, part_size, stride,
    PARTS: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """part_weights (N, PARTS, 3, SPLITS): number and mass above each threshold, and SPLITS times the mass of all."""
    r = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    t, inverse_t, _, _, least, truncates = _parameters(r, temperature, top_k, top_p, min_p, vocab)
    if truncates:
        top, bottom = _range_of_parts(r, part_tops, part_bottoms, PARTS)
        floor, thresholds = _thresholds(top, bottom, t, least, SPLITS)
        first = part * part_size
        end = tl.minimum(first + part_size, vocab)
        row = logits + r * stride
        number, mass, total = _weigh(row, first, end, thresholds, top, inverse_t, floor, SPLITS, BLOCK)
        to = part_weights + (r * PARTS + part) * (3 * SPLITS) + tl.arange(0, SPLITS)
        tl.store(to, number)
        tl.store(to + SPLITS, mass)
        tl.store(to + 2 * SPLITS, tl.zeros((SPLITS,), tl.float32) + total)


@triton.jit
def gather_part_kernel(
    logits, temperature, top_k, top_p, min_p, part_tops, part_bottoms, part_weights, scratch, scratch_ids, vocab,
    part_size, stride,
    PARTS: tl.constexpr, CAPACITY: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each part writes its entries behind those of the parts before it."""
    r = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    t, _, k, p, least, truncates = _parameters(r, temperature, top_k, top_p, min_p, vocab)
    if truncates:
        top, bottom = _range_of_parts(r, part_tops, part_bottoms, PARTS)
        floor, thresholds = _thresholds(top, bottom, t, least, SPLITS)
        numbers, number, mass, total = _weights_of_parts(r, part_weights, PARTS, SPLITS)
        tightest = _tightest(number, mass, total, thresholds, floor, k, p, vocab, CAPACITY)
        if tightest > float("-inf"):
            mine = tl.max(tl.where(thresholds[None, :] == tightest, numbers, 0.0), 1)
            before = tl.sum(tl.where(tl.arange(0, PARTS) < part, mine, 0.0), 0).to(tl.int32)
            first = part * part_size
            end = tl.minimum(first + part_size, vocab)
            at = r * CAPACITY + before
            _gather(logits + r * stride, first, end, tightest, scratch + at, scratch_ids + at, BLOCK)


@triton.jit
def finish_kernel(
    logits, temperature, top_k, top_p, min_p, seeds, positions, tokens, part_tops, part_bottoms, part_tokens,
    part_weights, scratch, scratch_ids, vocab, stride,
    PARTS: tl.constexpr, CAPACITY: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token of each row: of the best part, the lowest among equals, or drawn from what was gathered."""
    r = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    t, inverse_t, k, p, least, truncates = _parameters(r, temperature, top_k, top_p, min_p, vocab)
    if truncates:
        key_a, key_b = _row_keys(tl.load(seeds + r), tl.load(positions + r))
        top, bottom = _range_of_parts(r, part_tops, part_bottoms, PARTS)
        floor, thresholds = _thresholds(top, bottom, t, least, SPLITS)
        _, number, mass, total = _weights_of_parts(r, part_weights, PARTS, SPLITS)
        tightest = _tightest(number, mass, total, thresholds, floor, k, p, vocab, CAPACITY)
        source = logits + r * stride
        count = vocab
        gathered = False
        if tightest > float("-inf"):
            count = tl.max(tl.where(thresholds == tightest, number, 0.0), 0).to(tl.int32)
            floor = tightest
            source = scratch + r * CAPACITY
            gathered = True
        floor = _truncate(source, count, k, p, floor, top, inverse_t, total, vocab, SPLITS, BLOCK)
        ids = scratch_ids + r * CAPACITY
        _, token = _draw(source, ids, gathered, 0, count, inverse_t, floor, key_a, key_b, True, BLOCK)
    else:
        i = tl.arange(0, PARTS)
        score = tl.load(part_tops + r * PARTS + i)
        token = tl.load(part_tokens + r * PARTS + i)
        token = tl.min(tl.where(score == tl.max(score, 0), token, 0x7FFFFFFF), 0)
    tl.store(tokens + r, tl.minimum(token, vocab - 1).to(tl.int64))


@triton.jit
def _truncate(source, count, k, p, floor, top, inverse_t, total, vocab, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The lowest entry that top_k, then top_p keep, of those at or above floor; total: the mass before top_k."""
    if k < count:
        floor = _lowest_kept(source, count, floor, top, inverse_t, k.to(tl.float32), False, SPLITS, BLOCK)
    if p < 1.0:
        if k < vocab:
            j = tl.arange(0, SPLITS).to(tl.float32)
            _, _, total = _weigh(source, 0, count, j, top, inverse_t, floor, SPLITS, BLOCK)
        floor = _lowest_kept(source, count, floor, top, inverse_t, p * total, True, SPLITS, BLOCK)
    return floor


def refuses_sample_on_device(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor,
    truncates: bool,
) -> str | None:  # fmt: skip
    """Why this backend cannot take the call, or None."""
    return None if logits.stride(1) == 1 and logits.dtype != torch.float64 else "it takes contiguous rows up to fp32"


def sample_on_device(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor,
    truncates: bool,
) -> Tensor:  # fmt: skip
    """(N, V) → (N,) int64. truncates: some row may have a top_k, top_p or min_p."""
    rows, vocab = logits.shape
    device = logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    if rows == 0:
        return tokens
    parts = PARTS if rows <= FEW_ROWS else 1
    tops, bottoms = torch.empty((2, rows, parts), dtype=torch.float32, device=device)
    part_tokens = torch.empty((rows, parts), dtype=torch.int32, device=device)
    scratch = torch.empty((rows, CAPACITY), dtype=logits.dtype, device=device)
    scratch_ids = torch.empty((rows, CAPACITY), dtype=torch.int32, device=device)
    given = logits, temperature, top_k, top_p, min_p
    part_size = triton.cdiv(triton.cdiv(vocab, parts), 16) * 16
    sizes = vocab, part_size, logits.stride(0)
    options = {"PARTS": parts, "SPLITS": 8, **early_launch_options(device)}
    sample_kernel[(rows, parts)](
        *given, seeds, positions, tokens, tops, bottoms, part_tokens, scratch, scratch_ids, *sizes,
        CAPACITY=CAPACITY, BLOCK=8192 if parts == 1 else 4096, BLOCK_SEARCH=2048, num_warps=16, **options,
    )  # fmt: skip
    if parts == 1:
        return tokens
    weights = torch.empty((rows, parts, 3, 8), dtype=torch.float32, device=device)
    if truncates:
        weigh_part_kernel[(rows, parts)](
            *given, tops, bottoms, weights, *sizes, BLOCK=2048, num_warps=16, **options,
        )  # fmt: skip
        gather_part_kernel[(rows, parts)](
            *given, tops, bottoms, weights, scratch, scratch_ids, *sizes,
            CAPACITY=CAPACITY, BLOCK=2048, num_warps=16, **options,
        )  # fmt: skip
    finish_kernel[(rows,)](
        *given, seeds, positions, tokens, tops, bottoms, part_tokens, weights, scratch, scratch_ids, vocab,
        logits.stride(0), CAPACITY=CAPACITY, BLOCK=2048, num_warps=16, **options,
    )  # fmt: skip
    return tokens
