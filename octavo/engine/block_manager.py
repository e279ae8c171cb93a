"""The paged cache's memory: which sequence holds which block.

The cache is num_blocks blocks of block_size token slots. A sequence's block table names the block of each run of
block_size positions. A block is in exactly one state:

    blank      holds nothing
    live       in the block table of ref_counts[block] sequences
    idle       used by nobody, content kept for the prefix cache, given up least recently used first
    retired    used by nobody, but freed while a step was in flight, which may still read or write it

Blank and idle blocks are free. Some of them may be *promised*: a prompt is admitted only when all its blocks are free,
then takes them chunk by chunk; promised blocks are given to nobody else.

Ownership. A table belongs to its sequence, a block to the sequences whose tables name it. A block with one owner may be
written by it; a shared block is never written: the owner that has to write copies it first (copy-on-write). A block
freed between `begin_step` and the matching `end_step` is retired and is given to nobody before that step has ended, so
work in flight never meets a new owner.

Where every layer has a sliding window, a sequence gives back the blocks before it (`num_unseen_blocks` of its table) by
the same rule. Layers with windows beside layers that see all would need a table for each kind: there, nothing is given
back.
"""

from collections import Counter
from collections.abc import Iterable

from octavo.engine.prefix_cache import PrefixCache, block_hash, root_hash
from octavo.engine.request import Sequence
from octavo.engine.step import BlockCopy


