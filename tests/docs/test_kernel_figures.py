"""The figures of the course are what their scripts draw, from the newest results where they show any."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from site_pages import DOCS, ROOT

SCRIPTS = ("rms_norm", "nsight", "tensor_cores", "first_chapters")


@pytest.mark.parametrize("name", SCRIPTS)
def test_drawn_anew(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "site" / "figures"))
    before = set(sys.modules)
    try:
        canvas = importlib.import_module("canvas")
        monkeypatch.setattr(canvas, "FIGURES", tmp_path)
        importlib.import_module(name).main()
    finally:
        for new in set(sys.modules) - before:
            del sys.modules[new]
    drawn = sorted(tmp_path.glob("*.svg"))
    assert drawn
    for path in drawn:
        kept = DOCS / "course" / "figures" / path.name
        assert kept.read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), f"run {name}.py again"
