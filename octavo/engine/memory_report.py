"""Where every byte of the paged cache is: now (`MemoryReport`), over a run (`MemoryTrace`), and beside engines without
pages.

The bytes of the cache are split into six parts, which sum to it exactly:

    used       hold keys and values of live sequences; counted once, however many share them
    reserved   promised to admitted prompts or to the step in flight, not yet written
    internal   slots past a sequence's last token, in its last block
    external   free, but no request could take them: computed as free blocks minus those that the allocator can give
    cached     hold beginnings of earlier texts that nobody uses; reclaimed when needed
    free       hold nothing

Waste is reserved + internal + external, as a share of these and used: the definition of the PagedAttention paper (Kwon
et al. 2023). Beside them stand the bytes saved: what sequences that share blocks would take in addition without
sharing, and those that a sliding window in every layer has let live sequences give back.
"""

from dataclasses import asdict, dataclass

from octavo.engine.contiguous_allocator import RESERVATIONS, ContiguousUse, Span, simulate_contiguous
from octavo.engine.request import Request
from octavo.engine.scheduler import Scheduler

PARTS = ("used", "reserved", "internal", "external", "cached", "free")

# Cells of a block map; live blocks of one owner have FIRST_OWNER plus a number for the request, modulo NUM_OWNERS.
FREE, CACHED, SHARED, TAIL, FIRST_OWNER = range(5)
NUM_OWNERS = 240


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes, exact. saved: what sharing (prefix cache and copy-on-write) saves now. unseen: what live sequences have
    given back, because it lies before the sliding window of every layer."""

    cache: int
    used: int
    reserved: int
    internal: int
    external: int
    cached: int
    free: int
    saved: int
    unseen: int

    def __post_init__(self) -> None:
        assert sum(getattr(self, part) for part in PARTS) == self.cache, f"the parts do not sum to the cache: {self}"
        assert min(getattr(self, part) for part in (*PARTS, "saved", "unseen")) >= 0, f"a part is negative: {self}"

    @property
    def waste(self) -> int:
        return self.reserved + self.internal + self.external

    @property
    def waste_fraction(self) -> float:
        return _share(self.waste, self.used + self.waste)

    def to_dict(self) -> dict[str, int | float]:
        return {**asdict(self), "waste_fraction": self.waste_fraction}

    def __str__(self) -> str:
        lines = [f"KV cache{self.cache:>24,} bytes"]
        lines += [
            f"  {part:<10}{getattr(self, part):>20,}{_share(getattr(self, part), self.cache):>9.2%}" for part in PARTS
        ]
        lines.append(f"saved by sharing{self.saved:>16,} bytes")
        if self.unseen:
            lines.append(f"before the window{self.unseen:>15,} bytes, given back")
        lines.append(f"waste{self.waste_fraction:>34.2%}  of what is held")
        return "\n".join(lines)


def measure(scheduler: Scheduler) -> MemoryReport:
    """The live cache, at any time, also in mid-step. O(sequences + the step's new blocks), and a count over blocks."""
    blocks, config = scheduler.blocks, scheduler.config
    size = config.block_size
    new_tokens = {entry.seq.seq_id: entry.num_new_tokens for entry in scheduler.uncomputed()}
    written: dict[int, int] = {}  # live blocks that are not full → slots written
    pending: dict[int, int] = {}  # of these → slots that the step in flight writes
    computed = unseen = 0
    for seq in scheduler.holders():
        unseen += seq.num_unseen_blocks * size
        computed += seq.num_computed_tokens - seq.num_unseen_blocks * size
        end = seq.num_computed_tokens + new_tokens.get(seq.seq_id, 0)
        for index in range(seq.num_computed_tokens // size, len(seq.block_table)):
            block, start = seq.block_table[index], index * size
            filled = max(seq.num_computed_tokens - start, 0)
            written[block] = max(written.get(block, 0), filled)
            pending[block] = max(pending.get(block, 0), min(end - start, size) - filled, 0)
    num_unused = blocks.ref_counts.count(0)
    live = config.num_blocks - num_unused
    used = (live - len(written)) * size + sum(written.values())
    in_flight = sum(pending.values())
    internal = len(written) * size - sum(written.values()) - in_flight
    num_idle = blocks.prefix_cache.num_idle if blocks.prefix_cache else 0
    promised_idle = max(blocks.num_promised_blocks - (blocks.num_free_blocks - num_idle), 0)
    others = sum((blocks.ref_counts[block] - 1) * slots for block, slots in pending.items())  # counted as computed
    per_token = config.kv_bytes_per_token
    return MemoryReport(
        cache=config.cache_bytes,
        used=used * per_token,
        reserved=(in_flight + blocks.num_promised_blocks * size) * per_token,
        internal=internal * per_token,
        external=(num_unused - blocks.num_free_blocks) * config.block_bytes,
        cached=(num_idle - promised_idle) * config.block_bytes,
        free=(blocks.num_free_blocks - num_idle - blocks.num_promised_blocks + promised_idle) * config.block_bytes,
        saved=(computed - used - others) * per_token,
        unseen=unseen * per_token,
    )


def block_map(scheduler: Scheduler, owners: dict[str, int]) -> bytes:
    """One cell for each block. owners: request id → number, extended here with requests not seen before."""
    blocks, size = scheduler.blocks, scheduler.config.block_size
    cells = bytearray(scheduler.config.num_blocks)
    for block in blocks.prefix_cache.idle_blocks if blocks.prefix_cache else ():
        cells[block] = CACHED
    for seq in scheduler.holders():
        owner = FIRST_OWNER + owners.setdefault(seq.request.request_id, len(owners)) % NUM_OWNERS
        for block in seq.held_blocks:
            cells[block] = SHARED if blocks.ref_counts[block] > 1 else owner
        for block in seq.block_table[seq.num_computed_tokens // size :]:
            cells[block] = TAIL
    return bytes(cells)


class MemoryTrace:
    """Watches a scheduler over a run: call `sample` after each step.

    A sample costs O(sequences); one in `map_stride` also draws the block map, O(blocks). The stride doubles whenever
    MAX_MAPS maps are kept, so that a run of any length ends with MAX_MAPS / 2 to MAX_MAPS of them.
    """

    MAX_MAPS = 512

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.samples: list[MemoryReport] = []
        self.maps: list[bytes] = []
        self.map_stride = 1
        self._owners: dict[str, int] = {}
        self._seen: dict[str, tuple[int, Request]] = {}  # arrival step and request; of live and ended ones

    def sample(self) -> None:
        step = len(self.samples)
        self.samples.append(measure(self.scheduler))
        for request_id, request in self.scheduler.requests.items():
            if request_id not in self._seen:
                self._seen[request_id] = (step, request)
        if step % self.map_stride == 0:
            self.maps.append(block_map(self.scheduler, self._owners))
            if len(self.maps) == self.MAX_MAPS:
                del self.maps[1::2]
                self.map_stride *= 2

    def spans(self) -> list[Span]:
        """The run's sequences, as far as they have come."""
        return [
            Span(step, seq.num_prompt_tokens, len(seq.token_ids))
            for step, request in self._seen.values()
            for seq in request.sequences
        ]

    def report(self) -> "MemoryRunReport":
        config = self.scheduler.config
        spans = self.spans()
        contiguous = tuple(
            simulate_contiguous(
                spans,
                reservation,
                cache_tokens=config.cache_tokens,
                longest=config.max_model_len,
                max_num_seqs=config.max_num_seqs,
            )
            for reservation in RESERVATIONS
        )
        busy = [sample for sample in self.samples if sample.used + sample.waste]
        means = {part: sum(getattr(sample, part) for sample in busy) / max(len(busy), 1) for part in (*PARTS, "saved")}
        peak = max(self.samples, key=lambda sample: sample.used, default=measure(self.scheduler))
        return MemoryRunReport(config.kv_bytes_per_token, len(spans), len(self.samples), means, peak, contiguous)


@dataclass(frozen=True, slots=True)
class MemoryRunReport:
    """A run: mean bytes of each part over the samples in which anything was held, the fullest moment, and the engines
    without pages.

    saved is also in `mean`. `contiguous` counts token slots of bytes_per_token bytes.
    """

    bytes_per_token: int
    num_sequences: int
    num_samples: int
    mean: dict[str, float]
    peak: MemoryReport
    contiguous: tuple[ContiguousUse, ...]

    @property
    def waste_fraction(self) -> float:
        waste = self.mean["reserved"] + self.mean["internal"] + self.mean["external"]
        return _share(waste, self.mean["used"] + waste)

    def shares(self) -> dict[str, dict[str, float]]:
        """For each allocator, how what it holds divides into used and the wastes: rows sum to 1 (0: empty run)."""
        parts = PARTS[:4]
        rows = {"paged": [self.mean[part] for part in parts]}
        rows |= {f"contiguous {use.reservation}": [getattr(use, part) for part in parts] for use in self.contiguous}
        return {
            name: {part: _share(value, sum(values)) for part, value in zip(parts, values, strict=True)}
            for name, values in rows.items()
        }

    def to_dict(self) -> dict[str, object]:
        return {
            "num_sequences": self.num_sequences,
            "num_samples": self.num_samples,
            "mean": self.mean,
            "waste_fraction": self.waste_fraction,
            "peak": self.peak.to_dict(),
            "contiguous": [
                {
                    "reservation": use.reservation,
                    "num_steps": use.num_steps,
                    "concurrency": use.concurrency,
                    "waste_fraction": use.waste_fraction,
                    **{part: getattr(use, part) * self.bytes_per_token for part in PARTS[:4]},
                }
                for use in self.contiguous
            ],
        }

    def __str__(self) -> str:
        lines = [
            f"KV cache of {self.peak.cache:,} bytes, {self.num_sequences} sequences, {self.num_samples} steps; "
            f"mean saved by sharing {self.mean['saved']:,.0f} bytes",
            f"{'share of held bytes':<20}" + "".join(f"{part:>10}" for part in PARTS[:4]) + f"{'waste':>10}",
        ]
        for name, shares in self.shares().items():
            waste = sum(shares.values()) - shares["used"]
            lines.append(f"{name:<20}" + "".join(f"{shares[part]:>10.2%}" for part in PARTS[:4]) + f"{waste:>10.2%}")
        return "\n".join(lines)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
