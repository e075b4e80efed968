"""Reasoning in front of an answer, as Qwen3 and DeepSeek-R1 write it: `<think>` ... `</think>`."""

from __future__ import annotations

from typing import Literal

from kuiperllm.server.answers.pieces import Content, Piece, Reasoning, kept_back
from kuiperllm.server.structured import Grammar

OPEN, CLOSE = "<think>", "</think>"

ThinkingState = Literal["open", "possible", "closed"]
"""Where a prompt leaves the model: inside reasoning, free to begin it, or behind it."""

_BLANKS = r"BLANKS: /[ \n]{0,4}/"


def state_after(prompt: str) -> ThinkingState:
    """Where a prompt leaves a model: some templates write the opening mark, or an empty thought."""
    end = prompt.rstrip()
    if end.endswith(OPEN):
        return "open"
    return "closed" if end.endswith(CLOSE) else "possible"


def behind_reasoning(grammar: Grammar, state: ThinkingState) -> Grammar:
    """A grammar for what follows the reasoning, which itself is free."""
    if state == "closed":
        return grammar
    if state == "open":
        return grammar.behind("thought BLANKS", r"thought[lazy]: /(.|\n)*<\/think>/", _BLANKS)
    return grammar.behind("thought? BLANKS", r"thought[lazy]: /[ \n]{0,4}<think>(.|\n)*<\/think>/", _BLANKS)


class Thinking:
    """Tells reasoning from the answer. Line breaks around either are left out.

    Args:
        state: where the prompt ended.
    """

    def __init__(self, state: ThinkingState) -> None:
        self.state = state
        self._held = ""
        self._begun = False  # whether anything but blanks came since the last mark

    def push(self, text: str) -> list[Piece]:
        """Take in more text."""
        self._held += text
        pieces: list[Piece] = []
        if self.state == "possible":
            self._look_for_beginning()
        if self.state == "open":
            pieces += self._reason()
        if self.state == "closed":
            pieces += self._answer()
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back."""
        held, self._held = self._held, ""
        if not held:
            return []
        return (
            [Reasoning(held.rstrip())]
            if self.state == "open" and held.strip()
            else _content(held, self.state)
        )

    def _look_for_beginning(self) -> None:
        start = self._held.lstrip()
        if start.startswith(OPEN):
            self.state, self._held = "open", start.removeprefix(OPEN)
        elif not OPEN.startswith(start):
            self.state, self._begun = "closed", True  # no reasoning: blanks in front are the answer's own

    def _reason(self) -> list[Piece]:
        if not self._begun:
            self._held = self._held.lstrip()
        thought, found, rest = self._held.partition(CLOSE)
        if found:
            self.state, self._held, self._begun = "closed", rest, False
            return [Reasoning(thought.rstrip())] if thought.strip() else []
        certain = self._held[: len(self._held) - kept_back(self._held, CLOSE)].rstrip()
        self._held = self._held[len(certain) :]
        self._begun = self._begun or bool(certain)
        return [Reasoning(certain)] if certain else []

    def _answer(self) -> list[Piece]:
        text = self._held if self._begun else self._held.lstrip()
        self._held = ""
        self._begun = self._begun or bool(text)
        return [Content(text)] if text else []


def _content(text: str, state: ThinkingState) -> list[Piece]:
    return [] if state == "open" else [Content(text)]
