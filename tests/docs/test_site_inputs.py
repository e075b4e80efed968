"""What the pages refer to is there, also where MkDocs is not installed."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import yaml

import site_code
import site_results
from site_pages import DOCS, MACRO, ROOT, Fence, fences, is_chinese

PAGES = [*sorted(DOCS.rglob("*.md"))]
DRAWINGS = sorted(DOCS.rglob("*.svg"))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name(path: Path) -> str:
    return path.relative_to(DOCS).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_by_reference_is_there(page: Path) -> None:
    for fence in fences(read(page)):
        if "include" in fence.options:
            assert not fence.body.strip(), "the block is filled by reference; leave it empty"
            assert site_code.included(fence).strip()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_measurements_are_there(page: Path) -> None:
    for call in MACRO.findall(read(page)):
        assert site_results.evaluate(call, is_chinese(name(page)))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_of_measurements_have_their_options(page: Path) -> None:
    for command in re.findall(r'\{\{ *measured\("[^"]+", "([^"]+)"\)', read(page)):
        program, *words = shlex.split(command)
        if program != "python":
            continue
        script = ROOT / words[0]
        assert script.is_file(), command
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in read(script), command


@pytest.mark.parametrize("drawing", DRAWINGS, ids=name)
def test_drawings_fit_into_pages(drawing: Path) -> None:
    """Each has a view box, fetches nothing, and styles nothing but itself."""
    text = read(drawing)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("viewBox")
    assert not re.search(r"(?:href|src)=\"(?!#)|@import|url\((?!#)", text)
    assert "<script" not in text
    stem = drawing.name.split(".")[0]
    for style in re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL):
        for selector in re.findall(r"\.([A-Za-z][\w-]*)", re.sub(r"\{[^{}]*\}", " ", style)):
            assert selector.startswith(stem), f"class {selector} would style other figures; use {stem}-..."


def _pages(entries: Any) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    values = entries.values() if isinstance(entries, dict) else entries
    return [page for value in values for page in _pages(value)]


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"tool_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_plots_show_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "site" / "figures"))
    plots = _module(ROOT / "tools" / "site" / "figures" / "performance.py")
    for file, drawing in plots.drawings().items():
        assert read(plots.FIGURES / file) == drawing, "run tools/site/figures/performance.py"
    stated = read(ROOT / "README.md")
    assert all(str(figure) in stated for figure in plots.VLLM_MS.values())


@pytest.mark.parametrize(("page", "readme"), [("index.md", "README.md"), ("zh/index.md", "README_zh.md")])
def test_readme_states_the_figures_of_the_front_page(page: str, readme: str) -> None:
    table, _, _ = read(ROOT / readme).partition("\n## ")
    for call in MACRO.findall(read(DOCS / page)):
        figure = site_results.evaluate(call)
        assert figure in table or figure.replace("%", " %") in table, call


def test_http_page_is_current(kernel_cache: Path) -> None:
    pytest.importorskip("fastapi")
    tool = _module(ROOT / "tools" / "make_http_docs.py")
    assert tool.document() == read(tool.OUTPUT), "run tools/make_http_docs.py"


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without the tags that name functions."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: suffix)


def test_pages_and_navigation_agree() -> None:
    navigation = _pages(yaml.load(read(ROOT / "mkdocs.yml"), Loader=_Loader)["nav"])
    assert len(navigation) == len(set(navigation))
    assert {name(page) for page in PAGES} == set(navigation) - {"contributing.md", "changelog.md"}


def test_site_fetches_nothing() -> None:
    settings = yaml.load(read(ROOT / "mkdocs.yml"), Loader=_Loader)
    assert settings["theme"]["font"] is False
    for path in [ROOT / "mkdocs.yml", *(DOCS / "stylesheets").glob("*"), *(DOCS / "javascripts").glob("*")]:
        assert not re.search(r"https?://|url\(|@import", read(path)), path.name


# --- the tools themselves ---------------------------------------------------------------------------------


def fence(**options: str) -> Fence:
    return Fence(0, 1, "", "```", "python", (), options, "")


def test_include_takes_the_object_and_the_lines_asked_for() -> None:
    whole = site_code.included(fence(include="src/kuiperllm/core/memory.py#CopyKind.between"))
    assert whole.startswith("@classmethod\ndef between(cls")
    second = site_code.included(fence(include="src/kuiperllm/core/memory.py#CopyKind.between", lines="2-2"))
    assert second == whole.splitlines()[1] + "\n"
    found = site_code.included(
        fence(include="src/kuiperllm/core/memory.py#CopyKind", start="@classmethod", end="def ")
    )
    assert found == "\n".join(whole.splitlines()[:2]) + "\n"


@pytest.mark.parametrize(
    "options",
    [
        {"include": "src/kuiperllm/core/nothing.py#a"},
        {"include": "src/kuiperllm/core/memory.py#nothing"},
        {"include": "src/kuiperllm/core/memory.py#CopyKind.nothing"},
        {"include": "src/kuiperllm/core/memory.py#CopyKind", "lines": "1-999"},
        {"include": "src/kuiperllm/core/memory.py#CopyKind", "start": "no such text"},
        {"include": "src/kuiperllm/core/memory.py", "lines": "1-2"},
    ],
)
def test_include_of_what_is_not_there_is_an_error(options: dict[str, str]) -> None:
    with pytest.raises(site_code.IncludeError):
        site_code.included(fence(**options))


CUDA = """\
#include "a.h"
#define WIDE(a) \\
    (a + 1)
__device__ float twice(float x);

// Doubles: see "{".
template <int N>
__device__ __forceinline__ float
twice(float x) {
    if (x > 0) { return x + x; }  // }
    return '}';
}
struct Pair { float a, b; };
extern "C" __global__ void run(float* p) { *p = twice(*p); }
"""


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [
        ("twice", "// Doubles", "}"),
        ("Pair", "struct Pair", "};"),
        ("run", 'extern "C"', "}"),
        ("WIDE", "#define", ")"),
    ],
)
def test_cuda_objects_are_found_by_their_braces(wanted: str, first: str, last: str) -> None:
    found = site_code.c_object(CUDA, wanted)
    assert found.startswith(first)
    assert found.endswith(last)
    assert found.count("struct") == (wanted == "Pair")
    assert site_code.c_object(CUDA, "nothing") == ""


def test_macros_read_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = '{"date": "%s", "chip": "C", "rows": [{"n": 1, "us": 2.5}, {"n": 2, "us": 5}]}'
    for day in ("2026-01-02", "2026-01-10"):
        (tmp_path / f"{day}-x.json").write_text(rows % day, encoding="utf-8")
    monkeypatch.setattr(site_results, "RESULTS", tmp_path)
    monkeypatch.setattr(site_results, "ROOT", tmp_path)
    assert site_results.evaluate('result("x", "rows[n=2].us", ".1f", 10)') == "50.0"
    assert site_results.evaluate('ratio("x", "rows[-1].us", "rows[0].us", ".1f")') == "2.0"
    assert site_results.evaluate('result("x", "date")') == "2026-01-10"
    assert "`a b` on C, 2026-01-10" in site_results.evaluate('measured("x", "a b")')
    for wrong in (
        'result("y", "date")',
        'result("x", "rows")',
        'result("x", "rows[n=3].us")',
        "open('x')",
        "1",
    ):
        with pytest.raises(site_results.ResultError):
            site_results.evaluate(wrong)
