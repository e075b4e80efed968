"""Cuts token ids into windows: what a model sees by itself, and how much of it counts. Integers only.

The two ways of cutting one long text are those of llama.cpp's perplexity tool, so that figures can be
compared: functions `perplexity` and `perplexity_v2` in its file `tools/perplexity/perplexity.cpp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kuiperllm.errors import UsageError

MIN_CONTEXT = 4
"""The shortest context: of a window, something must be left that counts."""


@dataclass(frozen=True, slots=True)
class Window:
    """Some tokens of a text that a model sees by themselves."""

    text: Sequence[int]
    """The ids of the whole text."""
    start: int
    """Where in the text the window begins."""
    length: int
    first: int
    """Place in the window, 1 at least, of the first token that counts; what is before it is context."""
    bos: int | None = None
    """What takes the place of the window's first token."""

    @property
    def ids(self) -> list[int]:
        """The tokens."""
        ids = list(self.text[self.start : self.start + self.length])
        if self.bos is not None:
            ids[0] = self.bos
        return ids

    @property
    def num_scored(self) -> int:
        """How many tokens count."""
        return self.length - self.first


def chunks(ids: Sequence[int], context: int, bos: int | None) -> list[Window]:
    """Windows of `context` tokens, one behind the other; of each, the second half counts.

    What is left at the end of the text, less than a window, is not used. So a window of n tokens counts
    n - n // 2 - 1 of them: the token in the middle is the first that the rest is predicted from.

    Args:
        ids: the text, with the token that begins it, if there is one.
        context: tokens in a window.
        bos: put in the place of each window's first token, so that all begin as a text does; None: nothing.

    Raises:
        UsageError: the text is shorter than two windows.
    """
    _check_length(len(ids), context, len(ids) // 2)
    return [
        Window(ids, start, context, context // 2 + 1, bos)
        for start in range(0, len(ids) - context + 1, context)
    ]


def sliding(ids: Sequence[int], context: int, stride: int) -> list[Window]:
    """Windows of `context + stride // 2` tokens, each `stride` further on; the last `stride` of each count.

    They begin with whatever token stands there, not with that of a text's beginning.

    Args:
        ids: the text, with the token that begins it, if there is one.
        context: see above.
        stride: 1 to `context`.

    Raises:
        UsageError: the text is shorter than two windows, or the stride is not possible.
    """
    if not 1 <= stride <= context:
        raise UsageError(f"stride {stride} is not possible; choose 1 to {context}, the context")
    length = context + stride // 2
    _check_length(len(ids), length, len(ids) // 2 - stride // 2)
    count = -(-(len(ids) - length) // stride)
    return [Window(ids, index * stride, length, length - stride) for index in range(count)]


def whole(texts: Sequence[Sequence[int]]) -> list[Window]:
    """One window for each text; all its tokens but the first count."""
    return [Window(ids, 0, len(ids), 1) for ids in texts if len(ids) > 1]


def _check_length(num_tokens: int, length: int, possible: int) -> None:
    if num_tokens >= 2 * length:
        return
    advice = f", or a context of at most {possible}" if possible >= MIN_CONTEXT else ""
    raise UsageError(
        f"the text has {num_tokens} tokens, and windows of {length} need {2 * length} or more; use a longer "
        f"text{advice}"
    )
