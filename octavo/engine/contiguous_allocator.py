"""What the same requests would have cost without pages: a simulated allocator of contiguous regions.

Before PagedAttention an engine gave each sequence one contiguous region when it started, as long as the sequence might
become. Following section 6.1 of the PagedAttention paper (Kwon et al. 2023), three engines that differ in what they
know about that length:

    max       nothing: the longest sequence that the engine serves
    pow2      the final length, rounded up to a power of two
    oracle    the final length exactly, which no real engine can know

Regions are placed first-fit in one arena of the size of the real cache, by a real free list, so external fragmentation
arises by itself. Time runs in steps: a request that is admitted computes its prompt in its first step, then one token
in each; requests start in order of arrival and no earlier than in the real run.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

Reservation = Literal["max", "pow2", "oracle"]
RESERVATIONS: tuple[Reservation, ...] = get_args(Reservation)


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence of a run: tokens of its prompt and of its whole text, and the step at which it arrived."""

    arrival_step: int
    num_prompt_tokens: int
    num_tokens: int


@dataclass(slots=True)
class FirstFitArena:
    """An arena of `size` token slots. Holes are disjoint, sorted by offset, and never adjacent."""

    size: int
    holes: list[tuple[int, int]] = field(default_factory=list)  # (offset, length)

    def __post_init__(self) -> None:
        self.holes = [(0, self.size)]

    @property
    def num_free(self) -> int:
        return sum(length for _, length in self.holes)

    def allocate(self, length: int) -> int | None:
        """Offset of a new region: the first hole that is long enough. None if there is none."""
        for index, (offset, hole) in enumerate(self.holes):
            if hole >= length:
                self.holes[index : index + 1] = [(offset + length, hole - length)] if hole > length else []
                return offset
        return None

    def free(self, offset: int, length: int) -> None:
        insort(self.holes, (offset, length))
        merged: list[tuple[int, int]] = []
        for start, hole in self.holes:
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + hole)
            else:
                merged.append((start, hole))
        self.holes = merged

    def unusable(self, length: int) -> int:
        """External fragmentation: slots in holes too short for a region of this length."""
        return sum(hole for _, hole in self.holes if hole < length)


@dataclass(frozen=True, slots=True)
class ContiguousUse:
    """Mean token slots over the steps in which anything ran, and the mean number of sequences that ran."""

    reservation: Reservation
    num_steps: int
    used: float
    reserved: float  # will be written later
    internal: float  # belongs to a sequence that will never write it
    external: float  # free, but in holes too short for the next in the queue
    concurrency: float

    @property
    def waste_fraction(self) -> float:
        held = self.used + self.reserved + self.internal + self.external
        return 1 - self.used / held if held else 0.0


@dataclass(slots=True)
class _Running:
    span: Span
    offset: int
    length: int
    written: int


def simulate_contiguous(
    spans: Iterable[Span], reservation: Reservation, *, cache_tokens: int, longest: int, max_num_seqs: int
) -> ContiguousUse:
    """Runs spans through first-fit regions. longest: the region of "max", in tokens; no region exceeds the cache."""
    waiting = deque(sorted(spans, key=lambda span: span.arrival_step))
    arena, running = FirstFitArena(cache_tokens), list[_Running]()
    totals, num_steps, step = [0.0] * 5, 0, 0
    while waiting or running:
        if not running and waiting[0].arrival_step > step:
            step = waiting[0].arrival_step
        while waiting and waiting[0].arrival_step <= step and len(running) < max_num_seqs:
            length = min(_region(waiting[0], reservation, longest), cache_tokens)
            offset = arena.allocate(length)
            if offset is None:
                break
            span = waiting.popleft()
            running.append(_Running(span, offset, length, span.num_prompt_tokens))
        blocked = bool(waiting) and waiting[0].arrival_step <= step and len(running) < max_num_seqs
        need = min(_region(waiting[0], reservation, longest), cache_tokens) if blocked else 0
        for index, value in enumerate(_measure(running, arena, need)):
            totals[index] += value
        num_steps, step = num_steps + 1, step + 1
        running = _advance(running, arena)
    means = [total / max(num_steps, 1) for total in totals]
    return ContiguousUse(reservation, num_steps, *means)


def _region(span: Span, reservation: Reservation, longest: int) -> int:
    if reservation == "max":
        return max(longest, span.num_tokens)
    return span.num_tokens if reservation == "oracle" else 1 << (span.num_tokens - 1).bit_length()


def _measure(running: list[_Running], arena: FirstFitArena, need: int) -> tuple[int, int, int, int, int]:
    used = sum(region.written for region in running)
    reserved = sum(max(min(region.span.num_tokens, region.length) - region.written, 0) for region in running)
    internal = sum(region.length for region in running) - used - reserved
    return used, reserved, internal, arena.unusable(need), len(running)


def _advance(running: list[_Running], arena: FirstFitArena) -> list[_Running]:
    """One token more for each; who has them all leaves."""
    left = []
    for region in running:
        if region.written + 1 >= min(region.span.num_tokens, region.length):
            arena.free(region.offset, region.length)
        else:
            region.written += 1
            left.append(region)
    return left
