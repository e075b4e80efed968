"""What a person types in `kuiper chat`: edited lines, their history, messages of several lines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

PROMPT, CONTINUED = "> ", "... "
QUOTES = '"""'
_HISTORY_LENGTH = 1000

Read = Callable[[str], str]
"""Like `input`: asks with a prompt, raises EOFError at the end."""


@contextlib.contextmanager
def line_editing(history: Path) -> Iterator[None]:
    """Let `input` edit and recall lines, also those of earlier conversations, where Python has readline.

    Args:
        history: the file of earlier lines, which only its owner can read. If it cannot be written, lines are
            recalled as long as the process lives.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(_HISTORY_LENGTH)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(history, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(history)


def messages(read: Read) -> Iterator[str]:
    """Messages until the end of the input.

    A line that ends in a backslash goes on in the next one; lines from triple quotes to triple quotes are one
    message. Ctrl-C in such a message forgets it.

    Raises:
        KeyboardInterrupt: Ctrl-C at the beginning of a message.
    """
    while True:
        try:
            first = read(PROMPT)
        except EOFError:
            return
        try:
            whole = _whole(first, read)
        except KeyboardInterrupt:
            print()
            continue
        yield whole


def _whole(first: str, read: Read) -> str:
    """A message that begins with this line; the end of the input ends it as well."""
    if first.lstrip().startswith(QUOTES):
        lines = [first.lstrip().removeprefix(QUOTES)]
        with contextlib.suppress(EOFError):
            while not lines[-1].rstrip().endswith(QUOTES):
                lines.append(read(CONTINUED))
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")
    lines = [first]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        try:
            lines.append(read(CONTINUED))
        except EOFError:
            break
    return "\n".join(lines)
