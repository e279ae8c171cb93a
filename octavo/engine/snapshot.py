"""The cache as a picture: what the page's block map, and anyone else who watches a running engine, is shown.

Plain data, so that it can leave the process. Live requests get small numbers, given again when their request has ended,
so that two of them are never the same (up to NUM_OWNERS).
"""

import time
from typing import Any

from octavo.engine.memory_report import NUM_OWNERS, block_map, measure
from octavo.engine.scheduler import Scheduler


class Observer:
    """Watches a scheduler, between its steps."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._owners: dict[str, int] = {}  # of the live requests with blocks

    @property
    def num_running(self) -> int:
        """Requests with blocks."""
        scheduler = self.scheduler
        groups = (scheduler.prefilling, scheduler.decoding, scheduler.awaiting)
        return len({seq.request.request_id for group in groups for seq in group})

    def snapshot(self) -> dict[str, Any]:
        """time: seconds of time.monotonic. map: of `block_map`. tails: [block, owner, slots written] of each last block
        that only one sequence holds. owners: number → request id. memory: of MemoryReport. running, waiting: requests.
        prefix_hit_tokens, prefix_queried_tokens: since the start."""
        scheduler = self.scheduler
        self._number_owners()
        cache = scheduler.blocks.prefix_cache
        running = self.num_running
        return {
            "time": time.monotonic(),
            "block_size": scheduler.config.block_size,
            "map": block_map(scheduler, self._owners),
            "tails": self._tails(),
            "owners": {number % NUM_OWNERS: name for name, number in self._owners.items()},
            "memory": measure(scheduler).to_dict(),
            "running": running,
            "waiting": len(scheduler.requests) - running,
            "prefix_hit_tokens": cache.num_hit_tokens if cache else 0,
            "prefix_queried_tokens": cache.num_queried_tokens if cache else 0,
        }

    def _number_owners(self) -> None:
        names = dict.fromkeys(seq.request.request_id for seq in self.scheduler.holders())
        self._owners = {name: number for name, number in self._owners.items() if name in names}
        taken, number = set(self._owners.values()), 0
        for name in names:
            if name in self._owners:
                continue
            while number in taken:
                number += 1
            self._owners[name] = number
            taken.add(number)

    def _tails(self) -> list[list[int]]:
        """Of each sequence, the block that its next token is written to, unless the block is shared or complete."""
        scheduler = self.scheduler
        size, ref_counts = scheduler.config.block_size, scheduler.blocks.ref_counts
        tails = []
        for seq in scheduler.holders():
            index, filled = divmod(seq.num_computed_tokens, size)
            if index < len(seq.block_table) and ref_counts[seq.block_table[index]] == 1:
                owner = self._owners[seq.request.request_id] % NUM_OWNERS
                tails.append([seq.block_table[index], owner, filled])
        return tails
