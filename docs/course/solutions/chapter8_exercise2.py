"""Which batch sizes to capture steps for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from math import inf


def padding(sizes: Sequence[int], counts: Mapping[int, int]) -> float:
    """Rows that are computed for nobody, if each step takes the next larger size; infinite if one finds none.

    Args:
        sizes: those that there are.
        counts: how many steps have so many sequences.
    """
    total = 0.0
    for wanted, steps in counts.items():
        total += steps * (min((size for size in sizes if size >= wanted), default=inf) - wanted)
    return total


def best_sizes(counts: Mapping[int, int], most: int) -> list[int]:
    """At most `most` sizes with the least padding.

    A best choice only has sizes that occur: any other one could be lowered to the next that does. So the
    largest is there, and below it is the same question again, for smaller steps and one size less.
    """
    occurring = sorted(counts)

    @cache
    def best(end: int, left: int) -> tuple[float, tuple[int, ...]]:
        """For the first `end` of the occurring sizes, with `left` sizes to choose."""
        if end == 0:
            return 0.0, ()
        if left == 0:
            return inf, ()
        top = occurring[end - 1]
        choices = []
        for begin in range(end):  # steps of sizes begin to end - 1 are padded to `top`
            lost = sum(counts[size] * (top - size) for size in occurring[begin:end])
            below, sizes = best(begin, left - 1)
            choices.append((below + lost, (*sizes, top)))
        return min(choices)

    return list(best(len(occurring), most)[1])
