"""How long a chain of kernels takes, with and without early starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Link(NamedTuple):
    """A kernel of a chain; times in microseconds."""

    fetch: float
    """What it can do before it waits: come up, bring its first weights."""
    work: float
    """What it does with the results of the kernel in front."""
    release: float = 0.0
    """How long after its own start it lets the next one start."""


def chain_time(links: Sequence[Link], *, early: bool, gap: float = 0.0) -> float:
    """From the start of the first kernel to the end of the last.

    Args:
        links: kernels, each of which needs the results of the one in front.
        early: whether one may start before the one in front has ended.
        gap: from the end of a kernel to the start of the next, where it may not.
    """
    end = 0.0
    allowed = 0.0  # when the next one may start
    for number, link in enumerate(links):
        start = allowed if early else end + (gap if number else 0.0)
        end = max(start + link.fetch, end) + link.work
        allowed = min(start + link.release, end)
    return end
