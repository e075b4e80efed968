"""`kuiper chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kuiperllm.cli.chat_input import line_editing, messages
from kuiperllm.cli.interrupts import HeldBack
from kuiperllm.cli.model import load
from kuiperllm.cli.options import EngineOptions, ModelOptions, SamplingOptions, Verbose, with_option_groups
from kuiperllm.cli.output import is_terminal, print_error, write
from kuiperllm.cli.progress import Reporter
from kuiperllm.cli.streaming import speed
from kuiperllm.cli.text_input import piped_lines
from kuiperllm.config import SamplingParams, settings
from kuiperllm.errors import ChatTemplateError, KuiperError, UsageError

if TYPE_CHECKING:
    from kuiperllm.engine.llm import LLM

EXAMPLES = """\
kuiper chat -m Qwen/Qwen2.5-0.5B-Instruct
kuiper chat -m ./Llama-3.2-1B-Instruct --quant q8 --system "Answer in one sentence."
echo "What is the capital of France?" | kuiper chat -m model.gguf --temperature 0
"""

COMMANDS = """\
/retry         answer the last message again
/undo          forget the last message and its answer
/reset         forget the conversation
/system TEXT   other instructions for the model; without TEXT none
/history       show the conversation
/save FILE     write it to a JSON file
/exit          leave (so does Ctrl-D)
/help          this list
A line that ends in \\ goes on in the next one; lines between \"\"\" and \"\"\" are one message.
Ctrl-C stops an answer; at the prompt it leaves.
"""
WITH_TEXT = ("/system", "/save")


@with_option_groups
def chat(
    model: ModelOptions,
    sampling: SamplingOptions,
    engine: EngineOptions,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", show_default=False, help="Instructions that the model gets first."),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Tell the speed on stderr; so does -v.")] = False,
    verbose: Verbose = 0,
) -> None:
    """Talk with a chat model. When standard input is a pipe, each of its lines is a message."""
    sampling.params(SamplingParams())  # refuses impossible values before the model is loaded
    with Reporter() as reporter:
        llm = load(model, engine, reporter)
        if llm.loaded.chat_template is None:
            raise ChatTemplateError(
                f"{llm.loaded.name} has no chat template: it is no chat model; use kuiper generate, or a "
                "model that was tuned for chat"
            )
        reporter.clear()
        params = sampling.params(llm.default_params)
        Conversation(llm, params, reporter, system=system, stats=stats or verbose > 0).run()


class Conversation:
    """Messages and answers in turn, until the input ends.

    Args:
        llm: who answers.
        params: how to choose tokens.
        reporter: says what takes long.
        system: a first message with instructions.
        stats: tell the speed after each answer.
    """

    def __init__(
        self, llm: LLM, params: SamplingParams, reporter: Reporter, *, system: str | None, stats: bool
    ) -> None:
        self._llm = llm
        self._params = params
        self._reporter = reporter
        self._system = system
        self._messages: list[dict[str, str]] = []
        self._stats = stats
        self._interactive = is_terminal(sys.stdin)

    def run(self) -> None:
        """Read messages and answer them.

        Raises:
            KuiperError: an answer failed, unless a person is there to try something else.
            KeyboardInterrupt: Ctrl-C at the prompt.
        """
        if self._interactive:
            write(f"{self._llm.loaded.name}: /help lists the commands.\n")
        for line in self._lines():
            text = line.strip()
            if text in ("/exit", "/quit"):
                return
            name, _, rest = text.partition(" ")
            command = self._commands.get(name)
            if command is not None and (not rest or name in WITH_TEXT):
                self._try(command, rest.strip())
            elif text.startswith("/") and self._interactive and " " not in text:
                print_error(f"unknown command {text}; /help lists them")
            elif text:
                self._try(self._say, text)

    def _lines(self) -> Iterator[str]:
        if not self._interactive:
            yield from piped_lines()
            return
        with line_editing(Path(settings().cache_dir) / "chat_history"):
            try:
                yield from messages(input)
            except KeyboardInterrupt:
                write("\n")
                raise
        write("\n")

    def _try(self, command: Callable[[str], None], text: str) -> None:
        """Obey; what fails leaves the conversation as it was."""
        before = list(self._messages)
        try:
            command(text)
        except KuiperError as error:
            self._messages = before
            if not self._interactive:
                raise
            print_error(str(error))

    @property
    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "/retry": self._retry,
            "/undo": self._undo,
            "/reset": self._reset,
            "/system": self._instruct,
            "/history": self._show,
            "/save": self._save,
            "/help": lambda _: write(COMMANDS),
        }

    def _say(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        self._messages.append({"role": "assistant", "content": self._answer()})

    def _retry(self, _: str) -> None:
        if not self._messages:
            raise UsageError("/retry: there is no message yet")
        del self._messages[-1]
        self._messages.append({"role": "assistant", "content": self._answer()})

    def _undo(self, _: str) -> None:
        if not self._messages:
            raise UsageError("/undo: there is no message yet")
        del self._messages[-2:]

    def _reset(self, _: str) -> None:
        self._messages = []

    def _instruct(self, text: str) -> None:
        self._system = text or None

    def _show(self, _: str) -> None:
        for message in self._whole():
            write(f"{message['role']}: {message['content']}\n")

    def _save(self, name: str) -> None:
        if not name:
            raise UsageError("/save: say the name of a file, such as /save talk.json")
        try:
            with open(name, "x", encoding="utf-8") as file:
                json.dump({"messages": self._whole()}, file, ensure_ascii=False, indent=1)
        except FileExistsError:
            raise UsageError(f"/save: {name} exists; choose another name") from None
        except OSError as error:
            raise UsageError(f"/save: cannot write {name}: {error.strerror}") from None

    def _whole(self) -> list[dict[str, str]]:
        """The instructions and all messages."""
        first = [] if self._system is None else [{"role": "system", "content": self._system}]
        return first + self._messages

    def _answer(self) -> str:
        """Stream the answer to the messages; as much of it as there was time for, if Ctrl-C stops it."""
        parts: list[str] = []
        completion = None
        with (
            HeldBack() as interruption,  # so that the engine is left between two tokens
            contextlib.closing(self._llm.stream_chat(self._whole(), self._params)) as chunks,
        ):
            for chunk in chunks:
                if not parts:
                    self._reporter.text_follows()
                parts.append(chunk.text)
                completion = chunk.completion
                write(chunk.text)
                if interruption.requested:
                    break
        write("\n")
        if self._stats and completion is not None:
            print(speed(completion), file=sys.stderr)
        return "".join(parts)
