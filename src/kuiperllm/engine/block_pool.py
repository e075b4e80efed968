"""Hands out the blocks of the key/value cache, by number, and shares those that hold the same tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from kuiperllm.engine.prefix_cache import Place, PrefixCache
from kuiperllm.errors import OutOfMemoryError


class BlockPool:
    """Counts who uses a block. It starts small and grows up to `max_blocks` when no block is free.

    A block that nobody uses any more, but whose tokens are known, stays as it is until all other free blocks
    are gone; of several such blocks, the one that was used last goes last.

    Args:
        block_size: tokens in a block.
        max_blocks: most blocks there may be.
        first_blocks: how many there are once any are needed.
    """

    def __init__(self, block_size: int, max_blocks: int, first_blocks: int = 16) -> None:
        self.block_size = block_size
        self.max_blocks = max_blocks
        self.first_blocks = first_blocks
        self.num_blocks = 0
        """Blocks that exist: the cache must hold this many."""
        self._users: list[int] = []
        self._free: list[int] = []
        self._kept: OrderedDict[int, None] = OrderedDict()  # free, but remembered; least recently used first
        self._prefixes = PrefixCache()

    @property
    def num_free(self) -> int:
        """Blocks that could be allocated: remembered ones, and those that do not exist yet, included."""
        return len(self._free) + len(self._kept) + self.max_blocks - self.num_blocks

    @property
    def num_used(self) -> int:
        """Blocks that somebody uses."""
        return self.num_blocks - len(self._free) - len(self._kept)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take blocks out of the pool; it doubles when there are too few.

        Raises:
            OutOfMemoryError: that would exceed `max_blocks`; nothing was taken.
        """
        if count > self.num_free:
            raise OutOfMemoryError(
                f"the key/value cache of {self.max_blocks} blocks is full; use a smaller max_num_seqs or "
                "shorter prompts"
            )
        return [self._take() for _ in range(count)]

    def release(self, blocks: Iterable[int]) -> None:
        """End one use of each block. Of a sequence's blocks, the last are the first to be given to others."""
        for block in reversed(list(blocks)):
            self._users[block] -= 1
            if self._users[block] == 0:
                if block in self._prefixes:
                    self._kept[block] = None
                else:
                    self._free.append(block)

    def match(self, salt: str, tokens: bytes, most: int) -> tuple[list[int], Place]:
        """The blocks that hold the beginning of a text; they are used once more from now on.

        Args:
            salt: only what was remembered under the same one is found.
            tokens: ids of the text, int32.
            most: look no further than so many blocks.

        Returns:
            The blocks, and the place behind the last of them.
        """
        found: list[int] = []
        place: Place = salt
        nbytes = 4 * self.block_size
        for start in range(0, most * nbytes, nbytes):
            next_one = self._prefixes.find(place, tokens[start : start + nbytes])
            if next_one is None:
                break
            block, place = next_one
            if self._users[block] == 0:
                del self._kept[block]
            self._users[block] += 1
            found.append(block)
        return found, place

    def remember(self, block: int, before: Place, tokens: bytes) -> Place:
        """Let others find a block that is in use; the place behind it.

        Args:
            block: full; its keys and values will be in the cache before any pass that is yet to be scheduled.
            before: the place behind the block in front of it, or the salt.
            tokens: the ids that it holds, int32.
        """
        return self._prefixes.add(block, before, tokens)

    def reset(self, num_blocks: int) -> None:
        """Begin anew with `num_blocks` blocks, all of them free and none of them remembered."""
        self.num_blocks = num_blocks
        self._users = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._kept.clear()
        self._prefixes.clear()

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            self._prefixes.drop(block)
        else:
            self._grow()
            block = self._free.pop()
        self._users[block] = 1
        return block

    def _grow(self) -> None:
        larger = min(self.max_blocks, max(2 * self.num_blocks, self.first_blocks, 1))
        self._free.extend(range(larger - 1, self.num_blocks - 1, -1))
        self._users.extend([0] * (larger - self.num_blocks))
        self.num_blocks = larger
