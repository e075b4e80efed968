"""What every tokenizer can do, whatever files it came from.

Decoding is defined once, here: the bytes of the tokens are joined and read as UTF-8, malformed bytes becoming
U+FFFD. Streaming (see `detokenizer`) therefore gives the same text, and the tokenizer libraries below are
only asked to encode.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

from kuiperllm.errors import TokenizerError

# An id above this is taken for damage: far above any real vocabulary.
MAX_VOCAB_SIZE = 1 << 24

# Special tokens that end a text or a turn in the families that are supported, for files that name no end
# token.
END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>")


class Tokenizer(ABC):
    """Turns text into token ids and back.

    Attributes:
        kind: a short name of where it came from, such as `tokenizer.json` or `gguf bpe`.
        vocab_size: every id is below this. A model may have more rows in its embedding than the tokenizer
            has ids.
        special_tokens: text to id of the control tokens.
        bos_token_id: the token that begins a text, if there is one.
        eos_token_ids: the tokens that end a text or a turn, as far as the tokenizer's files say.
        add_bos: whether `encode` puts the beginning-of-text token in front.
        chat_template: the Jinja source that came with the files, if any.
        strips_leading_space: whether decoding drops one blank from the front of a text: SentencePiece encodes
            "Hello" as " Hello".
    """

    def __init__(
        self,
        *,
        kind: str,
        vocab_size: int,
        special_tokens: Mapping[str, int],
        bos_token_id: int | None,
        eos_token_ids: Iterable[int],
        add_bos: bool,
        chat_template: str | None = None,
        strips_leading_space: bool = False,
    ) -> None:
        self.kind = kind
        self.vocab_size = vocab_size
        self.special_tokens: Mapping[str, int] = MappingProxyType(dict(special_tokens))
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.add_bos = add_bos and bos_token_id is not None
        self.chat_template = chat_template
        self.strips_leading_space = strips_leading_space
        self._special_ids = frozenset(self.special_tokens.values())
        self._bytes_of: dict[int, bytes] = {}

    # --- text to ids --------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """The token ids of a text.

        Args:
            text: any text that can be written as UTF-8.
            add_special_tokens: put the beginning-of-text token in front if `add_bos`. Rendered chat templates
                usually hold it already: pass False for them.
            parse_special: take special tokens that are spelled out in the text for what they are. Off, they
                are ordinary text, so that a user cannot forge the turns of a chat.

        Raises:
            TokenizerError: the text holds a lone surrogate, or the tokenizer's own rules fail on it.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text cannot be encoded: lone surrogate U+{ord(text[error.start]):04X} at {error.start}"
            ) from None
        ids = self._encode(text, parse_special) if text else []
        if add_special_tokens and self.add_bos and self.bos_token_id is not None:
            return [self.bos_token_id, *ids]
        return ids

    @abstractmethod
    def _encode(self, text: str, parse_special: bool) -> list[int]:
        """The ids of a text that is not empty, without the beginning-of-text token."""

    # --- ids to text --------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of some token ids; bytes that are not UTF-8 become U+FFFD.

        Where `strips_leading_space`, one blank is dropped from the front of the first ordinary token.

        Raises:
            TokenizerError: an id is out of range.
        """
        at_start = self.strips_leading_space
        parts: list[bytes] = []
        for token_id in ids:
            data = self.token_bytes(token_id)
            if token_id in self._special_ids:
                if not skip_special_tokens:
                    parts.append(data)
                continue
            if at_start and data:
                data, at_start = data.removeprefix(b" "), False
            parts.append(data)
        return b"".join(parts).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that an id adds to the output in mid-text; for a special token, its name.

        Raises:
            TokenizerError: the id is out of range.
        """
        data = self._bytes_of.get(token_id)
        if data is None:
            data = self._bytes_of[token_id] = self._token_bytes(self._checked(token_id))
        return data

    @abstractmethod
    def _token_bytes(self, token_id: int) -> bytes:
        """The bytes of an id that is in range; empty where the vocabulary has a hole."""

    def is_special(self, token_id: int) -> bool:
        """Whether an id is a control token rather than text.

        Raises:
            TokenizerError: the id is out of range.
        """
        return self._checked(token_id) in self._special_ids

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(
                f"token id {token_id} is outside the vocabulary of {self.vocab_size} tokens ({self.kind})"
            )
        return int(token_id)


@contextmanager
def native_errors(what: str) -> Iterator[None]:
    """Turn any failure of a native tokenizer library into a one-line `TokenizerError`.

    A panic in Rust reaches Python as a direct subclass of BaseException, hence the wide net.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, TokenizerError):
        raise
    except BaseException as error:
        raise TokenizerError(f"{what}: {one_line(error)}") from None


def one_line(error: object, limit: int = 200) -> str:
    """An error's text without line breaks, shortened to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
