"""Ctrl-C where it must not strike at once, and where Python would lose it."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


class HeldBack:
    """Turns the first Ctrl-C in the `with` block into a request to stop; a second one interrupts.

    Attributes:
        requested: whether there was one.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def postponed() -> Iterator[None]:
    """Obey Ctrl-C after the block.

    For imports: native code that imports a module, as ml_dtypes does NumPy, prints the interruption with its
    traceback and goes on with an ImportError.

    Raises:
        KeyboardInterrupt: there was a Ctrl-C in the block.
    """
    with HeldBack() as interruption:
        yield
    if interruption.requested:
        raise KeyboardInterrupt


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP leave the block as Ctrl-C does, so that what it has begun is cleaned up."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def not_lost() -> Iterator[None]:
    """Repeat a Ctrl-C that comes in a finalizer, where Python would print and forget it."""
    previous = sys.unraisablehook

    def hook(unraisable: UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.01, _thread.interrupt_main)  # at once, it would strike in this hook
            again.daemon = True
            again.start()
        else:
            previous(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous


def import_engine() -> None:
    """Import what takes long to import, with Ctrl-C postponed."""
    with postponed():
        import kuiperllm.engine.loading  # noqa: F401
