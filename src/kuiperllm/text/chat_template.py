"""Chat templates: a checkpoint's own Jinja source turns messages into a prompt.

The dialect is that of Hugging Face transformers: blocks trimmed, loop controls, `tojson` without HTML
escapes, `raise_exception`, `strftime_now` and the `generation` tag. A template comes with the checkpoint
and is code of unknown origin, so it runs sandboxed and bounded (see `template_sandbox`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from kuiperllm.errors import ChatTemplateError
from kuiperllm.text.tokenizer import one_line

if TYPE_CHECKING:
    from jinja2 import Template

# Real templates have some 10 kB; compiling takes time in proportion.
MAX_SOURCE_LENGTH = 256 * 1024
# Values made while rendering may have this many characters together, and this many for each character of
# input.
MAX_CHARACTERS = 50_000_000
CHARACTERS_PER_INPUT = 64
TIME_LIMIT_S = 10.0


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja source.
        bos_token: text of the beginning-of-text token, which many templates write themselves.
        eos_token: text of the end-of-text token.
        where: what to call the template in messages.

    Raises:
        ChatTemplateError: the source is not valid.
    """

    def __init__(
        self, source: str, *, bos_token: str = "", eos_token: str = "", where: str = "chat template"
    ) -> None:
        self.source = source
        self._where = where
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        if len(source) > MAX_SOURCE_LENGTH:
            raise ChatTemplateError(f"{where}: {len(source)} characters are too many for a chat template")
        self._template = self._compile(source)

    def _compile(self, source: str) -> Template:
        from kuiperllm.text.template_sandbox import BoundedEnvironment, Budget, spending

        environment = BoundedEnvironment()
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            with spending(Budget(MAX_CHARACTERS, TIME_LIMIT_S)):
                return environment.from_string(source)
        except Exception as error:
            raise self._error(error, getattr(error, "lineno", None)) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt for some messages.

        Args:
            messages: `role`, `content` and whatever else the template looks for.
            tools: JSON schemas of the functions that the model may call.
            add_generation_prompt: end with the beginning of the assistant's answer.
            kwargs: further variables of the template, such as `enable_thinking`.

        Raises:
            ChatTemplateError: the template refuses the messages, fails on them, or takes too much time or
                memory.
        """
        from kuiperllm.text.template_sandbox import Budget, spending

        variables = {
            **self._tokens,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            **kwargs,
        }
        try:
            size = _size(variables)
            with spending(Budget(MAX_CHARACTERS + CHARACTERS_PER_INPUT * size, TIME_LIMIT_S)):
                return self._run(variables)
        except Exception as error:
            raise self._error(error, self._line_of(error)) from None

    def _run(self, variables: dict[str, Any]) -> str:
        template = self._template
        output = template.root_render_func(template.new_context(variables))
        return template.environment.concat(output)

    def _line_of(self, error: BaseException) -> int | None:
        """The line of the template in which an error was raised."""
        line = None
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == "<template>":
                line = self._template.get_corresponding_lineno(trace.tb_lineno)
            trace = trace.tb_next
        return line

    def _error(self, error: Exception, line: int | None) -> ChatTemplateError:
        place = self._where if line is None else f"{self._where}, line {line}"
        return ChatTemplateError(f"{place}: {one_line(error)}")


def _size(value: Any) -> int:
    """How many characters and entries a plain value has.

    Raises:
        RecursionError: it contains itself.
    """
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(1 + _size(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(1 + _size(item) for item in value)
    return 1


def _raise_exception(message: object) -> NoReturn:
    from jinja2.exceptions import TemplateError

    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    """The local time; `pattern` as in `datetime.strftime`."""
    if len(pattern) > 200 or re.search(r"%[^a-zA-Z%]*[0-9]", pattern):  # C libraries pad to "%9999999d"
        raise ValueError("strftime_now: the pattern is too long or has a width")
    return datetime.now().strftime(pattern)
