"""The thread that an engine runs in, and how others reach it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from kuiperllm.engine.core import Engine
from kuiperllm.engine.output import Delta
from kuiperllm.engine.request import Request
from kuiperllm.errors import EngineStoppedError, KuiperError

log = logging.getLogger(__name__)

_Command = Callable[[], list[Delta]]


class EngineThread:
    """Runs an engine for as long as it has work, and sleeps otherwise.

    Requests are handed over, not carried out, by the methods, which any thread may call.

    Args:
        engine: nobody else calls it from now on.
        deliver: told, in this thread, what each step has made certain.
        on_failure: told, in this thread, if the engine fails; nothing is delivered after that.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[list[Delta]], None],
        on_failure: Callable[[EngineStoppedError], None],
    ) -> None:
        self.failure: BaseException | None = None
        """What the engine failed with."""
        self._engine = engine
        self._deliver = deliver
        self._on_failure = on_failure
        self._commands: SimpleQueue[_Command | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kuiper-engine", daemon=True)
        self._thread.start()

    @property
    def num_queued(self) -> int:
        """Requests that have not reached the engine yet, and other commands."""
        return self._commands.qsize()

    def add(self, request: Request) -> None:
        """Queue a request. What it fails with is delivered."""

        def add() -> list[Delta]:
            try:
                self._engine.add(request)
            except Exception as error:  # also what makes a guide may raise anything
                told = (
                    error
                    if isinstance(error, KuiperError)
                    else KuiperError(f"{type(error).__name__}: {error}")
                )
                return [Delta(request.request_id, 0, "", [], None, error=told)]
            return []

        self._commands.put(add)

    def abort(self, request_id: str) -> None:
        """Give a request up; the last deltas of its outputs are delivered."""
        self._commands.put(lambda: self._engine.abort(request_id))

    def stop(self) -> None:
        """Let the thread end after the step that is under way."""
        self._commands.put(None)

    def join(self) -> None:
        """Wait until it has ended."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._carry_out():
                if self._engine.has_work:
                    self._hand_over(self._engine.step())
        except BaseException as error:  # whatever it was, whoever waits has to be told
            log.exception("the engine failed")
            self.failure = error
            self._on_failure(EngineStoppedError(f"the engine failed and has stopped: {error or type(error)}"))
        finally:
            with suppress(KuiperError):  # a GPU that failed may refuse everything from now on
                self._engine.reset()

    def _carry_out(self) -> bool:
        """Do what others asked for, and wait for that if there is nothing else to do; whether to go on."""
        try:
            while (command := self._commands.get(block=not self._engine.has_work)) is not None:
                self._hand_over(command())
        except Empty:
            return True
        return False

    def _hand_over(self, deltas: list[Delta]) -> None:
        if deltas:
            self._deliver(deltas)
