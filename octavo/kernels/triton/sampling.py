"""Tokens drawn on the device without a host read; nothing is sorted.

A row that does not truncate is one pass: the largest logit / T − log(exponential noise), which is a draw from the
softmax (Gumbel-max). One that does needs the lowest logit it keeps, first: the largest threshold at which the kept
entries are still enough, by count (top_k) or by mass (top_p). It lies in a *bracket*: at `low` there is enough, at
`high` there is not. One pass weighs eight thresholds near the largest logit; where more than `CAPACITY` entries are at
or above `low`, others weigh eight within the bracket. Then the entries at or above `low`, or if these are too many
those of the bracket alone, are gathered, and the search ends among them; if even these are too many, in the whole row.
The token is drawn from what was gathered, or in another pass over the row. Entries equal to the threshold are all kept.

`PARTS` programs share each row, pass by pass; a kernel's programs leave at once where a row has no need of it.

Noise is a hash of (seed, position, token), the same in the reference.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.spec import Tensor
from octavo.kernels.triton.early_launch import early_launch_options
from octavo.kernels.triton.launch import ceil_div, launch_by_arguments

CAPACITY = 8192
PARTS = 16
SPLITS = 8  # thresholds weighed in one pass
PASSES = 3  # at most, with thresholds nine times as close each time
BLOCK = 2048


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
    source, count, low, high, above, inverse_t, top, wanted, BY_MASS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A threshold in [low, high) that keeps what the largest one with at least `wanted` keeps; `above`: what is at or
    above high and not in source. At low there is enough, at high there is not."""
    j = tl.arange(0, SPLITS) + 1
    floor = low
    number_low = tl.full((), 3.0e38, tl.float32)
    number_high = tl.full((), -1.0, tl.float32)
    middle = low + (high - low) * 0.5
    rounds = 0
    while (middle > low) & (middle < high) & (rounds < 64):
        step = (high - low) * (1.0 / (SPLITS + 1))
        thresholds = low + step * j.to(tl.float32)
        number, mass, _ = _weigh(source, 0, count, thresholds, top, inverse_t, floor, SPLITS, BLOCK)
        weight = mass if BY_MASS else number
        enough = weight + above >= wanted
        new_low = tl.max(tl.where(enough, thresholds, low), 0)
        new_high = tl.min(tl.where(enough, high, thresholds), 0)
        number_low = tl.min(tl.where(enough, number, number_low), 0)
        number_high = tl.max(tl.where(enough, number_high, number), 0)
        stuck = ((new_low == low) & (new_high == high)) | (number_low <= number_high + 1.0)  # one entry is left
        rounds = tl.where(stuck, 64, rounds + 1)
        low = new_low
        high = new_high
        middle = low + (high - low) * 0.5
    return low


@triton.jit
def _gather(source, first, count, low, high, to_x, to_ids, BLOCK: tl.constexpr):
    """Writes the entries in [low, high) and their tokens, in order."""
    i = tl.arange(0, BLOCK)
    written = tl.zeros((), tl.int32)
    following = _entries(source, first, i, count)
    for start in range(first, count, BLOCK):
        x = following
        following = _entries(source, start + BLOCK, i, count)
        kept = (x >= low) & (x < high) & (start + i < count)
        number = kept.to(tl.int32)
        if tl.max(number, 0) > 0:
            at = written + tl.cumsum(number, 0) - number
            tl.store(to_x + at, x.to(to_x.dtype.element_ty), mask=kept)
            tl.store(to_ids + at, start + i, mask=kept)
            written += tl.sum(number, 0)


