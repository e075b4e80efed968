"""Tokenizers that the `sentencepiece` library runs, from its own files or from llama2.c's."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kuiperllm.errors import TokenizerError
from kuiperllm.text.files import TokenizerConfig
from kuiperllm.text.pipeline import BYTE_TOKEN, end_tokens
from kuiperllm.text.spm_model import Piece, PieceType, SpmModel, parse, serialize
from kuiperllm.text.tokenizer import Tokenizer, native_errors

SPACE = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer around a SentencePiece model.

    Each stretch of text between special tokens is encoded like a text of its own, that is, with a blank in
    front if the model adds one.

    Raises:
        TokenizerError: the vocabulary contradicts itself.
    """

    def __init__(self, model: SpmModel, *, where: str, **description: Any) -> None:
        from sentencepiece import SentencePieceProcessor

        special = {
            piece.text: token_id
            for token_id, piece in enumerate(model.pieces)
            if piece.kind in (PieceType.CONTROL, PieceType.UNKNOWN) and piece.text
        }
        super().__init__(
            vocab_size=len(model.pieces),
            special_tokens=special,
            strips_leading_space=model.add_dummy_prefix and not model.whitespace_as_suffix,
            **description,
        )
        self.model = model
        self._pieces = model.pieces
        self._native = SentencePieceProcessor()
        with native_errors(where):
            self._native.LoadFromSerializedProto(serialize(_for_native(model, where)))
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if special else None

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if not parse_special or self._special is None:
            return self._encode_ordinary(text)
        ids: list[int] = []
        for part in self._special.split(text):
            token_id = self.special_tokens.get(part)
            if token_id is not None:
                ids.append(token_id)
            elif part:
                ids += self._encode_ordinary(part)
        return ids

    def _encode_ordinary(self, text: str) -> list[int]:
        with native_errors(f"{self.kind} cannot encode the text"):
            ids: list[int] = self._native.encode(text)
        return ids

    def _token_bytes(self, token_id: int) -> bytes:
        piece = self._pieces[token_id]
        if piece.kind is PieceType.BYTE and (match := BYTE_TOKEN.fullmatch(piece.text)):
            return bytes([int(match[1], 16)])
        if token_id in self._special_ids:
            return piece.text.encode("utf-8")
        return piece.text.replace(SPACE, " ").encode("utf-8")


def _for_native(model: SpmModel, where: str) -> SpmModel:
    """The model with pieces that the native library accepts, each under the same id.

    It insists on distinct non-empty pieces, on one unknown piece, and on all 256 byte pieces or none.
    """
    if not model.pieces:
        raise TokenizerError(f"{where}: the vocabulary is empty")
    kinds = [piece.kind for piece in model.pieces]
    unknown = kinds.index(PieceType.UNKNOWN) if PieceType.UNKNOWN in kinds else None
    if unknown is None:
        raise TokenizerError(f"{where}: the vocabulary has no unknown token")
    byte_ids: dict[str, int] = {}
    for token_id, piece in enumerate(model.pieces):
        if piece.kind is PieceType.BYTE and BYTE_TOKEN.fullmatch(piece.text):
            byte_ids.setdefault(f"<0x{piece.text[3:5].upper()}>", token_id)
    byte_fallback = model.byte_fallback and len(byte_ids) == 256
    byte_text = {token_id: text for text, token_id in byte_ids.items()} if byte_fallback else {}

    pieces: list[Piece] = []
    seen: dict[str, int] = {}
    for token_id, piece in enumerate(model.pieces):
        text, score, kind = piece
        if token_id in byte_text:
            text = byte_text[token_id]
        elif not text:
            text, kind = f"[empty token {token_id}]", PieceType.UNUSED
        elif kind is PieceType.BYTE or (kind is PieceType.UNKNOWN and token_id != unknown):
            kind = PieceType.CONTROL  # never matched in a text
        if not math.isfinite(score):
            raise TokenizerError(f"{where}: token {token_id} has the score {score}")
        if "\0" in text:
            raise TokenizerError(f"{where}: token {token_id} contains a zero byte")
        if (first := seen.setdefault(text, token_id)) != token_id:
            raise TokenizerError(f"{where}: tokens {first} and {token_id} are the same: {text!r}")
        pieces.append(Piece(text, score, kind))
    return replace(model, pieces=pieces, byte_fallback=byte_fallback)


