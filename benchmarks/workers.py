"""The parent's side of the worker protocol (`worker_protocol.py` is the child's)."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any


class Worker:
    """A long-lived process that holds one engine, asleep on its stdin between requests."""

    def __init__(
        self, name: str, command: Sequence[object], log: Path, env: dict[str, str], timeout_s: float = 1800
    ) -> None:
        self.name = name
        self.log = log
        self.timeout_s = timeout_s
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=os.environ | env,
            )

    def ask(self, cmd: str, **arguments: Any) -> Any:
        """Send a request and wait for its answer; leaves with one line if the worker fails."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"cmd": cmd, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("has ended") from None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(self.timeout_s):
                raise self._failure(f"did not answer {cmd!r} within {self.timeout_s:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise self._failure(f"ended during {cmd!r} with exit code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise self._failure(f"failed in {cmd!r}: {answer['error']}")
        return answer["ok"]

    def _failure(self, what: str) -> SystemExit:
        return SystemExit(f"the worker of {self.name} {what}; see {self.log}")

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()
