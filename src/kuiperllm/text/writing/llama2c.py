"""llama2.c's tokenizer.bin; `text.spm.load_llama2c` reads it."""

from __future__ import annotations

import struct

from kuiperllm.text.spm import SPACE
from kuiperllm.text.spm_model import BPE, PieceType, SpmModel
from kuiperllm.text.tokenizer import Tokenizer
from kuiperllm.text.writing.spm import spm_model_of

_BOS, _EOS = 1, 2


def llama2c_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> bytes | None:
    """The file, or None if llama2.c cannot work with this tokenizer.

    That it can takes SentencePiece merges by score, all bytes as fallback at ids 3 to 258, token 1 to begin a
    text and 2 to end it, and no more tokens than the embedding has rows; missing ones become empty tokens.

    Args:
        tokenizer: of any kind.
        vocab_size: rows of the embedding, as many as llama2.c reads tokens.
    """
    model = spm_model_of(tokenizer)
    if model is None or not _fits(model, tokenizer, vocab_size):
        return None
    tokens = [(piece.text.replace(SPACE, " ").encode("utf-8"), piece.score) for piece in model.pieces]
    for token_id, name in ((_BOS, b"\n<s>\n"), (_EOS, b"\n</s>\n")):
        tokens[token_id] = name, 0.0
    tokens += [(b"", 0.0)] * (vocab_size - len(tokens))
    out = bytearray(struct.pack("<I", max(len(text) for text, _ in tokens)))
    for text, score in tokens:
        out += struct.pack("<fI", score, len(text)) + text
    return bytes(out)


def _fits(model: SpmModel, tokenizer: Tokenizer, vocab_size: int) -> bool:
    return (
        model.model_type == BPE
        and model.add_dummy_prefix
        and not (model.normalization or model.whitespace_as_suffix)
        and 259 <= len(model.pieces) <= vocab_size
        and all(piece.text == f"<0x{i:02X}>" for i, piece in enumerate(model.pieces[3:259]))
        and all(piece.kind is PieceType.BYTE for piece in model.pieces[3:259])
        and tokenizer.bos_token_id == _BOS
        and _EOS in tokenizer.eos_token_ids
    )
