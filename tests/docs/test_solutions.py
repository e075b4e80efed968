"""Each chapter has three exercises, each with a solution that the page shows and a test that tries it.

The tests themselves are in test_chapter<k>_solutions.py.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from site_pages import DOCS, fences, headings

COURSE = DOCS / "course"
CHAPTERS = sorted(COURSE.glob("[0-9]-*.md"))
SOLUTIONS = COURSE / "solutions"

chapter = pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)


def names(page: Path) -> list[str]:
    return [f"chapter{page.name[0]}_exercise{number}" for number in (1, 2, 3)]


@chapter
def test_page_shows_three_solutions(page: Path) -> None:
    for path in (page, page.parent / "zh" / page.name):
        text = path.read_text(encoding="utf-8")
        level, last = [heading for heading in headings(text) if heading[0] == 2][-1]
        assert level == 2
        assert last in ("Exercises", "练习")
        shown = [fence.options.get("include", "").partition("#")[0] for fence in fences(text)]
        expected = [f"docs/course/solutions/{name}.py" for name in names(page)]
        assert [path for path in dict.fromkeys(shown) if "solutions/" in path] == expected


@chapter
def test_each_solution_is_tested(page: Path) -> None:
    tests = Path(__file__).with_name(f"test_chapter{page.name[0]}_solutions.py").read_text(encoding="utf-8")
    functions = {node.name for node in ast.parse(tests).body if isinstance(node, ast.FunctionDef)}
    for number, name in enumerate(names(page), start=1):
        assert (SOLUTIONS / f"{name}.py").is_file()
        assert f'"{name}"' in tests
        assert any(function.startswith(f"test_exercise{number}") for function in functions)


def test_no_solution_without_an_exercise() -> None:
    expected = {name for page in CHAPTERS for name in names(page)}
    assert {path.stem for path in SOLUTIONS.glob("*.py")} == expected
