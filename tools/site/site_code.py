"""Finds the source of a named object, so that pages show the code as it is and cannot drift from it."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

from site_pages import ROOT, Fence

C_LIKE = (".cu", ".cuh", ".c", ".cpp", ".h")


class IncludeError(Exception):
    """A page includes what is not there."""


def included(fence: Fence) -> str:
    """The code that a block with `include="path#object"` stands for, without common indentation.

    Options: `lines="2-9"` are lines of the object, counted from 1; `start="text"` and `end="text"` are the
    first line that has the text, and the next one from there that has the other.

    Raises:
        IncludeError: no such file, object, line or text.
    """
    target = fence.options["include"]
    name, _, wanted = target.partition("#")
    path = ROOT / name
    if not path.is_file():
        raise IncludeError(f"{target}: no such file")
    text = path.read_text(encoding="utf-8")
    if wanted:
        text = python_object(text, wanted) if path.suffix == ".py" else c_object(text, wanted)
        if not text:
            raise IncludeError(f"{target}: no such object")
    elif "lines" in fence.options:
        raise IncludeError(f"{target}: lines are counted in an object; name one, or use start and end")
    return textwrap.dedent(_part(text, fence.options, target)).rstrip() + "\n"


def _part(text: str, options: dict[str, str], target: str) -> str:
    lines = text.splitlines()
    first, last = 0, len(lines)
    if "start" in options:
        first = _line_with(lines, options["start"], 0, target)
    if "end" in options:
        last = _line_with(lines, options["end"], first, target) + 1
    if "lines" in options:
        match = re.fullmatch(r"(\d+)-(\d+)", options["lines"])
        if match is None or not 1 <= int(match[1]) <= int(match[2]) <= len(lines):
            raise IncludeError(f"{target}: has {len(lines)} lines, not {options['lines']}")
        first, last = int(match[1]) - 1, int(match[2])
    return "\n".join(lines[first:last])


def _line_with(lines: list[str], text: str, start: int, target: str) -> int:
    for row in range(start, len(lines)):
        if text in lines[row]:
            return row
    raise IncludeError(f"{target}: no line with {text!r}")


# --- Python -----------------------------------------------------------------------------------------------


def python_object(text: str, dotted: str) -> str:
    """The source of `Class`, `function`, `Class.method` or `NAME = ...` with decorators; "" if not there."""
    node: ast.AST | None = ast.parse(text)
    for name in dotted.split("."):
        node = next((child for child in getattr(node, "body", []) if name in _names(child)), None)
    if not isinstance(node, ast.stmt):
        return ""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno])


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


# --- CUDA C++ ---------------------------------------------------------------------------------------------

NOT_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'', re.DOTALL)


def c_object(text: str, name: str) -> str:
    """The source of a function, kernel, struct or macro, with the comment above it; "" if not there."""
    code = NOT_CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    macro = re.search(rf"^#define {re.escape(name)}\b(?:.*\\\n)*.*$", text, re.MULTILINE)
    if macro is not None:
        return text[_start(text, macro.start()) : macro.end()]
    for match in re.finditer(rf"\b{re.escape(name)}\b", code):
        opening = _body(code, match.end())
        if opening is None:
            continue
        end = _closing(code, opening) + 1
        if code[end : end + 1] == ";":
            end += 1
        return text[_start(text, match.start()) : end]
    return ""


def _body(code: str, position: int) -> int | None:
    """Where the brace after a name opens a body; None if the name is used there, not defined."""
    struct = re.compile(r"\s*(?:final\b\s*)?(?::[^;{(]*)?\{").match(code, position)
    before = code[:position].rsplit("\n", 1)[-1]
    if struct is not None and re.search(r"\b(?:struct|class|union|enum)\b", before):
        return struct.end() - 1
    if not re.match(r"\s*\(", code[position:]):
        return None
    depth, row = 0, position
    while row < len(code):
        depth += {"(": 1, ")": -1}.get(code[row], 0)
        row += 1
        if depth == 0 and code[row - 1] == ")":
            break
    rest = re.compile(r"\s*(?:const\b\s*|noexcept\b\s*)*\{").match(code, row)
    return None if rest is None or re.search(r"\b(?:if|for|while|return)\b|=", before) else rest.end() - 1


def _closing(code: str, opening: int) -> int:
    depth = 0
    for row in range(opening, len(code)):
        depth += {"{": 1, "}": -1}.get(code[row], 0)
        if depth == 0:
            return row
    raise IncludeError("a brace is not closed")


def _start(text: str, position: int) -> int:
    """Where the definition around a position begins: after the last blank line, statement or block."""
    start = text.rfind("\n", 0, position) + 1
    while start > 0:
        above = text.rfind("\n", 0, start - 1) + 1
        line = text[above : start - 1].strip()
        is_comment = line.startswith("//")
        if not line or (not is_comment and (line.endswith(("}", ";", "{", "\\")) or line.startswith("#"))):
            break
        start = above
    return start


def title(fence: Fence) -> str:
    """What stands above the included code: its file."""
    return Path(fence.options["include"].partition("#")[0]).as_posix()
