"""Best fit against first fit, for the large blocks of a pool."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Policy = Literal["best", "first"]

MIB = 1 << 20


@dataclass
class LargeBlocks:
    """What a pool of large blocks holds, without the memory.

    A request takes a free block that wastes at most an eighth of the request; if there is none, a new block
    is reserved.
    """

    policy: Policy
    free: list[int] = field(default_factory=list)
    """Sizes of free blocks, the one freed longest ago first."""
    reserved: int = 0

    def take(self, size: int) -> int:
        """The size of the block that serves a request."""
        fitting = [block for block in self.free if size <= block <= size + size // 8]
        if not fitting:
            self.reserved += size
            return size
        block = min(fitting) if self.policy == "best" else fitting[0]
        self.free.remove(block)
        return block

    def give(self, block: int) -> None:
        """Take a block back."""
        self.free.append(block)


def trace(seed: int, requests: int = 2000, live: int = 40) -> Iterator[tuple[Literal["take", "give"], int]]:
    """Requests and returns: ("take", bytes) and ("give", number of the request).

    About `live` blocks are in use at a time, each for a random while. Sizes are whole MiB from 1 to 128,
    small ones more often.
    """
    rng = random.Random(seed)
    in_use: list[int] = []
    for number in range(requests):
        while len(in_use) >= live or (in_use and rng.random() < 0.5):
            yield "give", in_use.pop(rng.randrange(len(in_use)))
        yield "take", round(2 ** rng.uniform(0, 7)) * MIB
        in_use.append(number)


def reserved_bytes(policy: Policy, seed: int) -> int:
    """What the device has to reserve for a trace, under a policy."""
    pool = LargeBlocks(policy)
    blocks: list[int] = []
    for what, value in trace(seed):
        if what == "take":
            blocks.append(pool.take(value))
        else:
            pool.give(blocks[value])
    return pool.reserved


def compare(seeds: int = 20) -> float:
    """What best fit reserves of what first fit does, on average over several traces."""
    ratios = [reserved_bytes("best", seed) / reserved_bytes("first", seed) for seed in range(seeds)]
    return sum(ratios) / len(ratios)