@triton.jit
def _begin(logits, temperature, top_k, top_p, min_p, vocab, part_size, stride, PDL: tl.constexpr):
    """Of this program's row: its number, its logits, the first entry and the end of this program's part, T, 1 / T,
    top_k, top_p, min_p, and whether it truncates; a greedy row does not."""
    r = tl.program_id(0).to(tl.int64)
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
    truncates = ((k < vocab) | (p < 1.0) | (least > 0.0)) & (t >= 1e-5)
    first = tl.program_id(1) * part_size
    return r, logits + r * stride, first, tl.minimum(first + part_size, vocab), t, inverse_t, k, p, least, truncates


@triton.jit
def _thresholds(r, part_tops, part_bottoms, t, least, PARTS: tl.constexpr, SPLITS: tl.constexpr):
    """(largest logit, lowest that min_p allows, SPLITS thresholds between)."""
    i = tl.arange(0, PARTS)
    top = tl.max(tl.load(part_tops + r * PARTS + i), 0)
    floor = tl.min(tl.load(part_bottoms + r * PARTS + i), 0)
    if least > 0.0:
        floor = tl.maximum(floor, top + t * tl.log(least))
    j = tl.arange(0, SPLITS).to(tl.float32)
    return top, floor, tl.maximum(top - tl.maximum(t, 0.5) * 0.3 * (j + 1.0) * (j + 2.0), floor)


