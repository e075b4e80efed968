"""The SentencePiece model behind a tokenizer, whichever files it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kuiperllm.errors import UnsupportedError
from kuiperllm.text.pipeline import BYTE_TOKEN, PipelineTokenizer
from kuiperllm.text.spm import SPACE, SentencePieceTokenizer
from kuiperllm.text.spm_model import BPE, Piece, PieceType, SpmModel
from kuiperllm.text.tokenizer import Tokenizer

_NEVER_MERGED = -1e9  # the score of a token that no merge leads to


def spm_model_of(tokenizer: Tokenizer) -> SpmModel | None:
    """The model, or None for a tokenizer of another kind.

    Raises:
        UnsupportedError: the tokenizer is of SentencePiece's kind, but its merges follow from no scores.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.model
    if isinstance(tokenizer, PipelineTokenizer) and not tokenizer.rules.byte_level:
        return _of_pipeline(tokenizer)
    return None


def _of_pipeline(tokenizer: PipelineTokenizer) -> SpmModel:
    definition = tokenizer.definition()
    model = definition["model"]
    rank = _ranks(model["merges"], tokenizer.kind)
    added = {token["id"]: token for token in definition["added_tokens"]}
    pieces = [Piece("", _NEVER_MERGED, PieceType.UNUSED)] * tokenizer.vocab_size
    for text, token_id in model["vocab"].items():
        kind = PieceType.BYTE if BYTE_TOKEN.fullmatch(text) else PieceType.NORMAL
        text = text.replace(tokenizer.rules.space, SPACE)
        pieces[token_id] = Piece(text, float(-rank.get(text, -_NEVER_MERGED)), kind)
    for token_id, token in added.items():
        kind = PieceType.CONTROL if token["special"] else PieceType.USER_DEFINED
        if token["content"] == model.get("unk_token"):
            kind = PieceType.UNKNOWN
        pieces[token_id] = Piece(token["content"], 0.0, kind)
    return SpmModel(
        pieces,
        model_type=BPE,
        byte_fallback=tokenizer.rules.byte_fallback,
        add_dummy_prefix=tokenizer.strips_leading_space,
    )


def _ranks(merges: Iterable[Any], where: str) -> Mapping[str, int]:
    """When each token is made: SentencePiece merges the pair whose result has the best score.

    That is the same as a list of merges if all pairs with one result stand together in it.
    """
    rank: dict[str, int] = {}
    last = ""
    for merge in merges:
        result = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        if result != last and result in rank:
            raise UnsupportedError(f"the tokenizer ({where}) merges in an order that no scores can express")
        rank.setdefault(result, len(rank))
        last = result
    return rank
