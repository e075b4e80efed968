"""Runs a command and turns whatever it raises into one line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import TextIO

import typer

from kuiperllm.cli import INTERRUPTED
from kuiperllm.cli.app import app
from kuiperllm.cli.output import print_error, reset_verbosity
from kuiperllm.errors import KuiperError

BROKEN_PIPE = 141
"""Exit code when the reader of a pipe went away: 128 and the number of SIGPIPE, as shells have it."""

# The base of Typer's usage errors. Older versions take it from Click and newer ones bring their own.
_CLICK_ERROR = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see `kuiperllm.cli.main`."""
    _tolerate_encodings()
    try:
        result = app(args=arguments, prog_name="kuiper", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        _leave_quietly_from_here()
        return INTERRUPTED
    except typer.Abort:  # the end of input where a question was asked
        return 1
    except Exception as error:
        return _report(error)
    finally:
        reset_verbosity()
        _flush_or_forget(sys.stdout)


def _report(error: Exception) -> int:
    """Say what happened in one line; the exit code."""
    log = logging.getLogger("kuiperllm")
    if log.isEnabledFor(logging.INFO):
        log.info("where it happened:", exc_info=error)
    if isinstance(error, _CLICK_ERROR):
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        print_error(f"{error.format_message().rstrip('.')}{hint}")  # type: ignore[attr-defined]
        return int(error.exit_code)  # type: ignore[attr-defined]
    if isinstance(error, KuiperError):
        print_error(str(error))
        return error.exit_code
    if isinstance(error, MemoryError):
        print_error("out of memory; use a smaller model, --quant q8 or a smaller --max-model-len")
        return 1
    if isinstance(error, BrokenPipeError) or (isinstance(error, OSError) and error.errno == errno.EPIPE):
        return BROKEN_PIPE
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        print_error(f"{place}{error.strerror}")
        return 1
    print_error(f"{type(error).__name__}: {error} (run again with -v for the traceback)")
    return 1


def _tolerate_encodings() -> None:
    """Text that the terminal's encoding lacks is shown as question marks instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a replaced stream need not know about encodings
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def _leave_quietly_from_here() -> None:
    """Further Ctrl-C no longer interrupt what Python does at its end."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _flush_or_forget(stream: TextIO) -> None:
    """Flush; if nobody reads any more, drop the rest, so that Python does not complain at its end."""
    try:
        stream.flush()
    except (OSError, ValueError, AttributeError):
        with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
