"""Writes a model of random weights to disk: everything that `LLM` needs, in the shape of a config.json."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from memory import write_checkpoint

_DIGITS = [chr(code) for code in range(33, 127)]


def write_model(config_file: Path, folder: Path) -> None:
    """A Hugging Face folder: config, safetensors, and a tokenizer that has a text for every id."""
    write_checkpoint(config_file, folder)
    size = json.loads(config_file.read_text())["vocab_size"]
    tokenizer = Tokenizer(models.BPE({_text(number): number for number in range(size)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")


def _text(number: int) -> str:
    """The number in a system of 94 digits, each a character of ASCII: 0 to 93 are single characters."""
    text = _DIGITS[number % len(_DIGITS)]
    while number := number // len(_DIGITS):
        text = _DIGITS[(number - 1) % len(_DIGITS)] + text
        number -= 1
    return text
