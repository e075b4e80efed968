"""Remembers which cache block holds which tokens, so that prompts that begin alike share what was computed.

Blocks form a tree: a block is found by the block in front of it and its own tokens. The look-up compares
the tokens themselves, not a digest of them, so no two texts can be taken for each other. A place in the tree
has a number that is never used again: when a block is given to other tokens, nothing that stood behind it is
found any more.
"""

from __future__ import annotations

Place = int | str
"""Where a block may follow: the number of the block before it, or the salt at the beginning of a text."""


class PrefixCache:
    """Full blocks by what they hold. It knows nothing of who uses them."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[Place, bytes], tuple[int, int]] = {}  # to the block and its place
        self._keys: dict[int, tuple[Place, bytes]] = {}
        self._next_place = 0

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, before: Place, tokens: bytes) -> tuple[int, Place] | None:
        """The block that holds these tokens behind that place, and its own place."""
        return self._blocks.get((before, tokens))

    def add(self, block: int, before: Place, tokens: bytes) -> Place:
        """Remember a block, unless another one holds the same already; the place of whichever is kept."""
        key = before, tokens
        known = self._blocks.get(key)
        if known is not None:
            return known[1]
        place = self._next_place
        self._next_place += 1
        self._blocks[key] = block, place
        self._keys[block] = key
        return place

    def drop(self, block: int) -> None:
        """Forget a block that is remembered."""
        del self._blocks[self._keys.pop(block)]

    def clear(self) -> None:
        """Forget all blocks."""
        self._blocks.clear()
        self._keys.clear()
