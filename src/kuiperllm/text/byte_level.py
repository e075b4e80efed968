"""Byte-level BPE: the byte alphabet, the families, and a pipeline from vocabulary and merges.

Byte-level BPE (Radford et al. 2019, GPT-2) works on bytes, each written as one printable character. What
differs between families is how a text is cut into words before the merges: one regular expression for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING

from kuiperllm.text.tokenizer import native_errors

if TYPE_CHECKING:
    import tokenizers

Merges = Sequence[tuple[str, str]]


# --- the byte alphabet ------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def byte_alphabet() -> tuple[str, ...]:
    """The character that stands for each byte.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, take those from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


@lru_cache(maxsize=1)
def _to_piece() -> dict[int, str]:
    return dict(enumerate(byte_alphabet()))


@lru_cache(maxsize=1)
def _from_piece() -> dict[int, int]:
    return {ord(char): byte for byte, char in enumerate(byte_alphabet())}


def piece_of_bytes(data: bytes) -> str:
    """Bytes written in the byte alphabet."""
    return data.decode("latin-1").translate(_to_piece())


def bytes_of_piece(piece: str) -> bytes:
    """The bytes that a piece stands for; one with a character outside the alphabet stands for itself."""
    alphabet = _from_piece()
    try:
        return bytes([alphabet[ord(char)] for char in piece])
    except KeyError:
        return piece.encode("utf-8")


# --- families ---------------------------------------------------------------------------------------------

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Family(Enum):
    """How a text is cut into words; the value is the published pattern, empty for GPT-2's built-in one."""

    GPT2 = ""
    LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
    QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST

    @classmethod
    def guess(cls, tokens: Mapping[str, int], special: Iterable[str] = ()) -> Family:
        """The family of a vocabulary whose files do not say it.

        Llama 3 merges up to three digits, Qwen none, GPT-2 any number; small vocabularies are taken for
        GPT-2's kind, which most training recipes use.
        """
        names = set(special)
        if "<|begin_of_text|>" in names:
            return cls.LLAMA3
        if "<|im_start|>" in names:
            return cls.QWEN2
        if len(tokens) < 100_000 or "2000" in tokens:
            return cls.GPT2
        return cls.LLAMA3 if "200" in tokens else cls.QWEN2


def build_pipeline(
    vocab: Mapping[str, int],
    merges: Merges,
    family: Family,
    *,
    where: str,
    add_prefix_space: bool = False,
) -> tokenizers.Tokenizer:
    """A byte-level BPE pipeline without added tokens.

    Raises:
        TokenizerError: a merge speaks of tokens that the vocabulary does not have.
    """
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as NativeTokenizer

    with native_errors(where):
        # Llama 3 takes a word that is in the vocabulary as it is, whether or not the merges lead there.
        model = models.BPE(dict(vocab), list(merges), ignore_merges=family is Family.LLAMA3)
        native = NativeTokenizer(model)
        if family is Family.GPT2:
            native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        else:
            native.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(family.value), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
                ]
            )
        if family is Family.QWEN2:
            native.normalizer = normalizers.NFC()
        native.decoder = decoders.ByteLevel()
    return native
