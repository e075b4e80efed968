"""Runs the command line, in this process or in one of its own."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from cli_result import COMMAND, Result, Run
from small_model import write_model

from kuiperllm.cli import main


@pytest.fixture
def kuiper(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kernel_cache: Path) -> Run:
    """Run a command in this process."""

    def run(*arguments: str | Path, stdin: str | bytes = "") -> Result:
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def process(kernel_cache: Path) -> Run:
    """Run a command in a process of its own."""

    def run(*arguments: str | Path, stdin: str = "", timeout: float = 120, **options: object) -> Result:
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            **options,  # type: ignore[call-overload]
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template."""
    return write_model(tmp_path_factory.mktemp("models") / "chat")
