"""Small tokenizers, trained on a few lines, written in every file format."""

# ruff: noqa: RUF001
from __future__ import annotations

import base64
import io
import json
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from kuiperllm.text.byte_level import bytes_of_piece

LINES = [
    "Once upon a time there was a little girl who lived near the wood.",
    'She said: "I\'ll find 12 apples, 345 pears and 2024 plums!"',
    "def main(argc, argv):\n    return argc + len(argv)\n\n",
    "Voilà un été où l'œuvre naît; größer, schöner, weiter.",
    "今日は良い天気ですね。 你好，世界。 Привет, мир!",
    "the cat sat on the mat and the dog sat on the log   with   spaces",
    "emoji 🙂🙃👩‍👩‍👧 and more 🚀🚀",
]

TEXTS = [
    *LINES,
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\t mixed \r\n whitespace \x00 and zero",
    "unseen: ʘ‿ʘ ﷽ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 e\u0301",
    "<s> </s> <unk> <|endoftext|> <|im_start|>user <0x0A> <0x-1>",
    "don't DON'T we'll 1234567 8.90",
    "a" * 300,
]

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


# --- byte-level BPE ---------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def byte_level_json() -> str:
    """A GPT-2-like tokenizer.json with three special tokens and one that is not special."""
    native = tokenizers.Tokenizer(models.BPE())
    native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    native.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    native.train_from_iterator(LINES * 3, trainer)
    native.add_special_tokens(SPECIALS)
    native.add_tokens(["<think>"])
    return native.to_str()


def byte_level_parts() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Its vocabulary and merges."""
    model = json.loads(byte_level_json())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def tokenizer_config(**more: Any) -> dict[str, Any]:
    first = len(byte_level_parts()[0])
    added = [(name, True) for name in SPECIALS] + [("<think>", False)]
    return {
        "added_tokens_decoder": {
            str(first + i): {"content": name, "special": special, "normalized": False}
            for i, (name, special) in enumerate(added)
        },
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "tokenizer_class": "GPT2Tokenizer",
        "chat_template": "{{ messages[0].content }}",
        **more,
    }


def write_tokenizer_json(folder: Path) -> Path:
    (folder / "tokenizer.json").write_text(byte_level_json(), encoding="utf-8")
    config = tokenizer_config()
    del config["added_tokens_decoder"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_vocab_and_merges(folder: Path, *, version_line: bool = True, **config: Any) -> Path:
    vocab, merges = byte_level_parts()
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2"] * version_line + [" ".join(merge) for merge in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(**config)))
    return folder


def ranks() -> dict[bytes, int]:
    """The vocabulary as ranks: training numbers the bytes first, then one token for each merge."""
    vocab, _ = byte_level_parts()
    return {bytes_of_piece(piece): rank for piece, rank in vocab.items()}


def tiktoken_bytes() -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks().items())


def write_tiktoken(path: Path) -> Path:
    path.write_bytes(tiktoken_bytes())
    return path


def gguf_bpe_metadata(pre: str = "gpt-2") -> dict[str, Any]:
    vocab, merges = byte_level_parts()
    tokens = [*sorted(vocab, key=vocab.__getitem__), *SPECIALS, "<think>"]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([1] * len(vocab) + [3, 3, 3, 4], np.int32),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 4294967295,
        "tokenizer.ggml.eos_token_id": len(vocab) + 2,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


# --- SentencePiece ----------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def spm_model(model_type: str = "bpe", rule: str = "identity") -> bytes:
    """A SentencePiece model; with the default rule set up as Llama 2's."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.replace("\n", " ") for line in LINES * 3),
        model_writer=out,
        vocab_size=420,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name=rule,
        remove_extra_whitespaces=rule != "identity",
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


def spm_processor(data: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(data)
    return processor


def spm_entries() -> list[tuple[str, float, int]]:
    """Text, score and type of each piece, as the library itself reports them."""
    processor = spm_processor(spm_model())

    def kind(i: int) -> int:
        return (
            2 if processor.IsUnknown(i) else 3 if processor.IsControl(i) else 6 if processor.IsByte(i) else 1
        )

    return [(processor.IdToPiece(i), processor.GetScore(i), kind(i)) for i in range(processor.GetPieceSize())]


def llama2c_bytes() -> bytes:
    """The model in llama2.c's form, as its exporter writes it."""
    tokens = []
    for text, score, _ in spm_entries():
        text = {"<s>": "\n<s>\n", "</s>": "\n</s>\n"}.get(text, text)
        tokens.append((text.replace("\u2581", " ").encode(), score))
    out = struct.pack("<i", max(len(token) for token, _ in tokens))
    return out + b"".join(struct.pack("<fi", score, len(token)) + token for token, score in tokens)


def gguf_spm_metadata() -> dict[str, Any]:
    entries = spm_entries()
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text for text, _, _ in entries],
        "tokenizer.ggml.scores": np.array([score for _, score, _ in entries], np.float32),
        "tokenizer.ggml.token_type": np.array([kind for _, _, kind in entries], np.int32),
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.eos_token_id": np.uint32(2),
        "tokenizer.ggml.unknown_token_id": np.uint32(0),
        "tokenizer.ggml.padding_token_id": np.uint32(4294967295),
    }
