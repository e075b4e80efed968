"""A tokenizer as the files of a Hugging Face folder."""

from __future__ import annotations

import json
from typing import Any

from kuiperllm.errors import UnsupportedError
from kuiperllm.text.pipeline import PipelineTokenizer
from kuiperllm.text.spm import SentencePieceTokenizer
from kuiperllm.text.spm_model import PieceType, SpmModel, serialize
from kuiperllm.text.tokenizer import Tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """tokenizer.json or tokenizer.model, with tokenizer_config.json, by name.

    Raises:
        UnsupportedError: the tokenizer is of a kind that these files cannot hold.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return {
            "tokenizer.model": serialize(tokenizer.model),
            "tokenizer_config.json": _json(_config(tokenizer, "LlamaTokenizer", _added_to(tokenizer.model))),
        }
    if isinstance(tokenizer, PipelineTokenizer):
        definition = tokenizer.definition()
        if definition.get("post_processor") is None and tokenizer.add_bos:
            definition["post_processor"] = _beginning(tokenizer)
        return {
            "tokenizer.json": _json(definition),
            "tokenizer_config.json": _json(_config(tokenizer, "PreTrainedTokenizerFast", {})),
        }
    raise UnsupportedError(f"a tokenizer of the kind {tokenizer.kind} cannot be written as files")


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8")


def _config(tokenizer: Tokenizer, class_name: str, added: dict[str, Any]) -> dict[str, Any]:
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    config: dict[str, Any] = {"tokenizer_class": class_name}
    if added:
        config["added_tokens_decoder"] = added
    config |= {
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.bos_token_id in names:
        config["bos_token"] = names[tokenizer.bos_token_id]
    if tokenizer.eos_token_ids and tokenizer.eos_token_ids[0] in names:
        config["eos_token"] = names[tokenizer.eos_token_ids[0]]
    if "<unk>" in tokenizer.special_tokens:
        config["unk_token"] = "<unk>"
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    return config


def _added_to(model: SpmModel) -> dict[str, Any]:
    """The special tokens of a SentencePiece model, for libraries that look for them here."""
    return {
        str(token_id): {
            "content": piece.text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token_id, piece in enumerate(model.pieces)
        if piece.kind in (PieceType.CONTROL, PieceType.UNKNOWN) and piece.text
    }


def _beginning(tokenizer: PipelineTokenizer) -> dict[str, Any]:
    """A post-processor that puts the beginning-of-text token in front."""
    (name,) = (name for name, i in tokenizer.special_tokens.items() if i == tokenizer.bos_token_id)
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": letter, "type_id": i}} for i, letter in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, {"SpecialToken": {"id": name, "type_id": 1}}, second],
        "special_tokens": {name: {"id": name, "ids": [tokenizer.bos_token_id], "tokens": [name]}},
    }
