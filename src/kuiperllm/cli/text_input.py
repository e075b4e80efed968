"""Text that a command reads from its arguments or from standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kuiperllm.cli.output import is_terminal
from kuiperllm.errors import UsageError

_MOST_FILE_BYTES = 64 << 20  # a model reads that for days, and its tokens take gigabytes


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


def read_file(path: str) -> str:
    """The text in a file, or with `-` in standard input, less one line break at its end.

    Raises:
        UsageError: it is not there, a folder, empty, too large, or not UTF-8.
    """
    name = "standard input" if path == "-" else path
    try:
        if path == "-":
            data = sys.stdin.buffer.read(_MOST_FILE_BYTES + 1)
        else:
            with open(path, "rb") as file:
                data = file.read(_MOST_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # a ValueError: there is a null character in the name
        raise UsageError(f"{name}: {getattr(error, 'strerror', None) or error}; name a text file") from None
    if len(data) > _MOST_FILE_BYTES:
        raise UsageError(f"{name} has more than {_MOST_FILE_BYTES >> 20} MiB; a part of it will do")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise UsageError(f"{name} is empty: there is nothing to score")
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
