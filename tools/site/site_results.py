"""Puts measured figures into pages, from the files in `benchmarks/results`, so that they cannot drift.

Macros of pages, all arguments constants:

    {{ result("latency", "results[model=llama-3.2-1b].token_ms.greedy.median", ".3f") }}
    {{ result("latency", "results[model=llama-3.2-1b].read_bandwidth_bytes_per_s", ".1f", 1e-12) }}
    {{ ratio("latency", "results[0].floor_ms", "results[0].token_ms.greedy.median", ".0%") }}
    {{ measured("latency", "python benchmarks/latency.py --device cuda:0") }}

The first argument is a kind of result: one of `KINDS`, or the name of a file without its date and `.json`. Of
several dates the last is taken. A key with a dot in it stands in brackets: `tokens_per_s[llama.cpp].decode`.
"""

from __future__ import annotations

import ast
import json
import re
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

from site_pages import ROOT

RESULTS = ROOT / "benchmarks" / "results"

KINDS = {
    "latency": ("h200-latency",),
    "attention": ("h200-attention",),
    "gemm": ("h200-gemm",),
    "gemm-qwen": ("h200-gemm-qwen",),
    "gemm-codes": ("h200-gemm-codes",),
    "throughput": ("h200-throughput",),
    "batch-decode": ("h200-batch-decode",),
    "peers": ("h200-peers",),
    "long-context": ("h200-long-context",),
    "ops": ("h200-ops",),
    "profile": ("h200-profile-kernels",),
    "start": ("h200-start",),
    "accuracy": ("cpu-accuracy",),
    "llama-cpp-q8": ("cpu-llama-cpp-quantized",),
    "llama-cpp-q4": ("cpu-llama-cpp-quantized",),
    "llama-cpp-q4_k_m": ("cpu-llama-cpp-quantized",),
    "llama-cpp-bf16": ("cpu-llama-cpp-bf16",),
    "cpu-batches": ("cpu-batch-decode",),
    "prefix-cache": ("cpu-prefix-cache",),
    "export": ("cpu-export-llama-3.1-8b",),
    "memory": ("cpu-memory-llama-3.2-1b",),
}
"""Files by what they measure. The first file that has the figure asked for is taken."""


class ResultError(Exception):
    """A page asks for a figure that was not measured."""


def files(kind: str) -> list[Path]:
    """The files of a kind, the one to prefer first.

    Raises:
        ResultError: there is none.
    """
    found = []
    for name in KINDS.get(kind, (kind,)):
        dated = re.compile(rf"\d{{4}}-\d\d-\d\d-{re.escape(name)}\.json")
        found += sorted(
            (path for path in RESULTS.glob("*.json") if dated.fullmatch(path.name)), reverse=True
        )[:1]
    if not found:
        raise ResultError(f"no result of kind {kind!r} in {RESULTS.relative_to(ROOT)}")
    return found


@lru_cache(maxsize=64)
def load(path: Path) -> Any:
    """The content of a result file."""
    return json.loads(path.read_text(encoding="utf-8"))


def find(kind: str, path: str) -> tuple[Path, Any]:
    """The figure at a path such as `results[model=llama-3.2-1b].token_ms.greedy`, and the file it is in.

    Raises:
        ResultError: no file of that kind has it.
    """
    for file in files(kind):
        try:
            return file, _walk(load(file), path)
        except LookupError:
            continue
    raise ResultError(f"no {path!r} in {' or '.join(file.name for file in files(kind))}")


def _walk(value: Any, path: str) -> Any:
    for step in re.findall(r"\[[^\]]*\]|[^.\[\]]+", path):
        if not step.startswith("["):
            value = value[step]
        elif re.fullmatch(r"-?\d+", step[1:-1]):
            value = value[int(step[1:-1])]
        elif "=" not in step:
            value = value[step[1:-1]]
        else:
            value = _row(value, dict(pair.split("=", 1) for pair in re.split(r",(?=\w+=)", step[1:-1])))
    return value


def _row(rows: list[Any], wanted: dict[str, str]) -> Any:
    """The first row whose fields have these values."""
    for row in rows:
        if all(str(row.get(key)) == text for key, text in wanted.items()):
            return row
    raise LookupError(wanted)


def result(kind: str, path: str, form: str = "", scale: float = 1.0) -> str:
    """A figure, or the median of a list of them, times `scale`, in the given format."""
    _, value = find(kind, path)
    if isinstance(value, list) and all(isinstance(item, int | float) for item in value):
        value = median(value)
    if isinstance(value, dict | list):
        raise ResultError(f"{path!r} of {kind!r} is no figure")
    return format(value * scale, form) if isinstance(value, int | float) else str(value)


def ratio(kind: str, above: str, below: str, form: str = ".2f") -> str:
    """One figure divided by another of the same kind."""
    return format(find(kind, above)[1] / find(kind, below)[1], form)


def measured(kind: str, command: str, chinese: bool = False) -> str:
    """One line that says how figures were measured: command, machine, day, files; links from the root."""
    found = files(kind)
    facts = load(found[0])
    machine = facts["chip"] if "chip" in facts else facts["processor"].split(",")[0]
    day = found[0].name[:10]
    links = ", ".join(f"[{file.name}](/{file.relative_to(ROOT).as_posix()})" for file in found)
    if chinese:
        return f"测量命令：`{command}`，机器：{machine}，日期：{day}，结果文件：{links}"
    return f"Measured with `{command}` on {machine}, {day}: {links}"


def evaluate(call: str, chinese: bool = False) -> str:
    """What a macro stands for, given the text between its braces.

    Raises:
        ResultError: an unknown macro, wrong arguments, or a figure that is not there.
    """
    try:
        node = ast.parse(call, mode="eval").body
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.keywords:
            raise ResultError(f"not a macro: {call}")
        values = [ast.literal_eval(argument) for argument in node.args]
        if node.func.id == "measured":
            return measured(*values, chinese=chinese)
        return {"result": result, "ratio": ratio}[node.func.id](*values)
    except (SyntaxError, TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise ResultError(f"{call}: {error}") from None
