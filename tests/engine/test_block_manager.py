"""Blocks: taken, shared, copied before a write, cached, evicted in order, never given away under a step."""

import pytest

from octavo.engine.block_manager import BlockManager
from octavo.engine.prefix_cache import block_hash, root_hash
from octavo.engine.request import Request, Sequence
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import BlockCopy

SIZE = 3


def make_sequence(num_tokens: int, first: int = 1, salt: str | None = None) -> Sequence:
    return Request("r", range(first, first + num_tokens), SamplingParams(), cache_salt=salt).sequences[0]


def compute(blocks: BlockManager, seq: Sequence) -> None:
    assert blocks.admit(seq)
    blocks.extend(seq, seq.num_tokens)
    seq.num_computed_tokens = seq.num_tokens


def test_admission_promises_all_blocks_of_a_prompt_and_no_more_than_there_are() -> None:
    blocks = BlockManager(4, SIZE)
    first, second = make_sequence(7), make_sequence(4, first=50)
    assert blocks.admit(first)
    assert (blocks.num_free_blocks, blocks.num_unpromised_blocks) == (4, 1)
    assert not blocks.admit(second), "one block is free of promises, two are needed"
    assert second.block_table == []
    blocks.extend(first, 5)
    assert (len(first.block_table), blocks.num_promised_blocks) == (2, 1)
    blocks.check_integrity([first])
    blocks.free(first)
    assert (blocks.num_free_blocks, blocks.num_promised_blocks) == (4, 0)


def test_equal_beginnings_share_full_blocks_and_the_last_token_is_left_to_compute() -> None:
    blocks = BlockManager(8, SIZE)
    first, second = make_sequence(6), make_sequence(6)
    compute(blocks, first)
    assert blocks.admit(second)
    assert second.block_table == first.block_table[:1]
    assert second.num_computed_tokens == 3
    blocks.check_integrity([first, second])


@pytest.mark.parametrize(("salt", "first"), [("tenant", 1), (None, 2)])
def test_other_salts_and_other_tokens_share_nothing(salt: str | None, first: int) -> None:
    blocks = BlockManager(8, SIZE)
    compute(blocks, make_sequence(7))
    other = make_sequence(7, first, salt)
    assert blocks.admit(other)
    assert other.block_table == []


def test_names_depend_on_everything_before() -> None:
    assert block_hash(root_hash(None), [1, 2]) != block_hash(root_hash("a"), [1, 2])
    assert block_hash(block_hash(root_hash(None), [1, 2]), [3, 4]) != block_hash(root_hash(None), [3, 4])
    assert len({root_hash(None), root_hash("a"), root_hash("b"), root_hash("\0")}) == 4


def test_the_least_recently_used_block_is_evicted_first_and_beginnings_outlive_ends() -> None:
    blocks = BlockManager(4, SIZE)
    old, new = make_sequence(6), make_sequence(6, first=50)
    compute(blocks, old)
    compute(blocks, new)
    old_table, new_table = old.block_table, new.block_table
    blocks.free(old)
    blocks.free(new)
    taker = make_sequence(9, first=90)
    compute(blocks, taker)
    assert taker.block_table == [*reversed(old_table), new_table[1]]
    blocks.free(taker)
    again = make_sequence(4, first=50)
    assert blocks.admit(again)
    assert again.block_table == new_table[:1], "what is left is still found"


def test_a_fork_copies_only_the_shared_block_that_it_writes() -> None:
    blocks = BlockManager(8, SIZE)
    parent = make_sequence(5)
    compute(blocks, parent)
    child = Sequence(parent.request, 1, list(parent.token_ids))
    blocks.fork(parent, child)
    before = list(parent.block_table)
    assert child.block_table == before
    child.token_ids.append(9)
    assert blocks.blocks_needed(child, 6) == 1
    copy = blocks.extend(child, 6)
    assert copy == BlockCopy(before[1], child.block_table[1])
    assert child.block_table[0] == before[0]
    parent.token_ids.append(8)
    assert blocks.extend(parent, 6) is None, "the last owner writes in place"
    assert parent.block_table == before
    blocks.check_integrity([parent, child])


def test_a_block_freed_under_a_step_in_flight_waits_for_that_step() -> None:
    """Two steps in flight, as when one is scheduled ahead: a block waits for the last begun before it was freed."""
    blocks = BlockManager(2, SIZE, enable_prefix_caching=False)
    first, second = make_sequence(3), make_sequence(3, first=50)
    compute(blocks, first)
    compute(blocks, second)
    blocks.begin_step()
    blocks.free(first)
    blocks.begin_step()
    blocks.free(second)
    assert (blocks.num_free_blocks, blocks.num_retired_blocks) == (0, 2)
    assert not blocks.admit(make_sequence(1))
    blocks.end_step()
    assert blocks.num_free_blocks == 1
    blocks.end_step()
    assert blocks.num_free_blocks == 2
    blocks.check_integrity([])


def test_integrity_notices_a_lost_block() -> None:
    blocks = BlockManager(3, SIZE)
    seq = make_sequence(4)
    compute(blocks, seq)
    seq.block_table.pop()
    with pytest.raises(AssertionError):
        blocks.check_integrity([seq])
