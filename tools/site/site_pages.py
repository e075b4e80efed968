"""Reads the Markdown of the documentation: its fenced blocks, headings, figures and macros.

Needs nothing but the standard library, so that the tests can look at pages where MkDocs is not installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`\n]*)$")
OPTION = re.compile(r'(\w+)="([^"]*)"')
HEADING = re.compile(r"^(#{1,6}) +(.+?) *(?:\{[^}]*\})?$")
FIGURE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<path>[^)\s]+\.svg)(?: \"(?P<caption>[^\"]*)\")?\)")
MACRO = re.compile(r"(?<!`)\{\{ *((?:result|ratio|measured)\(.*?\)) *\}\}")


@dataclass(frozen=True)
class Fence:
    """A fenced block of code."""

    first: int
    """Line of the opening fence, counted from 0."""
    last: int
    """Line of the closing fence."""
    indent: str
    ticks: str
    language: str
    words: tuple[str, ...]
    """What follows the language without a value: `run`, `output`."""
    options: dict[str, str]
    """What follows the language with a value: `include="..."`."""
    body: str
    """The lines between the fences, without the fence's own indentation."""


def fences(text: str) -> Iterator[Fence]:
    """The fenced blocks of a page, in order.

    Raises:
        ValueError: a fence that is not closed.
    """
    lines = text.splitlines()
    row = 0
    while row < len(lines):
        opening = FENCE.match(lines[row])
        if opening is None:
            row += 1
            continue
        indent, ticks, info = opening["indent"], opening["ticks"], opening["info"].strip()
        last = next((i for i in range(row + 1, len(lines)) if lines[i].strip() == ticks), None)
        if last is None:
            raise ValueError(f"line {row + 1}: the fence is not closed")
        bare = OPTION.sub("", info).split()
        body = [line.removeprefix(indent) for line in lines[row + 1 : last]]
        yield Fence(
            first=row,
            last=last,
            indent=indent,
            ticks=ticks,
            language=bare[0] if bare else "",
            words=tuple(bare[1:]),
            options=dict(OPTION.findall(info)),
            body="".join(f"{line}\n" for line in body),
        )
        row = last + 1


def prose(text: str) -> str:
    """The page with its fenced blocks blanked, line numbers kept."""
    lines = text.splitlines()
    for fence in fences(text):
        lines[fence.first : fence.last + 1] = [""] * (fence.last + 1 - fence.first)
    return "\n".join(lines)


def headings(text: str) -> list[tuple[int, str]]:
    """Level and words of each heading."""
    found = (HEADING.match(line) for line in prose(text).splitlines())
    return [(len(match[1]), match[2]) for match in found if match]


def is_chinese(path: str) -> bool:
    """Whether a page, named by its path, is one of the Chinese ones."""
    return "zh" in Path(path).parts


def counterpart(path: str) -> str:
    """The path of the same page in the other language, whether or not it exists: a/x.md and a/zh/x.md."""
    parts = Path(path).parts
    if is_chinese(path):
        return Path(*(part for part in parts if part != "zh")).as_posix()
    return Path(*parts[:-1], "zh", parts[-1]).as_posix()
