"""A tokenizer of ours as llguidance wants it: the bytes of every token, and a way to cut text into tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kuiperllm.errors import TokenizerError
from kuiperllm.text import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer


def native_tokenizer(tokenizer: Tokenizer, stop_ids: frozenset[int]) -> LLTokenizer:
    """llguidance's form of a tokenizer; takes about a second for 150,000 tokens."""
    from llguidance import LLTokenizer, TokenizerWrapper

    ends = sorted(i for i in stop_ids if i < tokenizer.vocab_size) or list(tokenizer.eos_token_ids)
    vocabulary = Vocabulary(tokenizer, ends)
    return LLTokenizer(TokenizerWrapper(vocabulary), eos_token=ends)


class Vocabulary:
    """What `TokenizerWrapper` asks for.

    Args:
        tokenizer: the model's.
        ends: the tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, ends: list[int]) -> None:
        self._tokenizer = tokenizer
        special = set(tokenizer.special_tokens.values()) | set(ends)
        self.eos_token_id = ends[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(special)
        ordinary = ((data, i) for i, data in enumerate(self.tokens) if data and i not in special)
        self._ids: dict[bytes, int] = {}
        for data, token_id in ordinary:
            self._ids.setdefault(data, token_id)
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """Tokens whose bytes are exactly these: the tokenizer's own, unless it adds a blank in front."""
        try:
            ids = self._tokenizer.encode(text.decode(), add_special_tokens=False)
            if b"".join(map(self.tokens.__getitem__, ids)) == text:
                return ids
        except (UnicodeDecodeError, TokenizerError):
            pass
        return self._greedy(text)

    def _greedy(self, text: bytes) -> list[int]:
        """The longest token at each place; bytes that are no token are left out."""
        ids: list[int] = []
        place = 0
        while place < len(text):
            for length in range(min(self._longest, len(text) - place), 0, -1):
                if (found := self._ids.get(text[place : place + length])) is not None:
                    ids.append(found)
                    break
            place += max(1, length)
        return ids
