"""`kuiper chat`: history, commands, and Ctrl-C on a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_result import COMMAND, Run

from kuiperllm import LLM, SamplingParams
from kuiperllm.cli.chat_input import line_editing, messages

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
    assert len(result.out.splitlines()) == 10
    assert result.code == 0


def test_retry_undo_and_system(kuiper: Run, chat_model: Path, llm: LLM) -> None:
    typed = "hello\n/retry\nwhy?\n/undo\nand then?\n/system Rhyme.\n/reset\na\n/system\n/reset\na\n"
    result = kuiper("chat", "-m", chat_model, *GREEDY, stdin=typed)
    hello, why = answers(llm, "hello", "why?")
    expected = [hello, hello, why, answers(llm, "hello", "and then?")[1]]
    expected += answers(llm, "a", system="Rhyme.") + answers(llm, "a")
    assert result.out == lines(expected)


def test_the_conversation_is_shown_and_saved(kuiper: Run, chat_model: Path, llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    typed = f"hello\n/history\n/save {file}\n"
    result = kuiper("chat", "-m", chat_model, *GREEDY, "--system", "Rhyme.", stdin=typed)
    (answer,) = answers(llm, "hello", system="Rhyme.")
    assert result.out == f"{answer}\nsystem: Rhyme.\nuser: hello\nassistant: {answer}\n"
    assert json.loads(file.read_text(encoding="utf-8")) == {
        "messages": [
            {"role": "system", "content": "Rhyme."},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/retry", "no message yet"),
        ("/undo", "no message yet"),
        ("/save", "say the name of a file"),
        ("/save {folder}/there", "exists; choose another name"),
        ("/save {folder}/none/talk.json", "cannot write"),
    ],
)
def test_commands_that_cannot_be_obeyed(
    typed: str, said: str, kuiper: Run, chat_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").write_text("kept")
    result = kuiper("chat", "-m", chat_model, *GREEDY, stdin=typed.format(folder=tmp_path) + "\n")
    assert result.code == 2
    assert said in result.refused()
    assert (tmp_path / "there").read_text() == "kept"


# --- several lines ----------------------------------------------------------------------------------------


def read_from(*typed: str | type[BaseException]) -> tuple[Callable[[str], str], list[str]]:
    """Something like `input`, and the prompts that it shows."""
    left, prompts = list(typed), []

    def read(prompt: str) -> str:
        prompts.append(prompt)
        line = left.pop(0) if left else EOFError
        if isinstance(line, str):
            return line
        raise line

    return read, prompts


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["a", "", "b"], ["a", "", "b"]),
        (["a\\", "b\\", "c", "d"], ["a\nb\nc", "d"]),
        (['"""', "a", "", ' b"""', "c"], ["a\n\n b", "c"]),
        (['"""a"""', "b"], ["a", "b"]),
        (['  """a', 'b"""  '], ["a\nb"]),
        (["a\\"], ["a"]),  # the input ends in a message
        (['"""a', "b"], ["a\nb"]),
        (["a\\", KeyboardInterrupt, "b"], ["b"]),
        (['"""', "a", KeyboardInterrupt, "b"], ["b"]),
    ],
)
def test_messages_of_several_lines(
    typed: list[str | type[BaseException]], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    read, prompts = read_from(*typed)
    assert list(messages(read)) == expected
    assert prompts.count("> ") == len(expected) + 1 + typed.count(KeyboardInterrupt)
    assert set(prompts) <= {"> ", "... "}


def test_ctrl_c_at_the_beginning_of_a_message_goes_on() -> None:
    read, _ = read_from("a", KeyboardInterrupt)
    found = messages(read)
    assert next(found) == "a"
    with pytest.raises(KeyboardInterrupt):
        next(found)


def test_lines_are_kept_for_the_next_conversation(tmp_path: Path) -> None:
    readline = pytest.importorskip("readline", reason="Python has no readline")
    file = tmp_path / "cache" / "chat_history"
    readline.clear_history()
    with line_editing(file):
        readline.add_history("first")
    readline.clear_history()
    with line_editing(file):
        assert readline.get_history_item(readline.get_current_history_length()) == "first"
    assert file.stat().st_mode & 0o077 == 0
    readline.clear_history()
    file.unlink()
    file.mkdir()  # cannot be read or written: no harm
    with line_editing(file):
        pass


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