class BlockManager:
    """num_blocks, block_size: at least 1. sliding_window: see EngineConfig. All methods are O(blocks touched)."""

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True, sliding_window: int = 0
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.sliding_window = sliding_window
        self.prefix_cache = PrefixCache() if enable_prefix_caching else None
        self.ref_counts = [0] * num_blocks
        self.num_promised_blocks = 0
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is the warmest
        self._retired: dict[int, int] = {}  # block → the last step begun when it was freed
        self._steps_begun = 0
        self._steps_ended = 0

    @property
    def num_free_blocks(self) -> int:
        return len(self._blank) + (self.prefix_cache.num_idle if self.prefix_cache else 0)

    @property
    def num_unpromised_blocks(self) -> int:
        """Free blocks that anyone may take."""
        return self.num_free_blocks - self.num_promised_blocks

    @property
    def num_retired_blocks(self) -> int:
        return len(self._retired)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # Taking and sharing

    def admit(self, seq: Sequence, spare: int = 0, reuse: bool = True) -> bool:
        """Gives a waiting sequence its cached beginning and promises it the rest of its tokens' blocks; False where
        memory lacks.

        spare: unpromised blocks that must be left over. reuse: look into the prefix cache. At least the last token is
        left to compute.
        """
        cached = self._cached_blocks(seq) if reuse else []
        promised = self.blocks_for(len(seq.token_ids)) - len(cached)
        num_idle = sum(self.ref_counts[block] == 0 for block in cached)
        if promised + num_idle + spare > self.num_unpromised_blocks:
            return False
        for block in cached:
            self._take_cached(block)
        seq.block_table = cached
        seq.num_named_blocks = len(cached)
        seq.num_computed_tokens = seq.num_writable_tokens = len(cached) * self.block_size
        seq.num_promised_blocks = promised
        self.num_promised_blocks += promised
        if self.prefix_cache and reuse:
            self.prefix_cache.num_queried_tokens += len(seq.token_ids)
            self.prefix_cache.num_hit_tokens += seq.num_computed_tokens
        return True

    def _cached_blocks(self, seq: Sequence) -> list[int]:
        cached: list[int] = []
        if self.prefix_cache is None:
            return cached
        num_blocks = (len(seq.token_ids) - 1) // self.block_size
        self._extend_hashes(seq, num_blocks)
        for name in seq.block_hashes[:num_blocks]:
            block = self.prefix_cache.get(name)
            if block is None:
                break
            cached.append(block)
        return cached

    def _take_cached(self, block: int) -> None:
        assert self.prefix_cache is not None
        if self.ref_counts[block] == 0 and self._retired.pop(block, None) is None:
            self.prefix_cache.wake(block)
        self.ref_counts[block] += 1

    def blocks_needed(self, seq: Sequence, num_tokens: int) -> int:
        """Unpromised blocks that `extend` takes: for growth, and for one copy where the next slot lies in a shared
        block."""
        growth = self.blocks_for(num_tokens) - len(seq.block_table) - seq.num_promised_blocks
        return max(growth, 0) + self._writes_shared_block(seq)

    def extend(self, seq: Sequence, num_tokens: int) -> BlockCopy | None:
        """Makes the slots of tokens num_computed_tokens … num_tokens - 1 writable by seq alone, and names the blocks
        that they fill.

        The caller has seen to it that `blocks_needed` are there, and computes those tokens in the coming step.
        """
        self.give_back_unseen(seq)
        copy = self._unshare(seq) if self._writes_shared_block(seq) else None
        growth = self.blocks_for(num_tokens) - len(seq.block_table)
        for _ in range(growth):
            seq.block_table.append(self._take_block())
        kept = min(max(growth, 0), seq.num_promised_blocks)
        seq.num_promised_blocks -= kept
        self.num_promised_blocks -= kept
        seq.num_writable_tokens = len(seq.block_table) * self.block_size
        if self.prefix_cache is not None:
            num_known = min(num_tokens, len(seq.token_ids))
            self._name_full_blocks(self.prefix_cache, seq, num_known // self.block_size)
        return copy

    def give_back_unseen(self, seq: Sequence) -> None:
        """Gives back the leading blocks that no token from the next on sees in any layer.

        Their numbers stay in the table, where kernels skip them or mask what they read: it may be another sequence's by
        then, but never memory that was not written.
        """
        if not self.sliding_window:
            return
        num_unseen = max(seq.num_computed_tokens + 1 - self.sliding_window, 0) // self.block_size
        if num_unseen > seq.num_unseen_blocks:
            self._let_go(seq.block_table[seq.num_unseen_blocks : num_unseen])
            seq.num_unseen_blocks = num_unseen

    def _writes_shared_block(self, seq: Sequence) -> bool:
        index = seq.num_computed_tokens // self.block_size
        return index < len(seq.block_table) and self.ref_counts[seq.block_table[index]] > 1

    def _unshare(self, seq: Sequence) -> BlockCopy:
        index = seq.num_computed_tokens // self.block_size
        copy = BlockCopy(seq.block_table[index], self._take_block())
        self.ref_counts[copy.src] -= 1
        seq.block_table[index] = copy.dst
        return copy

    def _take_block(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            assert self.prefix_cache is not None, "the scheduler took a block that it had not counted"
            block = self.prefix_cache.evict()
        self.ref_counts[block] = 1
        return block

    def _name_full_blocks(self, cache: PrefixCache, seq: Sequence, num_full: int) -> None:
        if num_full > len(seq.block_hashes):
            self._extend_hashes(seq, num_full)
        for index in range(max(seq.num_named_blocks, seq.num_unseen_blocks), num_full):
            cache.insert(seq.block_hashes[index], seq.block_table[index])
        seq.num_named_blocks = num_full

    def _extend_hashes(self, seq: Sequence, num_full: int) -> None:
        hashes, size = seq.block_hashes, self.block_size
        parent = hashes[-1] if hashes else root_hash(seq.request.cache_salt)
        for index in range(len(hashes), num_full):
            parent = block_hash(parent, seq.token_ids[index * size : (index + 1) * size])
            hashes.append(parent)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Lets the child share every block of the parent. Nothing is copied before one of them has to write a shared
        block."""
        assert parent.num_promised_blocks == 0, "only a computed sequence forks"
        child.num_unseen_blocks = parent.num_unseen_blocks
        for block in parent.held_blocks:
            self.ref_counts[block] += 1
        child.block_table = list(parent.block_table)
        child.block_hashes = list(parent.block_hashes)
        child.num_computed_tokens = parent.num_computed_tokens
        child.num_named_blocks = parent.num_named_blocks
        parent.num_writable_tokens = child.num_writable_tokens = 0  # both must ask before the next write

    # Giving back

    def free(self, seq: Sequence) -> None:
        """Takes all blocks and promises from seq. The last block goes first, so that beginnings stay cached longest."""
        self.num_promised_blocks -= seq.num_promised_blocks
        self._let_go(reversed(seq.held_blocks))
        seq.block_table = []
        seq.num_promised_blocks = seq.num_computed_tokens = seq.num_writable_tokens = seq.num_named_blocks = 0
        seq.num_unseen_blocks = 0

    def _let_go(self, blocks: Iterable[int]) -> None:
        """One owner less for each; the blocks that nobody owns any more are free, once no step in flight reads them."""
        in_flight = self._steps_begun > self._steps_ended
        for block in blocks:
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                if in_flight:
                    self._retired[block] = self._steps_begun
                else:
                    self._release(block)

    def _release(self, block: int) -> None:
        if self.prefix_cache is None or not self.prefix_cache.retire(block):
            self._blank.append(block)

    def begin_step(self) -> None:
        """From here on the blocks in all tables are read and written by a step in flight."""
        self._steps_begun += 1

    def end_step(self) -> None:
        """The oldest step in flight is over."""
        assert self._steps_ended < self._steps_begun
        self._steps_ended += 1
        for block in [block for block, step in self._retired.items() if step <= self._steps_ended]:
            del self._retired[block]
            self._release(block)

    def forget_prefixes(self) -> None:
        """Empties the prefix cache, as after a failed step, whose blocks were named but may not have been written."""
        if self.prefix_cache is not None:
            self._blank.extend(self.prefix_cache.forget())

    # Proof

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Asserts every invariant. sequences: all that may hold blocks."""
        sequences = list(sequences)
        owners = Counter(block for seq in sequences for block in seq.held_blocks)
        assert self.ref_counts == [owners[block] for block in range(self.num_blocks)]
        idle = list(self.prefix_cache.idle_blocks) if self.prefix_cache else []
        assert sorted([*owners, *self._blank, *idle, *self._retired]) == list(range(self.num_blocks)), (
            "a block has one state"
        )
        assert self._steps_begun > self._steps_ended or not self._retired
        promised = sum(seq.num_promised_blocks for seq in sequences)
        assert 0 <= promised == self.num_promised_blocks <= self.num_free_blocks, "promises are kept"
        for seq in sequences:
            self._check_table(seq)
        if self.prefix_cache is not None:
            self.prefix_cache.check_integrity()
            for seq in sequences:
                self._check_names(self.prefix_cache, seq)

    def _check_table(self, seq: Sequence) -> None:
        assert len(set(seq.held_blocks)) == len(seq.held_blocks)
        first_seen = max(seq.num_computed_tokens + 1 - self.sliding_window, 0) if self.sliding_window else 0
        assert seq.num_unseen_blocks <= first_seen // self.block_size, "what the next token sees is held"
        num_tokens = len(seq.token_ids) + seq.num_pending_tokens
        assert self.blocks_for(seq.num_computed_tokens) <= len(seq.block_table) <= self.blocks_for(num_tokens)
        assert seq.num_writable_tokens <= len(seq.block_table) * self.block_size
        if seq.num_writable_tokens:
            shared = [
                b for b in seq.block_table[seq.num_computed_tokens // self.block_size :] if self.ref_counts[b] > 1
            ]
            in_flight = self._steps_begun > self._steps_ended
            named = self.prefix_cache and all(self.prefix_cache.name_of(block) for block in shared)
            assert not shared or (in_flight and named), "written while shared only by the step that fills and names it"

    def _check_names(self, cache: PrefixCache, seq: Sequence) -> None:
        """Named blocks hold what their name says: the chain is computed anew from the tokens."""
        name = root_hash(seq.request.cache_salt)
        for index, block in enumerate(seq.block_table):
            name = block_hash(name, seq.token_ids[index * self.block_size : (index + 1) * self.block_size])
            assert index >= len(seq.block_hashes) or seq.block_hashes[index] == name
            assert index < seq.num_unseen_blocks or cache.name_of(block) in (None, name)
