"""The block pool, whatever is done with it: no block is lost, shared wrongly, or freed twice."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kuiperllm.engine.block_pool import BlockPool
from kuiperllm.engine.prefix_cache import Place
from kuiperllm.errors import OutOfMemoryError

BLOCK = 2
SALTS = ("", "other")


@dataclass
class Holder:
    """A text in the cache: how much of it is there, and how much of that is remembered."""

    salt: str
    tokens: list[int]
    blocks: list[int]
    place: Place
    num_remembered: int
    contents: list[list[int]] = field(default_factory=list)


def encoded(tokens: list[int]) -> bytes:
    return np.array(tokens, np.int32).tobytes()


class PoolMachine(RuleBasedStateMachine):
    """Texts of few different tokens, so that many begin alike, in a pool that is soon full."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCK, max_blocks=12, first_blocks=3)
        self.holders: list[Holder] = []
        self.truth: dict[int, tuple[str, tuple[int, ...]]] = {}
        """What each block holds: the salt, and the whole text up to its end."""

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=11), salt=st.sampled_from(SALTS))
    def begin(self, tokens: list[int], salt: str) -> None:
        most = (len(tokens) - 1) // BLOCK
        before = self.pool.num_free
        blocks, place = self.pool.match(salt, encoded(tokens), most)
        for index, block in enumerate(blocks):
            assert self.truth[block] == (salt, tuple(tokens[: (index + 1) * BLOCK]))
        missing = self.pool.blocks_for(len(tokens)) - len(blocks)
        if missing > self.pool.num_free:
            with pytest.raises(OutOfMemoryError, match="cache of 12 blocks is full"):
                self.pool.allocate(missing)
            self.pool.release(blocks)
            assert self.pool.num_free == before
            return
        holder = Holder(salt, tokens, blocks, place, len(blocks))
        self.take(holder, missing)
        self.holders.append(holder)

    @precondition(lambda self: self.holders)
    @rule(which=st.integers(0, 99), token=st.integers(0, 1))
    def extend(self, which: int, token: int) -> None:
        holder = self.holders[which % len(self.holders)]
        if len(holder.tokens) == BLOCK * len(holder.blocks):
            if not self.pool.num_free:
                return
            self.take(holder, 1)
        holder.tokens.append(token)

    @precondition(lambda self: self.holders)
    @rule(which=st.integers(0, 99))
    def remember(self, which: int) -> None:
        holder = self.holders[which % len(self.holders)]
        for index in range(holder.num_remembered, len(holder.tokens) // BLOCK):
            block = holder.blocks[index]
            text = tuple(holder.tokens[: (index + 1) * BLOCK])
            self.truth[block] = holder.salt, text
            holder.place = self.pool.remember(block, holder.place, encoded(list(text[-BLOCK:])))
            holder.num_remembered += 1

    @precondition(lambda self: self.holders)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        holder = self.holders.pop(which % len(self.holders))
        self.pool.release(holder.blocks)

    @rule()
    def reset(self) -> None:
        self.pool.reset(self.pool.num_blocks)
        self.holders.clear()
        self.truth.clear()
        assert self.pool.num_free == self.pool.max_blocks

    def take(self, holder: Holder, count: int) -> None:
        taken = self.pool.allocate(count)
        in_use = {block for other in self.holders for block in other.blocks} | set(holder.blocks)
        assert not in_use.intersection(taken)
        assert len(set(taken)) == count
        for block in taken:
            self.truth.pop(block, None)  # it is written to from now on
        holder.blocks += taken

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        pool = self.pool
        users = [0] * pool.num_blocks
        for holder in self.holders:
            for block in holder.blocks:
                users[block] += 1
        assert pool._users == users
        used = [block for block, count in enumerate(users) if count]
        assert sorted([*used, *pool._free, *pool._kept]) == list(range(pool.num_blocks))
        assert pool.num_used == len(used)
        assert pool.num_free == pool.max_blocks - len(used)
        assert pool.num_blocks <= pool.max_blocks
        assert all(block in pool._prefixes for block in pool._kept)


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_any_order_of_calls = PoolMachine.TestCase


@pytest.mark.parametrize(
    ("taken", "found"), [(0, [2, 2]), (1, [2, 1]), (2, [2, 0]), (3, [1, 0]), (4, [0, 0])]
)
def test_the_least_recently_used_text_goes_first_and_its_end_before_its_beginning(
    taken: int, found: list[int]
) -> None:
    pool = BlockPool(BLOCK, max_blocks=4)
    texts = [0, 0, 0, 1], [1, 1, 1, 0]
    for text in texts:
        blocks = pool.allocate(2)
        place: Place = ""
        for index in range(2):
            place = pool.remember(blocks[index], place, encoded(text[2 * index : 2 * index + 2]))
        pool.release(blocks)
    pool.release(pool.match("", encoded(texts[0]), 2)[0])  # so the other one is the least recently used
    pool.allocate(taken)
    assert [len(pool.match("", encoded(text), 2)[0]) for text in texts] == found


def test_equal_blocks_are_remembered_once() -> None:
    """Two requests may compute the same at the same time; what follows either of them is found."""
    pool = BlockPool(BLOCK, max_blocks=6)
    first, second = pool.allocate(2), pool.allocate(2)
    place = pool.remember(first[0], "", encoded([1, 1]))
    assert pool.remember(second[0], "", encoded([1, 1])) == place
    pool.remember(second[1], place, encoded([2, 2]))
    pool.release(second)
    assert pool.match("", encoded([1, 1, 2, 2]), 2)[0] == [first[0], second[1]]


def test_a_text_is_not_found_behind_a_block_that_was_given_away() -> None:
    pool = BlockPool(BLOCK, max_blocks=2)
    blocks = pool.allocate(2)
    place = pool.remember(blocks[0], "", encoded([1, 1]))
    pool.remember(blocks[1], place, encoded([2, 2]))
    pool.release([blocks[0]])
    (again,) = pool.allocate(1)
    assert again == blocks[0]
    other = pool.remember(again, "", encoded([3, 3]))
    assert pool.match("", encoded([3, 3, 2, 2]), 2) == ([again], other)
    assert pool.match("", encoded([1, 1, 2, 2]), 2) == ([], "")