@triton.jit
def _narrow(
    low, high, part_low, part_high, above, weights, thresholds, by_count, wanted, floor,
    PARTS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The bracket after a pass weighed `thresholds`: (low, high, entries of each part at or above low, and high, number
    or mass at or above high). weights (PARTS, 3, SPLITS)."""
    at = weights + tl.arange(0, PARTS)[:, None] * (3 * SPLITS) + tl.arange(0, SPLITS)[None, :]
    numbers = tl.load(at)
    weight = tl.where(by_count, tl.sum(numbers, 0), tl.sum(tl.load(at + SPLITS), 0))
    enough = (weight >= wanted) | (thresholds <= floor)
    new_low = tl.max(tl.where(enough, thresholds, low), 0)
    new_high = tl.min(tl.where(enough, high, thresholds), 0)
    is_low = enough & (thresholds == new_low)
    is_high = (thresholds == new_high) & (enough == 0)
    if tl.max(is_low.to(tl.int32), 0) > 0:
        part_low = tl.max(tl.where(is_low[None, :], numbers, 0.0), 1)
    if tl.max(is_high.to(tl.int32), 0) > 0:
        part_high = tl.max(tl.where(is_high[None, :], numbers, 0.0), 1)
        above = tl.max(tl.where(is_high, weight, 0.0), 0)
    return new_low, new_high, part_low, part_high, above


@triton.jit
def _within(low, high, top, SPLITS: tl.constexpr):
    """SPLITS thresholds inside of the bracket."""
    j = tl.arange(0, SPLITS).to(tl.float32) + 1.0
    return low + (tl.minimum(high, top) - low) * (j / (SPLITS + 1))


@triton.jit
def _bracket(
    r, passes, part_weights, top, floor, thresholds, k, p, vocab,
    PASSES: tl.constexpr, PARTS: tl.constexpr, CAPACITY: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The bracket after so many passes, as `_narrow` has it, and the mass of all; before the first, it holds all."""
    by_count = k < vocab
    weights = part_weights + r * (PASSES * PARTS * 3 * SPLITS)
    low = floor
    high = tl.full((), float("inf"), tl.float32)
    part_low = tl.full((PARTS,), CAPACITY, tl.float32)  # not known: too many to gather
    part_high = tl.zeros((PARTS,), tl.float32)
    above = tl.zeros((), tl.float32)
    total = tl.zeros((), tl.float32)
    if passes > 0:
        total = tl.sum(tl.load(weights + tl.arange(0, PARTS) * (3 * SPLITS) + 2 * SPLITS), 0)
        wanted = tl.where(by_count, k.to(tl.float32), p * total)
        low, high, part_low, part_high, above = _narrow(
            low, high, part_low, part_high, above, weights, thresholds, by_count, wanted, floor, PARTS, SPLITS
        )
        for i in range(1, passes):
            if tl.sum(part_low, 0) > CAPACITY:
                low, high, part_low, part_high, above = _narrow(
                    low, high, part_low, part_high, above, weights + i * (PARTS * 3 * SPLITS),
                    _within(low, high, top, SPLITS), by_count, wanted, floor, PARTS, SPLITS,
                )  # fmt: skip
    return low, high, part_low, part_high, above, total


@triton.jit
def _to_gather(
    r, part_weights, top, floor, thresholds, k, p, vocab,
    PASSES: tl.constexpr, PARTS: tl.constexpr, CAPACITY: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """What to gather, and where to search: (low, high, end of what is gathered, entries of each part to gather, their
    number, 0 for too many, whether these are all from low on, number or mass above them, mass of all)."""
    low, high, part_low, part_high, above, total = _bracket(
        r, PASSES, part_weights, top, floor, thresholds, k, p, vocab, PASSES, PARTS, CAPACITY, SPLITS
    )
    whole = tl.sum(part_low, 0) <= CAPACITY
    takes_all = whole | ((k < vocab) & (p < 1.0))  # after the count comes the mass of all that it leaves
    parts = tl.where(takes_all, part_low, part_low - part_high)
    number = tl.sum(parts, 0)
    number = tl.where(number <= CAPACITY, number, 0.0).to(tl.int32)
    end = tl.where(takes_all, float("inf"), high)
    return low, high, end, parts, number, whole, tl.where(takes_all | (number == 0), 0.0, above), total


@triton.jit
def first_pass_kernel(
    logits, temperature, top_k, top_p, min_p, vocab, part_size, stride, seeds, positions, part_tops, part_bottoms,
    part_tokens, PARTS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Part `pid 1` of row `pid 0` of logits (N, vocab): its best entry, or its range where the row truncates. part_…
    (N, PARTS)."""
    r, row, first, end, t, inverse_t, _, _, _, truncates = _begin(
        logits, temperature, top_k, top_p, min_p, vocab, part_size, stride, PDL
    )
    at = r * PARTS + tl.program_id(1)
    if truncates:
        top, bottom = _range(row, first, end, BLOCK)
        tl.store(part_tops + at, top)
        tl.store(part_bottoms + at, bottom)
    else:
        key_a, key_b = _row_keys(tl.load(seeds + r), tl.load(positions + r))
        score, token = _draw(
            row, part_tokens, False, first, end, inverse_t, float("-inf"), key_a, key_b, t >= 1e-5, BLOCK
        )
        tl.store(part_tops + at, score)
        tl.store(part_tokens + at, token)


@triton.jit(do_not_specialize=["passes"])
def weigh_kernel(
    logits, temperature, top_k, top_p, min_p, vocab, part_size, stride, part_tops, part_bottoms, part_weights, passes,
    PASSES: tl.constexpr, PARTS: tl.constexpr, CAPACITY: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass number `passes` over one part, if the bracket after those before has too many entries: part_weights (N,
    PASSES, PARTS, 3, SPLITS), number and mass above each threshold, and the mass of all."""
    r, row, first, end, t, inverse_t, k, p, least, truncates = _begin(
        logits, temperature, top_k, top_p, min_p, vocab, part_size, stride, PDL
    )
    if truncates:
        top, floor, thresholds = _thresholds(r, part_tops, part_bottoms, t, least, PARTS, SPLITS)
        low, high, part_low, _, _, _ = _bracket(
            r, passes, part_weights, top, floor, thresholds, k, p, vocab, PASSES, PARTS, CAPACITY, SPLITS
        )
        if tl.sum(part_low, 0) > CAPACITY:
            if passes > 0:
                thresholds = _within(low, high, top, SPLITS)
            number, mass, total = _weigh(row, first, end, thresholds, top, inverse_t, floor, SPLITS, BLOCK)
            at = ((r * PASSES + passes) * PARTS + tl.program_id(1)) * (3 * SPLITS) + tl.arange(0, SPLITS)
            tl.store(part_weights + at, number)
            tl.store(part_weights + at + SPLITS, mass)
            tl.store(part_weights + at + 2 * SPLITS, tl.zeros((SPLITS,), tl.float32) + total)


@triton.jit
def gather_kernel(
    logits, temperature, top_k, top_p, min_p, vocab, part_size, stride, part_tops, part_bottoms, part_weights, found,
    found_ids, PASSES: tl.constexpr, PARTS: tl.constexpr, CAPACITY: tl.constexpr, SPLITS: tl.constexpr,
    PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each part writes its entries behind those of the parts before it. found (N, CAPACITY) of logits' dtype, found_ids
    int32."""
    r, row, first, end, t, _, k, p, least, truncates = _begin(
        logits, temperature, top_k, top_p, min_p, vocab, part_size, stride, PDL
    )
    if truncates:
        top, floor, thresholds = _thresholds(r, part_tops, part_bottoms, t, least, PARTS, SPLITS)
        low, _, below, parts, number, _, _, _ = _to_gather(
            r, part_weights, top, floor, thresholds, k, p, vocab, PASSES, PARTS, CAPACITY, SPLITS
        )
        if number > 0:
            before = tl.sum(tl.where(tl.arange(0, PARTS) < tl.program_id(1), parts, 0.0), 0).to(tl.int32)
            at = r * CAPACITY + before
            _gather(row, first, end, low, below, found + at, found_ids + at, BLOCK)


@triton.jit
def truncate_kernel(
    logits, temperature, top_k, top_p, min_p, vocab, part_size, stride, seeds, positions, part_tops, part_bottoms,
    part_weights, found, found_ids, floors, tokens, PASSES: tl.constexpr, PARTS: tl.constexpr, CAPACITY: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token of a row that truncates, if all that it keeps was gathered: then floors (N,) is inf. Else floors is the
    lowest logit that it keeps."""
    r, row, _first, _end, t, inverse_t, k, p, least, truncates = _begin(
        logits, temperature, top_k, top_p, min_p, vocab, part_size, stride, PDL
    )
    if truncates:
        top, floor, thresholds = _thresholds(r, part_tops, part_bottoms, t, least, PARTS, SPLITS)
        low, high, _below, _parts, count, whole, above, total = _to_gather(
            r, part_weights, top, floor, thresholds, k, p, vocab, PASSES, PARTS, CAPACITY, SPLITS
        )
        source = found + r * CAPACITY
        if count == 0:
            source = row
            count = vocab
        past_top = top + tl.abs(top) * 1e-6 + 1e-30  # nothing is at or above it
        high = tl.minimum(high, past_top)
        if k < vocab:
            low = _lowest_kept(source, count, low, high, above, inverse_t, top, k.to(tl.float32), False, SPLITS, BLOCK)
            high = past_top
            if p < 1.0:
                _number, _mass, total = _weigh(source, 0, count, thresholds, top, inverse_t, low, SPLITS, BLOCK)
        if p < 1.0:
            low = _lowest_kept(source, count, low, high, above, inverse_t, top, p * total, True, SPLITS, BLOCK)
        if whole:
            key_a, key_b = _row_keys(tl.load(seeds + r), tl.load(positions + r))
            ids = found_ids + r * CAPACITY
            _, token = _draw(source, ids, True, 0, count, inverse_t, low, key_a, key_b, True, BLOCK)
            tl.store(tokens + r, tl.minimum(token, vocab - 1).to(tl.int64))
            low = float("inf")
        tl.store(floors + r, low)


@triton.jit
def draw_truncated_kernel(
    logits, temperature, top_k, top_p, min_p, vocab, part_size, stride, seeds, positions, part_tops, part_tokens,
    floors, PARTS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best entry of each part of the rows that truncate and have no token yet."""
    r, row, first, end, _, inverse_t, _, _, _, truncates = _begin(
        logits, temperature, top_k, top_p, min_p, vocab, part_size, stride, PDL
    )
    if truncates:
        floor = tl.load(floors + r)
        if floor != float("inf"):  # NaN, too
            key_a, key_b = _row_keys(tl.load(seeds + r), tl.load(positions + r))
            score, token = _draw(row, part_tokens, False, first, end, inverse_t, floor, key_a, key_b, True, BLOCK)
            at = r * PARTS + tl.program_id(1)
            tl.store(part_tops + at, score)
            tl.store(part_tokens + at, token)


@triton.jit
def best_kernel(
    logits, temperature, top_k, top_p, min_p, vocab, part_size, stride, part_tops, part_tokens, floors, tokens,
    PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The token of the best part, the lowest among equals, of each row that has none yet."""
    r, _, _, _, _, _, _, _, _, truncates = _begin(
        logits, temperature, top_k, top_p, min_p, vocab, part_size, stride, PDL
    )
    waits = True
    if truncates:
        waits = tl.load(floors + r) != float("inf")
    if waits:
        i = tl.arange(0, PARTS)
        score = tl.load(part_tops + r * PARTS + i)
        token = tl.load(part_tokens + r * PARTS + i)
        token = tl.min(tl.where(score == tl.max(score, 0), token, 0x7FFFFFFF), 0)
        tl.store(tokens + r, tl.minimum(token, vocab - 1).to(tl.int64))


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
    tops, bottoms, floors = (torch.empty((rows, n), dtype=torch.float32, device=device) for n in (PARTS, PARTS, 1))
    part_tokens = torch.empty((rows, PARTS), dtype=torch.int32, device=device)
    part_size = ceil_div(ceil_div(vocab, PARTS), BLOCK) * BLOCK
    given = logits, temperature, top_k, top_p, min_p, vocab, part_size, logits.stride(0)
    early = early_launch_options(device)["PDL"]
    grid, single = (rows, PARTS, 1), (rows, 1, 1)
    options = {"num_warps": 4, "launch_pdl": early}
    draw = (("PARTS", PARTS), ("PDL", early), ("BLOCK", BLOCK))
    arguments: tuple[Any, ...] = (*given, seeds, positions, tops, bottoms, part_tokens)
    launch_by_arguments(first_pass_kernel, grid, arguments, draw, **options)
    if truncates:
        weights = torch.empty((rows, PASSES, PARTS, 3, SPLITS), dtype=torch.float32, device=device)
        found = torch.empty((rows, CAPACITY), dtype=logits.dtype, device=device)
        found_ids = torch.empty((rows, CAPACITY), dtype=torch.int32, device=device)
        search = (("PASSES", PASSES), ("PARTS", PARTS), ("CAPACITY", CAPACITY), ("SPLITS", SPLITS), ("PDL", early))
        in_parts, in_rows = (*search, ("BLOCK", 1024)), (*search, ("BLOCK", 2048))
        for i in range(PASSES):
            launch_by_arguments(weigh_kernel, grid, (*given, tops, bottoms, weights, i), in_parts, **options)
        arguments = (*given, tops, bottoms, weights, found, found_ids)
        launch_by_arguments(gather_kernel, grid, arguments, in_parts, **options)
        arguments = (*given, seeds, positions, tops, bottoms, weights, found, found_ids, floors, tokens)
        launch_by_arguments(truncate_kernel, single, arguments, in_rows, num_warps=16, launch_pdl=early)
        arguments = (*given, seeds, positions, tops, part_tokens, floors)
        launch_by_arguments(draw_truncated_kernel, grid, arguments, draw, **options)
    arguments = (*given, tops, part_tokens, floors, tokens)
    launch_by_arguments(best_kernel, single, arguments, draw[:2], num_warps=1, launch_pdl=early)
    return tokens
