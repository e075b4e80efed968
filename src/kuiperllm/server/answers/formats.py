"""The ways in which models write calls of functions: how to read them, and grammars that make them right."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

from kuiperllm.server.answers.calls import CallReader
from kuiperllm.server.answers.pieces import Arguments, Call, Content, Parser, Piece, kept_back
from kuiperllm.server.structured import Grammar, json_value, literal

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_MOST_CALLS = 32  # that a grammar allows in a row

Functions = Sequence[tuple[str, dict[str, Any] | None]]
"""(name, JSON schema of the arguments)"""


class ToolFormat(ABC):
    """How a family of models writes calls."""

    arguments_key: str
    """What the arguments are called inside a call."""

    @abstractmethod
    def parser(self, names: Collection[str]) -> Parser:
        """Reads an answer that may hold calls of these functions."""

    @abstractmethod
    def calls(self, functions: Functions, *, parallel: bool) -> Grammar:
        """One call of these functions, or with `parallel` several, and nothing else."""

    @abstractmethod
    def text_or_calls(self, functions: Functions, *, parallel: bool) -> Grammar:
        """Any text, in which calls have the right form."""

    def call_rules(self, functions: Functions) -> tuple[str, ...]:
        """Rules of which `call` is one call."""
        rules = [f"call: {' | '.join(f'call_{index}' for index in range(len(functions)))}"]
        for index, (name, schema) in enumerate(functions):
            head = f'{{"name": {json.dumps(name)}, "{self.arguments_key}": '
            rules.append(f"call_{index}: {literal(head)} arguments_{index} {literal('}')}")
            rules.append(f"arguments_{index}: {json_value(_NO_PARAMETERS if schema is None else schema)}")
        return tuple(rules)


# --- Hermes, Qwen -----------------------------------------------------------------------------------------

_BEGIN, _END = "<tool_call>", "</tool_call>"


class HermesFormat(ToolFormat):
    """Text, and calls between `<tool_call>` and `</tool_call>`: Hermes 2 Pro, Qwen2.5, Qwen3."""

    arguments_key = "arguments"

    def parser(self, names: Collection[str]) -> Parser:
        """See `ToolFormat`."""
        return _HermesParser()

    def calls(self, functions: Functions, *, parallel: bool) -> Grammar:
        """See `ToolFormat`."""
        one = f"{literal(_BEGIN + chr(10))} call {literal(chr(10) + _END)}"
        more = f"({literal(chr(10))} marked){{0,{_MOST_CALLS - 1}}}" if parallel else ""
        return Grammar(f"marked {more}".rstrip(), (f"marked: {one}", *self.call_rules(functions)))

    def text_or_calls(self, functions: Functions, *, parallel: bool) -> Grammar:
        """See `ToolFormat`."""
        times = f"{{0,{_MOST_CALLS}}}" if parallel else "?"
        return Grammar(
            f"(marked {literal(chr(10) + _END)}){times} TEXT",
            (
                "marked: begun call",
                rf"begun[lazy]: /(.|\n)*{_BEGIN}\n/",
                # behind the last call, or instead of any: what does not begin another one
                r"TEXT: /(.|\n)*/ & ~/(.|\n)*<tool_call>(.|\n)*/",
                *self.call_rules(functions),
            ),
        )


class _HermesParser:
    """See `Parser`."""

    def __init__(self) -> None:
        self._held = ""
        self._call: CallReader | None = None
        self._calls = 0
        self._named = False
        self._is_behind_call = False

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._held and (self._read_text(pieces) if self._call is None else self._read_call(pieces)):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        held, self._held = self._held, ""
        if self._call is None:
            return [Content(held)] if held and not self._is_behind_call else []
        return [] if self._named else [Content(_BEGIN + self._call.text + held)]

    def _read_text(self, pieces: list[Piece]) -> bool:
        """Give text up to a call; whether there is anything left to do."""
        if self._is_behind_call:
            self._held = self._held.lstrip()
            self._is_behind_call = not self._held
        before, found, rest = self._held.partition(_BEGIN)
        if found:
            if before.strip():
                pieces.append(Content(before.rstrip()))
            self._call, self._named, self._held = CallReader(), False, rest
            return bool(rest)
        certain = self._held[: len(self._held) - kept_back(self._held, _BEGIN)].rstrip()
        if certain:
            pieces.append(Content(certain))
            self._held = self._held[len(certain) :]
        return False

    def _read_call(self, pieces: list[Piece]) -> bool:
        call = self._call
        assert call is not None
        if call.place not in ("done", "broken"):
            self._held = call.push(self._held)
            if call.name is not None and not self._named:
                pieces.append(Call(self._calls, call.name))
                self._calls, self._named = self._calls + 1, True
            if arguments := call.new_arguments():
                pieces.append(Arguments(self._calls - 1, arguments))
        if call.place not in ("done", "broken"):
            return False
        if call.place == "broken" and not self._named:
            pieces.append(Content(_BEGIN + call.text))
            self._call = None
            return bool(self._held)
        _, found, rest = self._held.partition(_END)
        if found:
            self._call, self._held, self._is_behind_call = None, rest, True
            return bool(self._held)
        self._held = self._held[len(self._held) - kept_back(self._held, _END) :]
        return False


# --- Llama 3.1 and later ----------------------------------------------------------------------------------

_PYTHON_TAG = "<|python_tag|>"


class Llama3Format(ToolFormat):
    """An answer that is one call, or several with `;` between them: Llama 3.1, 3.2, 3.3."""

    arguments_key = "parameters"

    def parser(self, names: Collection[str]) -> Parser:
        """See `ToolFormat`."""
        return _Llama3Parser(names)

    def calls(self, functions: Functions, *, parallel: bool) -> Grammar:
        """See `ToolFormat`."""
        more = f"({literal('; ')} call){{0,{_MOST_CALLS - 1}}}" if parallel else ""
        return Grammar(f"call {more}".rstrip(), self.call_rules(functions))

    def text_or_calls(self, functions: Functions, *, parallel: bool) -> Grammar:
        """See `ToolFormat`."""
        calls = self.calls(functions, parallel=parallel)
        return Grammar(f"{calls.start} | TEXT", (*calls.rules, r"TEXT: /([^{\s](.|\n)*)?/"))


class _Llama3Parser:
    """See `Parser`."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._call: CallReader | None = None
        self._calls = 0
        self._named = self._is_text = False

    def push(self, text: str) -> list[Piece]:
        if self._is_text:
            return [Content(text)] if text else []
        self._held += text
        pieces: list[Piece] = []
        while self._held and self._advance(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        held, self._held = self._held, ""
        if self._call is not None and not self._named:
            held = self._call.text + held
        elif self._call is not None or self._calls:
            return []
        return [Content(held)] if held else []

    def _advance(self, pieces: list[Piece]) -> bool:
        """Do one thing; whether there may be another."""
        if self._is_text:
            pieces.append(Content(self._held))
            self._held = ""
            return False
        return self._look_for_call() if self._call is None else self._read_call(self._call, pieces)

    def _look_for_call(self) -> bool:
        start = self._held.lstrip(" \t\r\n;," if self._calls else " \t\r\n")
        if start.startswith(_PYTHON_TAG):
            self._held = start.removeprefix(_PYTHON_TAG)
        elif start.startswith("{"):
            self._call, self._named, self._held = CallReader(), False, start
        elif start and not _PYTHON_TAG.startswith(start):
            self._is_text = True
        else:
            return False
        return True

    def _read_call(self, call: CallReader, pieces: list[Piece]) -> bool:
        self._held = call.push(self._held)
        if not self._named and (call.place == "broken" or call.name is not None):
            if call.name is None or call.name not in self._names:  # some other JSON, which is the answer
                self._is_text, self._call, self._held = True, None, call.text + self._held
                return True
            pieces.append(Call(self._calls, call.name))
            self._calls, self._named = self._calls + 1, True
        if arguments := call.new_arguments():
            pieces.append(Arguments(self._calls - 1, arguments))
        if call.place not in ("done", "broken"):
            return False
        self._call = None
        return bool(self._held)


TOOL_FORMATS: dict[str, ToolFormat] = {"hermes": HermesFormat(), "llama3": Llama3Format()}


def detect_tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template teaches; None if it knows no tools."""
    if "tools" not in template:
        return None
    if _BEGIN in template:
        return TOOL_FORMATS["hermes"]
    if '"parameters": ' in template and "ipython" in template:
        return TOOL_FORMATS["llama3"]
    return None
