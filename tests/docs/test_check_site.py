"""What looks through a built site finds what is wrong there."""

from __future__ import annotations

from pathlib import Path

import pytest

import check_site

GOOD = """<html><head><link rel="canonical" href="https://example.org/"><link rel="stylesheet" href="a.css">
<script src="a.js"></script></head><body><h1 id="top">x</h1><a href="b.html#deep">b</a><a href="#top">up</a>
<a href="https://example.org/paper">paper</a></body></html>"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "a.html").write_text(GOOD, encoding="utf-8")
    (tmp_path / "b.html").write_text('<h2 id="deep">y</h2>', encoding="utf-8")
    (tmp_path / "a.css").write_text("p { color: red }", encoding="utf-8")
    (tmp_path / "a.js").write_text("", encoding="utf-8")
    check_site.page.cache_clear()
    return tmp_path


def test_good_site_has_no_problems(site: Path) -> None:
    assert list(check_site.problems(site)) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("b.html#deep", "c.html", "a.html: c.html is not there"),
        ("b.html#deep", "b.html#shallow", "a.html: b.html#shallow has no such anchor"),
        (
            'src="a.js"',
            'src="https://example.org/a.js"',
            "a.html: loads https://example.org/a.js from a network",
        ),
    ],
)
def test_problems_are_named(site: Path, old: str, new: str, problem: str) -> None:
    (site / "a.html").write_text(GOOD.replace(old, new), encoding="utf-8")
    assert list(check_site.problems(site)) == [problem]


def test_fonts_of_a_network_are_found(site: Path) -> None:
    (site / "a.css").write_text("@import 'https://example.org/font.css';", encoding="utf-8")
    assert list(check_site.problems(site)) == ["a.css: loads https://example.org/font.css from a network"]
