"""The table that leads from the outline to the code names files, and things in them, that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from site_pages import DOCS

PAGES = (DOCS / "course" / "index.md", DOCS / "course" / "zh" / "index.md")
OUTLINE = {
    "device": "设备",
    "buffer": "缓冲区",
    "unified memory": "统一内存",
    "operator layer": "算子层",
    "tensor": "张量",
    "RMSNorm": "RMSNorm",
    "block reduction": "块内归约",
    "Nsight": "Nsight",
    "quantized export": "量化导出",
    "quantized loading": "量化加载",
}
ROW = re.compile(r"^\| ([^|]+) \| (.+\]\(.+) \| \[(\d)\]\(([\w.-]+)\) \|$", re.MULTILINE)
ENTRY = re.compile(r"\]\(([^)]+)\)(?:(?:: |\uff1a)(`[^;\uff1b]+`))?")


@pytest.mark.parametrize("page", PAGES, ids=["english", "chinese"])
def test_each_item_of_the_outline_has_its_code(page: Path) -> None:
    rows = {item: (code, link) for item, code, _, link in ROW.findall(page.read_text(encoding="utf-8"))}
    wanted = OUTLINE.values() if page.parent.name == "zh" else OUTLINE.keys()
    assert set(wanted) <= set(rows)
    for item, (code, chapter) in rows.items():
        assert (page.parent / chapter).is_file(), f"{item}: no chapter {chapter}"
        entries = ENTRY.findall(code)
        assert entries, item
        for target, names in entries:
            path = (page.parent / target).resolve()
            assert path.is_file(), f"{item}: no file {target}"
            text = path.read_text(encoding="utf-8")
            for name in re.findall(r"`([^`]+)`", names):
                assert re.search(rf"\b(?:class |def )?{re.escape(name)}\b", text), (
                    f"{item}: no {name} in {target}"
                )


def test_both_languages_lead_to_the_same_code() -> None:
    english, chinese = (
        [ENTRY.findall(code) for _, code, _, _ in ROW.findall(page.read_text(encoding="utf-8"))]
        for page in PAGES
    )
    for ours, theirs in zip(english, chinese, strict=True):
        assert [Path(target).name for target, _ in ours] == [Path(target).name for target, _ in theirs]
        assert [re.findall("`[^`]+`", names) for _, names in ours] == [
            re.findall("`[^`]+`", names) for _, names in theirs
        ]
