"""Reads a call of a function, one JSON object, while it is written."""

from __future__ import annotations

import json
from typing import Literal

_NAME = "name"
_ARGUMENTS = ("arguments", "parameters")
_IGNORED = ("type", "id")
_BLANKS = " \t\r\n"

_Place = Literal["start", "key or end", "key", "colon", "value", "in value", "after value", "done", "broken"]


class CallReader:
    """Takes in `{"name": ..., "arguments": {...}}` and gives the arguments' own text as it comes.

    Attributes:
        name: the function's, once it is known.
        place: where in the object the reader is; `done` behind its end, `broken` if it is no such object.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.place: _Place = "start"
        self._seen: list[str] = []
        self._token: list[str] = []  # the key or value that is being read
        self._key = ""
        self._depth = 0
        self._in_string = self._escaped = False
        self._quoted = False  # the arguments are JSON inside a JSON string
        self._scalar = False  # the value is a number, true, false or null
        self._has_arguments = False
        self._new: list[str] = []

    @property
    def text(self) -> str:
        """All that was taken in."""
        return "".join(self._seen)

    def push(self, text: str) -> str:
        """Take in text up to the end of the object; what is left of it."""
        for index, char in enumerate(text):
            if self.place in ("done", "broken"):
                self._seen.append(text[:index])
                return text[index:]
            self._step(char)
        self._seen.append(text)
        return ""

    def new_arguments(self) -> str:
        """What came of the arguments since the last time; empty as long as the name is not known."""
        if self.name is None:
            return ""
        if self.place == "done" and not self._has_arguments:
            self._has_arguments = True
            return "{}"
        new = "".join(self._new)
        self._new.clear()
        return new

    def _step(self, char: str) -> None:
        blank = char in _BLANKS
        match self.place:
            case "start":
                self.place = "key or end" if char == "{" else self.place if blank else "broken"
            case "key or end":
                if char == '"':
                    self.place, self._token, self._in_string = "key", [char], True
                elif not blank:
                    self.place = self._end() if char == "}" else "broken"
            case "key":
                self._read(char)
                if not self._in_string:
                    self._end_key()
            case "colon":
                self.place = "value" if char == ":" else self.place if blank else "broken"
            case "value":
                if not blank:
                    self._begin_value(char)
            case "in value":
                if self._scalar and char in ",}" + _BLANKS:
                    self._end_value()
                    self._after_value(char)
                else:
                    self._take(char)
            case "after value":
                self._after_value(char)

    def _begin_value(self, char: str) -> None:
        self.place, self._token, self._depth = "in value", [], 0
        self._scalar = char not in '"{['
        if self._key in _ARGUMENTS:
            self._has_arguments, self._quoted = True, char == '"'
        self._take(char)

    def _take(self, char: str) -> None:
        """One character of a value."""
        self._read(char)
        if self._key in _ARGUMENTS and not self._quoted:
            self._new.append(char)
        if self._depth < 0:
            self.place = "broken"
        elif not self._scalar and not self._in_string and self._depth == 0:
            self._end_value()

    def _after_value(self, char: str) -> None:
        if char == ",":
            self.place = "key or end"
        elif char == "}":
            self.place = self._end()
        elif char not in _BLANKS:
            self.place = "broken"

    def _read(self, char: str) -> None:
        """Is what follows inside a string, and how deep?"""
        self._token.append(char)
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1

    def _end_key(self) -> None:
        self._key = self._string() or ""
        self.place = "colon" if self._key in (_NAME, *_ARGUMENTS, *_IGNORED) else "broken"

    def _end_value(self) -> None:
        self.place = "after value"
        if self._key == _NAME:
            self.name = self._string() or None
            if self.name is None:
                self.place = "broken"
        elif self._key in _ARGUMENTS and self._quoted:
            self._new.append(self._string() or "")

    def _string(self) -> str | None:
        """The token, if it is a string."""
        try:
            value = json.loads("".join(self._token)) if self._token[0] == '"' else None
        except ValueError:
            return None
        return value if isinstance(value, str) else None

    def _end(self) -> _Place:
        return "broken" if self.name is None else "done"