# --- SentencePiece's own files ----------------------------------------------------------------------------


def load_sentencepiece(path: Path, data: bytes, config: TokenizerConfig) -> Tokenizer:
    """Build a tokenizer from a SentencePiece model and the added tokens of tokenizer_config.json.

    Raises:
        TokenizerError: the file is corrupt, or an added token contradicts it.
    """
    where = str(path)
    model = parse(data, where)
    pieces = list(model.pieces)
    for token in config.added_tokens:
        if token.token_id < len(pieces):
            continue  # a name for a piece that is already there
        if token.token_id > len(pieces):
            raise TokenizerError(
                f"{where}: added token {token.content!r} has id {token.token_id}, but {len(pieces)} is next"
            )
        kind = PieceType.CONTROL if token.special else PieceType.USER_DEFINED
        pieces.append(Piece(token.content, 0.0, kind))
    model = replace(model, pieces=pieces)
    special = {p.text: i for i, p in enumerate(pieces) if p.kind is PieceType.CONTROL}
    eos = special.get(model.eos_piece)
    return SentencePieceTokenizer(
        model,
        where=where,
        kind="sentencepiece",
        bos_token_id=special.get(config.bos_token or model.bos_piece),
        eos_token_ids=end_tokens(config, special.get, special) if eos is None or config.eos_token else [eos],
        add_bos=config.add_bos is not False,
        chat_template=config.chat_template,
    )


# --- llama2.c ---------------------------------------------------------------------------------------------

_MAX_TOKEN_LENGTH = 1 << 20


def load_llama2c(path: Path, data: bytes) -> Tokenizer:
    """Build a tokenizer from llama2.c's tokenizer.bin.

    The file is an int32 (the longest token's length) and for each token a float32 score, an int32 length
    and the bytes, with plain blanks; ids 1 and 2 are the beginning and end of a text. The number of tokens
    is not stored.

    Raises:
        TokenizerError: the file is truncated or corrupt.
    """
    where = str(path)
    entries = parse_llama2c(data, where)
    if len(entries) < 3:
        raise TokenizerError(f"{where}: {len(entries)} tokens are too few for a vocabulary")
    pieces = infer_types([(text.replace(" ", SPACE), score) for text, score in entries])
    for token_id, name in enumerate(("<unk>", "<s>", "</s>")):
        # The exporter writes "\n<s>\n" for "<s>", so that texts in its output begin on a line of their own.
        kind = PieceType.CONTROL if token_id else PieceType.UNKNOWN
        pieces[token_id] = Piece(pieces[token_id].text.strip("\n") or name, 0.0, kind)
    return SentencePieceTokenizer(
        SpmModel(pieces), where=where, kind="llama2.c", bos_token_id=1, eos_token_ids=[2], add_bos=True
    )


def infer_types(entries: Iterable[tuple[str, float]]) -> list[Piece]:
    """Pieces for a vocabulary that does not say which of its tokens stand for bytes."""
    return [
        Piece(text, score, PieceType.BYTE if BYTE_TOKEN.fullmatch(text) else PieceType.NORMAL)
        for text, score in entries
    ]


def parse_llama2c(data: bytes, where: str) -> Sequence[tuple[str, float]]:
    """Texts and scores of the tokens in a llama2.c tokenizer.bin.

    Raises:
        TokenizerError: a length points behind the end of the file, or a token is not UTF-8.
    """
    entries: list[tuple[str, float]] = []
    position = 4
    while position < len(data):
        if len(data) - position < 8:
            raise TokenizerError(f"{where}: truncated in the header of token {len(entries)}")
        score, length = struct.unpack_from("<fi", data, position)
        position += 8
        if not 0 <= length <= len(data) - position:
            raise TokenizerError(
                f"{where}: token {len(entries)} claims {length} bytes, {len(data) - position} are left"
            )
        try:
            entries.append((data[position : position + length].decode("utf-8"), score))
        except UnicodeDecodeError:
            raise TokenizerError(f"{where}: token {len(entries)} is not UTF-8") from None
        position += length
    return entries


def looks_like_llama2c(data: bytes) -> bool:
    """Whether a file begins like a llama2.c tokenizer.bin."""
    if len(data) < 12:
        return False
    longest, score, length = struct.unpack_from("<ifi", data)
    return 0 < longest <= _MAX_TOKEN_LENGTH and 0 <= length <= longest and not math.isnan(score)
