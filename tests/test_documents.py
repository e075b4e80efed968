"""The documents agree with each other, with the files they speak of, and with the code."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

import kuiperllm
from kuiperllm.backends.cpu.features import LEVELS
from kuiperllm.cli.app import app
from kuiperllm.models import supported_models
from kuiperllm.quant.ggml import formats
from kuiperllm.text import ChatTemplate

ROOT = Path(__file__).resolve().parents[1]
README, README_ZH = ROOT / "README.md", ROOT / "README_zh.md"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [
    ROOT / ".ci" / "run",
    *sorted((ROOT / "tools").glob("*.py")),
    *sorted((ROOT / "examples").glob("*")),
]

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FUNCTION = re.compile(r"\]\(([^)\s]+\.py)\)`::(\w+)`")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^(#+) +(.+)$", re.MULTILINE)
SET_UP = "python3 -m venv .venv && "


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose(path: Path) -> str:
    """The text without code blocks."""
    return FENCE.sub("", read(path))


def blocks(path: Path, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(read(path)) if found == language]


def commands(path: Path) -> list[str]:
    lines = [line.strip() for block in blocks(path, "console") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def anchor(heading: str) -> str:
    """The name that GitHub gives to a heading."""
    words = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return words.replace(" ", "-")


document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


@document
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(prose(path)):
        if target.startswith(("https://", "http://")):
            continue
        file, _, fragment = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.is_relative_to(ROOT), target
        assert found.exists(), target
        if fragment:
            assert fragment in [anchor(heading) for _, heading in HEADING.findall(prose(found))], target


@document
def test_functions_named_after_a_file_are_in_it(path: Path) -> None:
    for file, name in FUNCTION.findall(prose(path)):
        nodes = ast.walk(ast.parse(read(path.parent / file)))
        assert name in [getattr(node, "name", None) for node in nodes], f"{file}::{name}"


def test_architecture_names_functions() -> None:
    assert len(FUNCTION.findall(prose(ROOT / "docs" / "architecture.md"))) >= 5


@pytest.mark.parametrize("path", [*DOCUMENTS, *SCRIPTS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_absolute_paths(path: Path) -> None:
    if path.is_file():
        found = re.findall(
            r"(?<![\w.:/])(?:~|/(?:work|home|root|Users|opt|mnt|tmp|srv)\b)/[\w./-]*", read(path)
        )
        assert not found


# --- the two READMEs ----------------------------------------------------------------------------------------


def test_readmes_have_the_same_outline() -> None:
    def outline(path: Path) -> list[str]:
        return [marks for marks, _ in HEADING.findall(prose(path))]

    def shape(path: Path) -> list[str]:
        return [f"{language} {len(body.splitlines())}" for language, body in FENCE.findall(read(path))]

    assert outline(README) == outline(README_ZH)
    assert shape(README) == shape(README_ZH)


def test_readmes_have_the_same_tables_and_figures() -> None:
    def rows(path: Path) -> list[int]:
        return [line.count("|") for line in read(path).splitlines() if line.startswith("|")]

    def figures(path: Path) -> list[str]:
        _, _, rest = read(path).partition("<!-- figures:begin -->")
        table, end, _ = rest.partition("<!-- figures:end -->")
        assert end
        return re.findall(r"\d+(?:[.,]\d+)*", table)

    assert rows(README) == rows(README_ZH)
    assert sorted(figures(README)) == sorted(figures(README_ZH))


def test_readmes_have_the_same_commands() -> None:
    def skeleton(path: Path) -> list[list[str]]:
        return [re.sub(r'"[^"]*"', '""', command).split() for command in commands(path)]

    assert skeleton(README) == skeleton(README_ZH)


@pytest.mark.parametrize("path", [README, README_ZH], ids=["en", "zh"])
def test_continuous_integration_runs_the_commands_of_the_readme(path: Path) -> None:
    generate, test = (command for command in commands(path) if command.startswith(SET_UP))
    script = read(ROOT / ".ci" / "run")
    assert test.replace(".venv", ".venv-ci") in script
    assert generate.rpartition("/")[2] in script


@pytest.mark.parametrize("path", [README, README_ZH], ids=["en", "zh"])
def test_readme_lists_what_the_code_supports(path: Path) -> None:
    text = read(path)
    gguf = re.search(r"^\| GGUF \| (.*) \|$", text, re.MULTILINE)
    assert gguf is not None
    assert set(re.findall(r"\b(?:[FQ]\w*\d\w*|BF16)\b", gguf[1])) == {f.name for f in formats().values()}
    rows = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    first = [row[1].strip().strip("`") for row in rows]
    second = [row[2].strip().strip("`") for row in rows]
    assert set(supported_models()) <= set(second)
    assert tuple(cell for cell in first if cell in LEVELS) == LEVELS


def test_python_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's program as it stands, but on the demo model, with a chat template of one line."""
    (program,) = blocks(README, "python")
    template = ChatTemplate("{{ messages[0].content }}\n", bos_token="", eos_token="")
    real = kuiperllm.LLM

    def demo(model: str, **options: Any) -> kuiperllm.LLM:
        llm = real(None, **options)
        llm.loaded = replace(llm.loaded, chat_template=template)
        return llm

    monkeypatch.setattr(kuiperllm, "LLM", demo)
    exec(compile(program, "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 200


def test_changelog_is_about_this_version() -> None:
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    versions = re.findall(r"^## \[(.+?)\] - (.+)$", read(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert versions[0][0] == project["version"]


# --- the command line -------------------------------------------------------------------------------------


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_line_page_is_current() -> None:
    written = read(ROOT / "docs" / "cli.md")
    assert load_tool("make_cli_docs").document() == written, "run tools/make_cli_docs.py"


def test_operators_page_is_current() -> None:
    written = read(ROOT / "docs" / "ops.md")
    assert load_tool("make_ops_docs").document() == written, "run tools/make_ops_docs.py"


@document
def test_commands_have_the_options_that_documents_use(path: Path) -> None:
    group: Any = typer.main.get_command(app)
    for command in commands(path):
        for part in re.split(r" (?:\||&&) ", command):
            words = shlex.split(part)
            if Path(words[0]).name != "kuiper" or len(words) < 2 or words[1].startswith("-"):
                continue
            known = group.commands[words[1]]
            if len(words) > 2 and words[2] in getattr(known, "commands", {}):
                known = known.commands[words[2]]
            options = {name for parameter in known.params for name in parameter.opts} | {"--help"}
            used = {word for word in words[2:] if word.startswith("-") and word != "-"}
            assert used <= options, command


# --- results of benchmarks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.name
)
def test_results_say_when_and_on_what_they_were_measured(path: Path) -> None:
    facts = json.loads(read(path))
    assert facts["date"][:10] == path.name[:10]
    assert facts.get("chip") or facts["processor"]


# --- profiling --------------------------------------------------------------------------------------------


def test_profiling_page_has_the_figures_that_were_measured() -> None:
    tool = load_tool("make_profiling_tables")
    path = tool.results()
    if path is None:
        pytest.skip("nothing measured yet")
    written = read(tool.PAGE)
    assert tool.document(written, json.loads(read(path)), path.name) == written, (
        "run tools/make_profiling_tables.py"
    )


def test_profiling_page_has_a_place_for_each_example(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_tool("make_profiling_tables")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    examples = {version.example for version in importlib.import_module("profile_versions").VERSIONS}
    places = [name for _, name, _ in tool.MARKED.findall(read(tool.PAGE))]
    kinds = ("times", "memory", "warps")
    assert sorted(places) == sorted(["where", *(f"{e}-{kind}" for e in examples for kind in kinds)])


def test_profiling_tables_show_what_is_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_tool("make_profiling_tables")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    asked = importlib.import_module("ncu").METRICS
    assert {metric for _, metric, _, _ in (*tool.MEMORY, *tool.WARPS)} <= set(asked)
    counters = {
        "gpu__time_duration.sum": 2500.0,
        "dram__bytes_read.sum": None,
        "smsp__inst_executed.sum": 8e6,
    }
    common = {"change": "one", "bytes": 4e6, "floor_us": 1.0}
    first = {"name": "x/a", "us": 2.0, "against": None, "predicted": None}
    second = {"name": "x/b", "us": 1.5, "against": "x/a", "predicted": 0.5}
    facts = {
        "results": [
            common | first | {"kernels": [{"name": "add", "counters": counters}]},
            common | second | {"kernels": []},
        ]
    }

    def filled(kind: str) -> list[str]:
        page = f"<!-- figures: x-{kind} -->\nold\n<!-- end of figures -->\n"
        lines: list[str] = tool.document(page, facts, "x.json").splitlines()
        return lines[3:-1]

    assert filled("times") == [
        "| `a` | one | 2.00 | 1.00 |  |  |  |",
        "| `b` | one | 1.50 | 1.00 | `a` | 0.50 | 0.75 |",
    ]
    assert filled("memory")[0].startswith("| `a` | `add` | 2.50 | - | - |")
    assert filled("warps")[0].startswith("| `a` | `add` | - | - | - | 2000.0 | - |")


# --- what the wheel is checked for ------------------------------------------------------------------------


def test_wheel_check_finds_what_is_missing(tmp_path: Path) -> None:
    import zipfile

    check = load_tool("check_wheel")
    package = ROOT / "src" / "kuiperllm"
    kinds = (".py", ".cu", ".cuh", ".json", ".gguf", ".html", ".css", ".js", ".svg")
    files = [path for path in package.rglob("*") if path.suffix in kinds or path.name == "py.typed"]
    for left_out in ("", "py.typed", "demo.gguf", "team_kernel.py", "decode.cu", "gemm_table.json", "app.js"):
        wheel = tmp_path / f"kuiperllm-0-{left_out or 'whole'}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in files:
                if path.name != left_out:
                    archive.write(path, f"kuiperllm/{path.relative_to(package).as_posix()}")
        found = check.problems(wheel)
        assert len(found) == bool(left_out)
        assert all(problem.endswith(f"{left_out} is missing") for problem in found)
    compiled = tmp_path / "kuiperllm-0-cp311-cp311-linux_x86_64.whl"
    wheel.rename(compiled)
    assert "not a pure Python wheel" in check.problems(compiled)[0]
