"""Each block marked `run` does what its page says."""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import site_pages
from kuiperllm.core import Device
from kuiperllm.errors import DeviceError

PAGES = [
    path
    for folder in ("course", "start", "reference")
    for path in sorted((site_pages.DOCS / folder).rglob("*.md"))
    if not site_pages.is_chinese(path.relative_to(site_pages.DOCS).as_posix())
    and any("run" in fence.words for fence in site_pages.fences(path.read_text(encoding="utf-8")))
]
MATCHES = doctest.OutputChecker().check_output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(site_pages.DOCS).as_posix())
def test_page_does_what_it_says(
    page: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page run in order, Python in one namespace; what they print is what the page shows."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "snippets"}
    blocks = list(site_pages.fences(page.read_text(encoding="utf-8")))
    left_out = ""
    try:
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            if "run" not in block.words:
                continue
            try:
                _wait_for_device(block, request)
            except pytest.skip.Exception as reason:
                left_out = str(reason)
                continue
            printed = _run(block, page, namespace)
            if following is not None and "output" in following.words:
                same = MATCHES(_trimmed(following.body), _trimmed(printed), doctest.ELLIPSIS)
                assert same, f"{page.name}, line {block.first + 1} printed:\n{printed}"
    finally:
        namespace.clear()
    if left_out:
        pytest.skip(f"all but the blocks for a GPU: {left_out}")


def _trimmed(output: str) -> str:
    """Without empty lines at the ends, which a page does not show."""
    return output.strip("\n") + "\n"


def _wait_for_device(block: site_pages.Fence, request: pytest.FixtureRequest) -> None:
    if "cuda" in block.words:
        request.getfixturevalue("cuda")
    if "emulated" in block.words:
        request.getfixturevalue("emulated_cuda")
    if "gpu" in block.words:
        try:
            Device("cuda:0")
        except DeviceError:
            pytest.skip("no GPU")


def _run(block: site_pages.Fence, page: Path, namespace: dict[str, Any]) -> str:
    if block.language == "console":
        return _run_commands(block)
    printed = io.StringIO()
    code = compile("\n" * (block.first + 1) + block.body, str(page), "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue()


def _run_commands(block: site_pages.Fence) -> str:
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    source = str(site_pages.ROOT / "src")
    environment = os.environ | {
        "PATH": os.pathsep.join(folders),
        "PYTHONPATH": source,
        "COLUMNS": "110",
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        ["bash", "-ec", block.body], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, f"line {block.first + 1}:\n{done.stderr}"
    return done.stdout
