"""Sequences that share the blocks of a common beginning, with copies where both will write."""

from __future__ import annotations

from kuiperllm.engine.block_pool import BlockPool
from kuiperllm.ops.attention import LayerCache


class ForkingPool(BlockPool):
    """A pool whose sequences can be doubled."""

    def fork(self, blocks: list[int], num_tokens: int) -> tuple[list[int], list[tuple[int, int]]]:
        """A second sequence that begins with the same tokens.

        Args:
            blocks: of the first sequence.
            num_tokens: how many tokens both have.

        Returns:
            The blocks of the second one, and pairs of blocks: before anybody writes, the first of each is
            to be copied to the second.

        Raises:
            OutOfMemoryError: there are too few blocks; nothing has changed.
        """
        full = num_tokens // self.block_size
        partial = blocks[full : self.blocks_for(num_tokens)]
        own = self.allocate(len(partial))
        for block in blocks[:full]:
            self._users[block] += 1
        return blocks[:full] + own, list(zip(partial, own, strict=True))


def copy_blocks(cache: LayerCache, pairs: list[tuple[int, int]]) -> None:
    """Copy keys and values of one layer from the first to the second block of each pair."""
    for source, target in pairs:
        cache.keys[target].copy_(cache.keys[source])
        cache.values[target].copy_(cache.values[source])
