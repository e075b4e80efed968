"""The messages that the page of troubleshooting explains are those that the code has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from site_pages import DOCS, ROOT, fences

MESSAGES = [
    (page, line)
    for page in sorted((DOCS / "start").rglob("*.md"))
    for fence in fences(page.read_text(encoding="utf-8"))
    if "message" in fence.words
    for line in fence.body.splitlines()
]


def _texts(node: ast.AST) -> Iterator[str]:
    """The texts of a module, with `...` where values are put in."""
    for child in ast.walk(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield re.sub(r"\{[^{}]*\}|%[ds]", "...", child.value)
        if isinstance(child, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "..." for part in child.values
            )


@pytest.fixture(scope="module")
def texts() -> list[str]:
    sources = sorted((ROOT / "src" / "kuiperllm").rglob("*.py"))
    return [text for path in sources for text in _texts(ast.parse(path.read_text(encoding="utf-8")))]


def normal(text: str) -> str:
    """Without what only says which value stands there."""
    return re.sub(r"[.]{4,}", "...", text.removeprefix("warning: "))


@pytest.mark.parametrize(("page", "message"), MESSAGES, ids=[message[:60] for _, message in MESSAGES])
def test_message_is_in_the_code(page: object, message: str, texts: list[str]) -> None:
    assert any(normal(message) in normal(text) for text in texts)


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 20
