"""Says on stderr what takes long: downloads, loading, compiling."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from kuiperllm.cli.output import is_terminal

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

log = logging.getLogger(__name__)

_PATIENCE_S = 0.3  # what is done sooner needs no bar, and the bar's library takes a tenth of a second to load
_EVERY_S = 5.0  # between two lines of the log
_COMPILING = "compiling kernels for this machine (first run only) ..."


class Reporter:
    """Progress of long work, on stderr, while the `with` block runs.

    On a terminal bars come and go; with `-v` the log says the same, so there are none. Elsewhere the only
    thing said is that kernels are being compiled, in one line.
    """

    def __init__(self) -> None:
        quiet = not logging.getLogger("kuiperllm").isEnabledFor(logging.INFO)
        self._live = quiet and is_terminal(sys.stderr)
        self._started = self._told = time.monotonic()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._compiled = 0

    def __enter__(self) -> Self:
        from kuiperllm.backends import kernel_cache

        kernel_cache.on_compile.append(self.compiling)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from kuiperllm.backends import kernel_cache

        kernel_cache.on_compile.remove(self.compiling)
        self.clear()

    def advance(self, what: str, done: int, total: int) -> None:
        """So many bytes of a download, of loading, are done. To be given to the engine."""
        if not self._live or (self._bars is None and time.monotonic() - self._started < _PATIENCE_S):
            return
        from kuiperllm.core.memory import format_bytes

        self._show(what, done, total, f"{format_bytes(done)} of {format_bytes(total)}")

    def count(self, what: str, done: int, total: int, note: str) -> None:
        """So many tokens of a text are done; without bars, the log says so now and then."""
        now = time.monotonic()
        if self._live:
            self._show(what, done, total, note)
        elif now - self._told > _EVERY_S or done == total:
            self._told = now
            log.info("%s: %d of %d tokens, %s", what, done, total, note)

    def compiling(self, kernel: str) -> None:
        """A kernel is about to be compiled."""
        self._compiled += 1
        if self._live:
            self._show("compiling", None, None, f"{kernel} (first run only, {self._compiled} so far)")
        elif self._compiled == 1:
            print(_COMPILING, file=sys.stderr, flush=True)

    def text_follows(self) -> None:
        """From now on the model's text is shown: bars would be drawn into it, if it is on the same screen."""
        self.clear()
        if is_terminal(sys.stdout):
            self._live, self._compiled = False, max(1, self._compiled)

    def clear(self) -> None:
        """Take the bars away."""
        if self._bars is not None:
            self._bars.stop()
            self._bars, self._tasks = None, {}

    def _show(self, what: str, done: int | None, total: int | None, note: str) -> None:
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, note=note)
        self._bars.update(self._tasks[what], completed=done, total=total, note=note)


def _bars() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
        transient=True,
    )
