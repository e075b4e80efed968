"""What a command printed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

COMMAND = (sys.executable, "-m", "kuiperllm")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """Lines on stderr, without the one about compiling, which depends on what ran before."""
        return [line for line in self.err.splitlines() if not line.startswith("compiling kernels")]

    def refused(self) -> str:
        """The one line of an error; nothing else was printed."""
        assert self.out == ""
        [line] = self.said
        assert line.startswith("error: "), line
        return line


Run = Callable[..., Result]
"""Runs a command with these arguments and, by keyword, `stdin`."""
