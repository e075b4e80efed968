"""Text as it is generated: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from kuiperllm.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns token ids into text one at a time, in constant time for each, without half a UTF-8 character.

    What `push` returned, joined, and `finish` together are what `Tokenizer.decode` makes of all ids. After
    a prompt that holds ordinary tokens the text goes on in mid-sentence: no leading blank is dropped.

    Args:
        tokenizer: the tokenizer that made the ids.
        skip_special_tokens: leave special tokens out of the text.
        prompt_ids: the tokens in front of the first one that is pushed.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._at_start = tokenizer.strips_leading_space and all(
            tokenizer.is_special(token_id) for token_id in prompt_ids
        )
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; empty while a character is incomplete.

        Raises:
            TokenizerError: the id is out of range.
        """
        data = self._tokenizer.token_bytes(token_id)
        if self._tokenizer.is_special(token_id):
            return "" if self._skip_special else self._decoder.decode(data)
        if self._at_start and data:
            data, self._at_start = data.removeprefix(b" "), False
        return self._decoder.decode(data)

    def finish(self) -> str:
        """The replacement character if the text ends inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Cuts a stream of text before the first stop string in it.

    The stop string that ends first counts, and of several that end at the same character the longest; so
    the result does not depend on how the text is cut into pushes. Text that may be the beginning of a stop
    string is held back.

    Args:
        stops: the strings; empty ones are ignored.

    Attributes:
        matched: the stop string that was found, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _prefix_function(stop)) for stop in dict.fromkeys(stops) if stop]
        self._lengths = [0] * len(self._stops)  # how much of each stop string the text ends with
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that no stop string can take back any more and was not returned yet."""
        if self.matched is not None:
            return ""
        pending = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            if (found := self._step(char)) is not None:
                self.matched, self._held = found, ""
                return pending[: position - len(found)]
        keep = len(pending) - max(self._lengths, default=0)
        self._held = pending[keep:]
        return pending[:keep]

    def finish(self) -> str:
        """The text that was held back, once it is certain that no more will come."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> str | None:
        """Take one character; the longest stop string that ends with it, if any (Knuth, Morris, Pratt)."""
        found: str | None = None
        for index, (stop, fallback) in enumerate(self._stops):
            length = self._lengths[index]
            while length and stop[length] != char:
                length = fallback[length - 1]
            if stop[length] == char:
                length += 1
            if length == len(stop):
                found = max(found or "", stop, key=len)
                length = fallback[length - 1]
            self._lengths[index] = length
        return found


def _prefix_function(text: str) -> list[int]:
    """For each prefix of a text, the length of its longest proper prefix that is also its suffix."""
    lengths = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = lengths[length - 1]
        if text[index] == text[length]:
            length += 1
        lengths[index] = length
    return lengths
