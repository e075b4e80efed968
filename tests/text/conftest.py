"""Small tokenizers of every kind, loaded from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_tokenizers as small

from kuiperllm.text import Tokenizer, load_tokenizer, tokenizer_from_gguf

BYTE_LEVEL = ["tokenizer.json", "vocab.json + merges.txt", "tiktoken", "gguf bpe"]
SENTENCEPIECE = ["sentencepiece", "llama2.c", "gguf spm"]


def make(kind: str, folder: Path) -> Tokenizer:
    match kind:
        case "tokenizer.json":
            return load_tokenizer(small.write_tokenizer_json(folder))
        case "vocab.json + merges.txt":
            return load_tokenizer(small.write_vocab_and_merges(folder))
        case "tiktoken":
            return load_tokenizer(small.write_tiktoken(folder / "tokenizer.model"))
        case "gguf bpe":
            return tokenizer_from_gguf(small.gguf_bpe_metadata())
        case "sentencepiece":
            (folder / "tokenizer.model").write_bytes(small.spm_model())
            return load_tokenizer(folder)
        case "llama2.c":
            (folder / "tokenizer.bin").write_bytes(small.llama2c_bytes())
            return load_tokenizer(folder)
        case _:
            return tokenizer_from_gguf(small.gguf_spm_metadata())


@pytest.fixture(scope="session")
def small_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {kind: make(kind, tmp_path_factory.mktemp("tokenizer")) for kind in BYTE_LEVEL + SENTENCEPIECE}


@pytest.fixture(params=BYTE_LEVEL)
def byte_level(request: pytest.FixtureRequest, small_tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return small_tokenizers[request.param]


@pytest.fixture(params=SENTENCEPIECE)
def spm(request: pytest.FixtureRequest, small_tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return small_tokenizers[request.param]


@pytest.fixture(params=BYTE_LEVEL + SENTENCEPIECE)
def any_tokenizer(request: pytest.FixtureRequest, small_tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return small_tokenizers[request.param]
