"""Log probabilities in the two forms that OpenAI's API has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kuiperllm.engine.sequence import TokenLogprobs
from kuiperllm.text import Tokenizer

_LEAST = -9999.0
"""JSON has no infinity."""


def chat_logprobs(entries: Iterable[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """The form of chat completions: an object for each token."""
    content = [
        _token(entry.token_id, entry.logprob, tokenizer)
        | {"top_logprobs": [_token(token_id, logprob, tokenizer) for token_id, logprob in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {
        "token": data.decode("utf-8", "replace"),
        "logprob": max(logprob, _LEAST),
        "bytes": list(data),
    }


class TextLogprobs:
    """The form of completions: a list of each, with the place in the text where each token begins.

    Args:
        tokenizer: the model's.
        offset: where the first token begins.
    """

    def __init__(self, tokenizer: Tokenizer, offset: int = 0) -> None:
        self._tokenizer = tokenizer
        self._offset = offset

    def take(
        self, ids: list[int], entries: Iterable[TokenLogprobs | None], count: int
    ) -> dict[str, list[Any]]:
        """The next tokens; `count` alternatives are named for each."""
        tokens, values, tops, offsets = [], [], [], []
        for token_id, entry in zip(ids, entries, strict=True):
            name = self._name(token_id)
            tokens.append(name)
            offsets.append(self._offset)
            self._offset += len(self._tokenizer.token_bytes(token_id).decode("utf-8", "replace"))
            values.append(None if entry is None else max(entry.logprob, _LEAST))
            tops.append(None if entry is None else self._top(entry, count))
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, entry: TokenLogprobs, count: int) -> dict[str, float]:
        """The most likely tokens, and the one that was chosen."""
        named = {self._name(token_id): max(logprob, _LEAST) for token_id, logprob in entry.top[:count]}
        return named | {self._name(entry.token_id): max(entry.logprob, _LEAST)}

    def _name(self, token_id: int) -> str:
        """A token's text; what is not UTF-8 by itself is told apart by its bytes, as OpenAI does."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
