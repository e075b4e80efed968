"""A page in Chinese has what the page in English has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from site_pages import DOCS, FIGURE, MACRO, counterpart, fences, headings, is_chinese, prose

PAIRS = [
    (path, DOCS / counterpart(path.relative_to(DOCS).as_posix()))
    for path in sorted(DOCS.rglob("*.md"))
    if not is_chinese(path.relative_to(DOCS).as_posix())
    and (DOCS / counterpart(path.relative_to(DOCS).as_posix())).exists()
]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


pair = pytest.mark.parametrize(
    ("english", "chinese"), PAIRS, ids=[english.relative_to(DOCS).as_posix() for english, _ in PAIRS]
)


@pair
def test_same_headings(english: Path, chinese: Path) -> None:
    assert [level for level, _ in headings(read(english))] == [level for level, _ in headings(read(chinese))]


@pair
def test_same_code(english: Path, chinese: Path) -> None:
    """Blocks that run, their outputs and code by reference are the same; others may differ in comments."""

    def blocks(path: Path) -> list[tuple[object, ...]]:
        found = []
        for fence in fences(read(path)):
            options = {key: value for key, value in fence.options.items() if key != "title"}
            same = {"run", "output"} & set(fence.words)
            found.append((fence.language, fence.words, options, fence.body if same else ""))
        return found

    assert blocks(english) == blocks(chinese)


@pair
def test_same_figures_tables_and_measurements(english: Path, chinese: Path) -> None:
    def parts(path: Path) -> tuple[list[str], list[str], list[int]]:
        text = prose(read(path))
        drawings = [Path(match["path"]).name.replace(".zh.svg", ".svg") for match in FIGURE.finditer(text)]
        rows = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")]
        return drawings, sorted(MACRO.findall(text)), rows

    assert parts(english) == parts(chinese)


def test_chinese_pages_are_chinese() -> None:
    for _, chinese in PAIRS:
        words = prose(read(chinese))
        assert len(re.findall(r"[\u4e00-\u9fff]", words)) > 0.15 * len(words), chinese.name


def test_each_chapter_is_in_both_languages() -> None:
    course = DOCS / "course"
    english = {path.name for path in course.glob("*.md")}
    assert english == {path.name for path in (course / "zh").glob("*.md")}
