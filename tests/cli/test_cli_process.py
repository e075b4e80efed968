"""How the command behaves as a process: start, streams, exit codes, signals, pipes, terminals, errors."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from cli_result import COMMAND, Run

from kuiperllm.cli import main
from kuiperllm.cli.interrupts import not_lost, postponed
from kuiperllm.engine.llm import LLM
from kuiperllm.errors import KuiperError, UsageError

COMMANDS = ("generate", "chat", "info", "tokenize", "bench", "perplexity", "compare", "doctor")


# --- help -------------------------------------------------------------------------------------------------


def test_help_lists_the_commands(process: Run) -> None:
    result = process("--help")
    assert result.code == 0
    assert all(command in result.out for command in COMMANDS)
    assert "Traceback" not in result.err


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_examples(kuiper: Run, command: str) -> None:
    result = kuiper(command, "--help")
    assert result.code == 0
    assert "Examples:" in result.out
    assert f"kuiper {command}" in result.out.split("Examples:")[1]


def test_nothing_shows_the_help(kuiper: Run) -> None:
    assert "generate" in kuiper().out


def test_version(process: Run) -> None:
    assert process("--version").out == f"kuiper {version('kuiperllm')}\n"


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from kuiperllm.cli import main; main(['generate', '--help']);"
        "heavy = {'numpy', 'numba', 'llvmlite', 'tokenizers', 'sentencepiece', 'jinja2', 'huggingface_hub'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_generating_imports_neither_numba_nor_rich_once_kernels_are_kept(process: Run) -> None:
    arguments = ("generate", "--max-tokens", "2", "--seed", "1", "ROMEO:")
    process(*arguments)
    program = (
        f"import sys; from kuiperllm.cli import main; main({list(arguments)!r});"
        "heavy = {'numba', 'rich', 'jinja2', 'huggingface_hub'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- streams ----------------------------------------------------------------------------------------------


def test_text_streams(chat_model: Path, process: Run) -> None:
    options = ("generate", "-m", str(chat_model), "--ignore-eos", "--temperature", "1", "--seed", "1")
    process(*options, "--max-tokens", "3", "hi")  # kernels are compiled
    with subprocess.Popen(
        [*COMMAND, *options, "--max-tokens", "90000", "hi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert running.stdout.read(20)
        assert running.poll() is None, "the text came before the end of the program"
        running.kill()


def test_a_reader_that_leaves_ends_it_quietly(chat_model: Path) -> None:
    options = ("generate", "-m", str(chat_model), "--ignore-eos", "--max-tokens", "90000", "hi")
    with subprocess.Popen([*COMMAND, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.read(5)
        running.stdout.close()
        said = [line for line in running.stderr.read().splitlines() if not line.startswith(b"compiling")]
        assert said == []
        assert running.wait(60) == 1


def test_ctrl_c_ends_it_cleanly(chat_model: Path) -> None:
    options = ("generate", "-m", str(chat_model), "--ignore-eos", "--max-tokens", "90000", "hi")
    with subprocess.Popen([*COMMAND, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.read(5)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
        assert running.returncode == 130
        assert [line for line in err.splitlines() if not line.startswith(b"compiling")] == []
        assert out.endswith(b"\n")


def test_a_second_ctrl_c_while_it_ends_changes_nothing(kernel_cache: Path) -> None:
    program = """if True:
        import atexit, signal, sys
        from kuiperllm.cli import main, run
        def interrupted(arguments):
            raise KeyboardInterrupt
        run.run = interrupted
        atexit.register(signal.raise_signal, signal.SIGINT)
        sys.exit(main())
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, b"")


@pytest.mark.parametrize("delay", [0.02, 0.08, 0.15, 0.25, 0.35])
def test_ctrl_c_while_starting_is_silent(delay: float, kernel_cache: Path) -> None:
    program = "from kuiperllm.cli import main; import sys; print(flush=True); sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", program, "generate", "--max-tokens", "300", "--ignore-eos", "hi"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:
        assert running.stdout is not None
        running.stdout.readline()
        time.sleep(delay)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
        assert b"Traceback" not in err
        # At its very end Python gives the signal back to the system, and shells make 130 of that.
        assert running.returncode in (0, 130, -signal.SIGINT)


