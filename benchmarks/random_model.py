"""Models of random weights, of the shape of a config.json: on disk, or only in memory."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kuiperllm import LLM, Device, DType, ModelConfig
from kuiperllm.checkpoint.random import RandomCheckpoint
from kuiperllm.models import check_model
from memory import write_checkpoint

_DIGITS = [chr(code) for code in range(33, 127)]


def write_model(config_file: Path, folder: Path) -> None:
    """A Hugging Face folder: config, safetensors, and a tokenizer that has a text for every id."""
    write_checkpoint(config_file, folder)
    write_tokenizer(json.loads(config_file.read_text())["vocab_size"], folder)


def random_llm(config_file: Path, *, device: str, dtype: str = "bfloat16", **options: Any) -> LLM:
    """A language model whose weights never were on a disk.

    Args:
        config_file: a config.json of Hugging Face.
        device: where to run.
        dtype: what the weights are before they are quantized, if they are.
        options: others of `LLM`.
    """
    config = ModelConfig.from_hf(json.loads(config_file.read_text()))
    checkpoint = RandomCheckpoint(config, DType(dtype))
    check_model(config, checkpoint, Device(device))  # a random checkpoint has what was asked of it
    with tempfile.TemporaryDirectory() as name:
        write_tokenizer(config.vocab_size, Path(name))
        with mock.patch("kuiperllm.engine.loading.open_model", return_value=checkpoint):
            return LLM("random", tokenizer=name, device=device, **options)


def write_tokenizer(size: int, folder: Path) -> None:
    """A tokenizer that has a text for every id."""
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
