"""Blocks that a sliding window has left behind."""

from __future__ import annotations

from kuiperllm.engine.block_pool import BlockPool

GONE = -1
"""Stands in a table for a block that was given back."""


def num_behind(num_computed: int, window: int, block_size: int) -> int:
    """How many blocks from the beginning no later token will look at.

    The next token, at place `num_computed`, looks at `window` places that end with its own.
    """
    return max(0, num_computed - window + 1) // block_size


def release_behind(pool: BlockPool, blocks: list[int], num_computed: int, window: int) -> None:
    """Give blocks back to the pool, and mark their entries, which keep their places in the table."""
    behind = range(num_behind(num_computed, window, pool.block_size))
    gone = [index for index in behind if blocks[index] != GONE]
    pool.release(blocks[index] for index in gone)
    for index in gone:
        blocks[index] = GONE
