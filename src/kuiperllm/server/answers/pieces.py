"""What the text of an answer is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """What is meant for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """The beginning of a call."""

    index: int
    """Which of the answer's calls."""
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of a call's arguments, which are JSON."""

    index: int
    text: str


Piece = Reasoning | Content | Call | Arguments


class Parser(Protocol):
    """Takes text in as it comes, and says what it is as soon as that is certain."""

    def push(self, text: str) -> list[Piece]:
        """Take in more text."""

    def finish(self) -> list[Piece]:
        """What was held back, once no more will come."""


def kept_back(text: str, marker: str) -> int:
    """How many characters at the end of a text might be the beginning of a marker."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
