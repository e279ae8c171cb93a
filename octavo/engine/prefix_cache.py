"""Which block holds which beginning of a text.

A full block is named by the SHA-256 of its parent's name and its own token ids; the first block's parent is the hash of
the request's salt. So equal names mean equal tokens from position 0 on, nobody can craft a collision, and requests of
different salts never meet.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable


def root_hash(cache_salt: str | None) -> bytes:
    """The parent of a first block. No salt is a domain of its own, unlike any salt."""
    return hashlib.sha256(b"\0" if cache_salt is None else b"\1" + cache_salt.encode()).digest()


def block_hash(parent: bytes, token_ids: list[int]) -> bytes:
    return hashlib.sha256(parent + array("i", token_ids).tobytes()).digest()


class PrefixCache:
    """Names of full blocks, and the order in which unused ones are given up.

    Owned by BlockManager, which counts references. A named block is *idle* when no sequence uses it: its content stays
    until the block is needed elsewhere, least recently used first. Every operation is O(1).
    """

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    def __len__(self) -> int:
        return len(self._block_of)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def idle_blocks(self) -> Iterable[int]:
        return self._idle.keys()

    def get(self, name: bytes) -> int | None:
        return self._block_of.get(name)

    def name_of(self, block: int) -> bytes | None:
        return self._hash_of.get(block)

    def insert(self, name: bytes, block: int) -> None:
        """Names a block in use. A second block of the same content stays nameless: one is enough."""
        if name not in self._block_of:
            self._block_of[name] = block
            self._hash_of[block] = name

    def retire(self, block: int) -> bool:
        """The block has lost its last user. False if it has no name, so that nothing can be reused."""
        if block not in self._hash_of:
            return False
        self._idle[block] = None
        return True

    def wake(self, block: int) -> None:
        """An idle block is used again."""
        del self._idle[block]

    def evict(self) -> int:
        """Forgets the least recently used idle block and gives it away."""
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block

    def forget(self) -> list[int]:
        """Forgets every name; the blocks that were idle are given back."""
        idle = list(self._idle)
        self._idle.clear()
        self._block_of.clear()
        self._hash_of.clear()
        return idle

    def check_integrity(self) -> None:
        assert {name: block for block, name in self._hash_of.items()} == self._block_of
        assert self._idle.keys() <= self._hash_of.keys()
