"""`kuiper chat`: history, commands, and Ctrl-C on a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_result import COMMAND, Run

from kuiperllm import LLM, SamplingParams

GREEDY = ("--temperature", "0", "--max-tokens", "12")
PARAMS = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm(chat_model: Path) -> LLM:
    return LLM(chat_model)


def answers(llm: LLM, *messages: str, system: str | None = None) -> list[str]:
    """The answers to a conversation, by the library."""
    history = [] if system is None else [{"role": "system", "content": system}]
    texts = []
    for message in messages:
        history.append({"role": "user", "content": message})
        texts.append(llm.chat(history, PARAMS).text)
        history.append({"role": "assistant", "content": texts[-1]})
    return texts


def lines(texts: list[str]) -> str:
    return "".join(text + "\n" for text in texts)


def test_lines_of_a_pipe_are_messages_and_history_is_kept(kuiper: Run, chat_model: Path, llm: LLM) -> None:
    result = kuiper("chat", "-m", chat_model, *GREEDY, stdin="hello\n\nwhy?\nand then?\n")
    expected = answers(llm, "hello", "why?", "and then?")
    assert result.out == lines(expected)
    assert expected[1:] != [*answers(llm, "why?"), *answers(llm, "and then?")], "history must matter here"
    assert result.code == 0
    assert result.said == []


def test_system_message_comes_first_and_outlives_reset(kuiper: Run, chat_model: Path, llm: LLM) -> None:
    result = kuiper("chat", "-m", chat_model, *GREEDY, "--system", "Rhyme.", stdin="a\n/reset\na\n")
    assert result.out == lines(answers(llm, "a", system="Rhyme.") * 2)
    assert answers(llm, "a", system="Rhyme.") != answers(llm, "a")


def test_exit_and_help(kuiper: Run, chat_model: Path) -> None:
    result = kuiper("chat", "-m", chat_model, *GREEDY, stdin="/help\n/exit\nnever answered\n")
    assert "/reset" in result.out
    assert len(result.out.splitlines()) == 4
    assert result.code == 0


def test_speed_is_told_when_asked(kuiper: Run, chat_model: Path) -> None:
    result = kuiper("chat", "-m", chat_model, *GREEDY, "--stats", stdin="a\nb\n")
    assert [("new tokens" in line) for line in result.said] == [True, True]


def test_a_model_without_template_is_refused(kuiper: Run) -> None:
    result = kuiper("chat", stdin="hello\n")
    assert result.code == 1
    assert "demo has no chat template" in result.refused()


def test_a_message_that_does_not_fit_is_refused(kuiper: Run, chat_model: Path) -> None:
    result = kuiper("chat", "-m", chat_model, "--max-model-len", "64", stdin="x" * 100 + "\n")
    assert result.code == 2
    assert "context of 64" in result.refused()


def test_input_that_is_not_utf8_is_refused(kuiper: Run, chat_model: Path) -> None:
    result = kuiper("chat", "-m", chat_model, stdin=b"\xff\xfe\n")
    assert result.code == 2
    assert "UTF-8" in result.refused()


# --- on a terminal ----------------------------------------------------------------------------------------


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments: str | Path) -> None:
        self._master, slave = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_own_terminal,
            env=environment,
        )
        os.close(slave)
        self.shown = ""

    def wait_for(self, pattern: str, timeout: float = 60) -> str:
        """Read until the pattern appears in what was not yet waited for; what came before and with it."""
        deadline = time.monotonic() + timeout
        while (match := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.shown[-500:]!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self._master, 65536).decode("utf-8", "replace")
                except OSError:  # Linux says so when the other end is closed
                    pytest.fail(f"ended before {pattern!r}: {self.shown[-500:]!r}")
        before, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def rest(self, timeout: float = 30) -> str:
        """What is shown until the command ends."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    data = os.read(self._master, 65536)
                except OSError:
                    break
                if not data:
                    break
                self.shown += data.decode("utf-8", "replace")
            elif self.process.poll() is not None:
                break
        self.process.wait(timeout)
        return self.shown

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self._master)


def _own_terminal() -> None:
    """Make standard input the controlling terminal, so that Ctrl-C becomes a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(chat_model: Path, kuiper: Run) -> Iterator[Terminal]:
    kuiper("chat", "-m", chat_model, *GREEDY, stdin="a\n")  # kernels are compiled
    shell = Terminal("chat", "-m", chat_model, "--ignore-eos", "--temperature", "1", "--seed", "1")
    yield shell
    shell.close()


def test_ctrl_c_stops_the_answer_and_at_the_prompt_leaves(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("hello\n")
    terminal.wait_for(r"hello\r\n(?s:.{40,})")  # the answer has begun; left alone it takes minutes
    terminal.type("\x03")
    terminal.wait_for("\r\n> ")
    terminal.type("again\n")
    terminal.wait_for(r"again\r\n(?s:.{10,})")  # the model still works
    terminal.type("\x03")
    terminal.wait_for("\r\n> ")
    # CPython's readline loses a signal that comes between the prompt and its wait for input, so a person
    # would press again: until the process ends, or the terminal's time is over
    while terminal.process.poll() is None:
        terminal.type("\x03")
        with contextlib.suppress(subprocess.TimeoutExpired):
            terminal.process.wait(0.5)
    assert "Traceback" not in terminal.rest()
    # One that comes at the very end ends the process by the signal, and shells make 130 of that.
    assert terminal.process.returncode in (130, -signal.SIGINT)


def test_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert "Traceback" not in terminal.rest()
    assert terminal.process.returncode == 0


def test_what_fails_leaves_the_conversation_and_the_prompt(chat_model: Path, kernel_cache: Path) -> None:
    shell = Terminal("chat", "-m", chat_model, "--max-model-len", "100", "--max-tokens", "5")
    try:
        shell.wait_for("> ")
        shell.type("x" * 200 + "\n")
        assert "context of 100" in shell.wait_for("error: [^\n]*\n")
        shell.wait_for("> ")
        shell.type("short\n")
        shell.wait_for(r"short\r\n(?s:.*?)\r\n> ")
        shell.type("/nonsense\n")
        shell.wait_for("error: unknown command /nonsense")
        shell.type("/exit\n")
        shell.rest()
        assert shell.process.returncode == 0
    finally:
        shell.close()
