"""Runs a command and turns whatever it raises into one line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import TextIO

import typer

from kuiperllm.cli import INTERRUPTED
from kuiperllm.cli.app import app
from kuiperllm.cli.interrupts import not_lost
from kuiperllm.cli.output import print_error, reset_verbosity
from kuiperllm.errors import KuiperError

# The base of Typer's usage errors. Older versions take it from Click and newer ones bring their own.
_CLICK_ERROR = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see `kuiperllm.cli.main`."""
    _prepare_streams()
    try:
        with not_lost():
            result = app(args=arguments, prog_name="kuiper", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):  # newer versions of Typer return the code instead
        return INTERRUPTED
    except SystemExit as error:  # Typer's, where a pipe's reader went away
        return error.code if isinstance(error.code, int) else 1
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
    if isinstance(error, BrokenPipeError):  # the reader has what it wants
        return 1
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        print_error(f"{place}{error.strerror}")
        return 1
    print_error(f"{type(error).__name__}: {error} (run again with -v for the traceback)")
    return 1


def _prepare_streams() -> None:
    """Replace streams that the caller closed; show what the terminal's encoding lacks as question marks."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115 - for the rest of the process
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a stream of another kind need not know about encodings
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def _flush_or_forget(stream: TextIO) -> None:
    """Flush; if nobody reads any more, drop the rest, so that Python does not complain at its end."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
