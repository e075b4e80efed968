"""Text that a command reads from its arguments or from standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kuiperllm.cli.output import is_terminal
from kuiperllm.errors import UsageError


def read_text(argument: str | None, what: str) -> str:
    """The argument; where it is `-` or missing, what is piped in, less the line break at its end.

    Raises:
        UsageError: there is no argument and nothing is piped in, or it is not UTF-8.
    """
    if argument not in (None, "-"):
        return argument
    if argument is None and is_terminal(sys.stdin):
        raise UsageError(f"no {what}: give one as an argument, or pipe it in")
    with _utf8():
        text = sys.stdin.read()
    return text.removesuffix("\n").removesuffix("\r")


def piped_lines() -> Iterator[str]:
    """The lines of standard input, as they come.

    Raises:
        UsageError: a line is not UTF-8.
    """
    with _utf8():
        yield from sys.stdin


@contextmanager
def _utf8() -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not {error.encoding.upper()} text: {error.reason} at byte {error.start}"
        ) from None
