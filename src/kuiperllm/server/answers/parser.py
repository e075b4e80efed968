"""Reasoning, then an answer in which there may be calls."""

from __future__ import annotations

from kuiperllm.server.answers.pieces import Content, Parser, Piece
from kuiperllm.server.answers.reasoning import Thinking


class AnswerParser:
    """Takes text in as it comes, and says what it is as soon as that is certain.

    Args:
        thinking: tells reasoning from the answer; None if the model does not reason.
        calls: finds calls in the answer; None if there are no functions.
    """

    def __init__(self, thinking: Thinking | None, calls: Parser | None) -> None:
        self._thinking = thinking
        self._calls = calls

    def push(self, text: str) -> list[Piece]:
        """Take in more text."""
        pieces: list[Piece] = [Content(text)] if text else []
        return self._in_answer(self._thinking.push(text) if self._thinking is not None else pieces)

    def finish(self) -> list[Piece]:
        """What was held back, once no more will come."""
        pieces = self._in_answer(self._thinking.finish()) if self._thinking is not None else []
        return pieces + (self._calls.finish() if self._calls is not None else [])

    def _in_answer(self, pieces: list[Piece]) -> list[Piece]:
        if self._calls is None:
            return pieces
        found: list[Piece] = []
        for piece in pieces:
            found += self._calls.push(piece.text) if isinstance(piece, Content) else [piece]
        return found
