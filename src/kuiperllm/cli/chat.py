"""`kuiper chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from kuiperllm.cli.interrupts import HeldBack
from kuiperllm.cli.model import load
from kuiperllm.cli.options import EngineOptions, ModelOptions, SamplingOptions, Verbose, with_option_groups
from kuiperllm.cli.output import is_terminal, print_error, write
from kuiperllm.cli.progress import Reporter
from kuiperllm.cli.streaming import speed
from kuiperllm.cli.text_input import piped_lines
from kuiperllm.config import SamplingParams
from kuiperllm.errors import ChatTemplateError, KuiperError

if TYPE_CHECKING:
    from kuiperllm.engine.llm import LLM

EXAMPLES = """\
kuiper chat -m Qwen/Qwen2.5-0.5B-Instruct
kuiper chat -m ./Llama-3.2-1B-Instruct --quant q8 --system "Answer in one sentence."
echo "What is the capital of France?" | kuiper chat -m model.gguf --temperature 0
"""

COMMANDS = """\
/reset   forget the conversation
/exit    leave (so does Ctrl-D)
/help    this list
Ctrl-C stops an answer; at the prompt it leaves.
"""


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
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._first)
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
            if text == "/reset":
                self._messages = list(self._first)
            elif text == "/help":
                write(COMMANDS)
            elif text.startswith("/") and self._interactive and " " not in text:
                print_error(f"unknown command {text}; /help lists them")
            elif text:
                self._try_to_answer(text)

    def _lines(self) -> Iterator[str]:
        if not self._interactive:
            yield from piped_lines()
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - line editing and history for `input`
        while True:
            try:
                yield input("> ")
            except EOFError:
                write("\n")
                return
            except KeyboardInterrupt:
                write("\n")
                raise

    def _try_to_answer(self, text: str) -> None:
        """Answer; what fails leaves the conversation as it was."""
        before = list(self._messages)
        self._messages.append({"role": "user", "content": text})
        try:
            self._messages.append({"role": "assistant", "content": self._answer()})
        except KuiperError as error:
            self._messages = before
            if not self._interactive:
                raise
            print_error(str(error))

    def _answer(self) -> str:
        """Stream the answer to the messages; as much of it as there was time for, if Ctrl-C stops it."""
        parts: list[str] = []
        completion = None
        with (
            HeldBack() as interruption,  # so that the engine is left between two tokens
            contextlib.closing(self._llm.stream_chat(self._messages, self._params)) as chunks,
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
