"""Printing: text, tables, JSON, errors, log lines."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

_RED, _PLAIN = "\x1b[31m", "\x1b[0m"
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


def write(text: str) -> None:
    """Show text on stdout at once."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def print_table(rows: Iterable[tuple[str, object]]) -> None:
    """Names and values in two columns; a row without a name goes on with the value above."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    write("".join(f"{name:<{width}}  {value}\n" for name, value in rows))


def print_error(message: str) -> None:
    """One line on stderr, in red if that is a terminal."""
    printable = "".join(char if char.isprintable() else " " for char in message)
    label = f"{_RED}error:{_PLAIN}" if _is_colourful(sys.stderr) else "error:"
    print(label, " ".join(printable.split()), file=sys.stderr, flush=True)


def set_verbosity(count: int) -> int:
    """Show log records on stderr: warnings, with `-v` also information, with `-vv` everything."""
    log = logging.getLogger("kuiperllm")
    log.setLevel(_LEVELS[min(count, len(_LEVELS) - 1)])
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s" if count else "warning: %(message)s"))
    log.handlers = [handler]
    return count


def reset_verbosity() -> None:
    """Take back what `set_verbosity` did."""
    log = logging.getLogger("kuiperllm")
    log.setLevel(logging.NOTSET)
    log.handlers = []


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at this stream."""
    return stream.isatty()


def _is_colourful(stream: TextIO) -> bool:
    return is_terminal(stream) and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
