"""Continuous batching with a choice of who is next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Job:
    """A request: when it comes, and how many tokens it will have."""

    arrival: int
    length: int
    left: int = 0


Policy = Callable[[Job], int]
"""The job with the least number is next."""


def first_come(job: Job) -> int:
    """In the order of arrival."""
    return job.arrival


def shortest(job: Job) -> int:
    """The shortest first."""
    return job.length


def mean_time(requests: list[tuple[int, int]], width: int, policy: Policy) -> float:
    """The mean number of steps from the arrival of a request to its end.

    Args:
        requests: arrival and length of each.
        width: how many are worked on at once.
        policy: who is next.
    """
    coming = sorted((Job(arrival, length) for arrival, length in requests), key=first_come)
    waiting: list[Job] = []
    running: list[Job] = []
    step = total = 0
    while coming or waiting or running:
        while coming and coming[0].arrival <= step:
            waiting.append(coming.pop(0))
        waiting.sort(key=policy)
        while waiting and len(running) < width:
            running.append(waiting.pop(0))
            running[-1].left = running[-1].length
        step += 1
        for job in running:
            job.left -= 1
            if job.left == 0:
                total += step - job.arrival
        running = [job for job in running if job.left]
    return total / len(requests)
