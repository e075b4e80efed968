"""Hands out the blocks of the key/value cache, by number."""

from __future__ import annotations

from kuiperllm.errors import OutOfMemoryError


class BlockPool:
    """Numbers of free blocks. It starts small and grows up to `max_blocks` as sequences get longer.

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
        self._free: list[int] = []

    @property
    def num_free(self) -> int:
        """Blocks that could be allocated, those that do not exist yet included."""
        return len(self._free) + self.max_blocks - self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take blocks out of the pool; it doubles when there are too few.

        Raises:
            OutOfMemoryError: that would exceed `max_blocks`.
        """
        if count > self.num_free:
            raise OutOfMemoryError(
                f"the key/value cache of {self.max_blocks} blocks is full; use a smaller max_num_seqs or "
                "shorter prompts"
            )
        while count > len(self._free):
            larger = min(
                self.max_blocks, max(2 * self.num_blocks, self.num_blocks + count, self.first_blocks)
            )
            self._free[:0] = range(larger - 1, self.num_blocks - 1, -1)
            self.num_blocks = larger
        return [self._free.pop() for _ in range(count)]

    def free(self, blocks: list[int]) -> None:
        """Put blocks back."""
        self._free.extend(reversed(blocks))

    def reset(self, num_blocks: int) -> None:
        """Begin anew with `num_blocks` blocks, all of them free."""
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