def test_ctrl_c_in_a_finalizer_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    class Late:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def run() -> None:
        with not_lost():
            Late()
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert capsys.readouterr().err == ""


def test_ctrl_c_is_postponed_once() -> None:
    steps = []

    def run(times: int) -> None:
        with postponed():
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            steps.append(f"goes on after {times}")

    for times in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            run(times)
    assert steps == ["goes on after 1"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_full_disk_is_one_line(process: Run) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device\n"


def test_text_that_the_encoding_lacks_is_replaced(process: Run) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = process("tokenize", "--json", "日本", env=environment)
    assert result.code == 0
    assert result.err == ""


def test_closed_streams_are_survived(kernel_cache: Path) -> None:
    command = f'"{sys.executable}" -m kuiperllm tokenize hi'
    assert subprocess.run(f"{command} >&- 2>&-", shell=True, timeout=60).returncode == 0
    done = subprocess.run(f"{command} <&-", shell=True, timeout=60, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_empty_cache_says_that_it_compiles_in_one_line(process: Run, tmp_path: Path) -> None:
    environment = os.environ | {"KUIPER_CACHE_DIR": str(tmp_path)}
    first = process("doctor", "--json", env=environment)
    assert first.err == "compiling kernels for this machine (first run only) ...\n"
    second = process("doctor", "--json", env=environment)
    assert second.err == ""
    assert json.loads(second.out)["can_run"] is True


# --- errors -----------------------------------------------------------------------------------------------


class MultilineError(KuiperError):
    exit_code = 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("wrong"), 2, "error: wrong"),
        (MultilineError("a\nb\x1b[31m\tc"), 1, "error: a b [31m c"),
        (MemoryError(), 1, "error: out of memory; use a smaller model"),
        (FileNotFoundError(2, "No such file or directory", "x"), 1, "error: x: No such file or directory"),
        (ZeroDivisionError("oh"), 1, "error: ZeroDivisionError: oh (run again with -v for the traceback)"),
        (RecursionError("deep"), 1, "error: RecursionError: deep"),
    ],
)
def test_every_exception_becomes_a_line(
    kuiper: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, line: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(LLM, "__init__", fail)
    result = kuiper("generate", "hi")
    assert result.code == code
    assert result.refused().startswith(line)


def test_v_shows_the_traceback(kuiper: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(LLM, "__init__", fail)
    result = kuiper("generate", "-v", "hi")
    assert "Traceback" in result.err
    assert result.said[-1].startswith("error: ZeroDivisionError")


def test_verbosity_is_that_of_one_run(kuiper: Run) -> None:
    assert "weights" in kuiper("generate", "-v", "--max-tokens", "1", "hi").err
    assert kuiper("generate", "--max-tokens", "1", "hi").said == []
    assert logging.getLogger("kuiperllm").handlers == []


def test_interruption_in_this_process(kuiper: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "__init__", fail)
    assert main(["generate", "hi"]) == 130


# --- progress on a terminal -------------------------------------------------------------------------------


def test_progress_on_a_terminal_goes_to_stderr_alone(tmp_path: Path) -> None:
    environment = os.environ | {"KUIPER_CACHE_DIR": str(tmp_path), "TERM": "xterm", "COLUMNS": "100"}
    master, slave = os.openpty()
    out, shown = tmp_path / "out", b""
    with out.open("wb") as stdout:
        running = subprocess.Popen(
            [*COMMAND, "doctor", "--json"], stdout=stdout, stderr=slave, env=environment
        )
    os.close(slave)
    with contextlib.suppress(OSError):  # so Linux says that the other end is closed
        while data := os.read(master, 1 << 16):
            shown += data
    os.close(master)
    assert running.wait(60) == 0
    assert json.loads(out.read_text())["can_run"] is True
    assert b"compiling" in shown
    assert b"first run only" in shown
    assert shown.endswith(b"\x1b[2K"), "the bars are taken away again"
