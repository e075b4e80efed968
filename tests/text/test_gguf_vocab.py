"""Tokenizers from the metadata of GGUF files."""

from __future__ import annotations

from typing import Any

import pytest
import small_tokenizers as small

from kuiperllm.errors import KuiperError, TokenizerError, UnsupportedError
from kuiperllm.text import Tokenizer, tokenizer_from_gguf


def test_description(small_tokenizers: dict[str, Tokenizer]) -> None:
    bpe, spm = small_tokenizers["gguf bpe"], small_tokenizers["gguf spm"]
    first = len(small.ranks())
    assert bpe.bos_token_id is None  # the file says 2**32 - 1
    assert set(bpe.eos_token_ids) == {first, first + 2}  # the key, and <|endoftext|> by its name
    assert bpe.special_tokens == {name: first + i for i, name in enumerate(small.SPECIALS)}
    assert bpe.chat_template == "{{ messages[0].content }}"
    assert (spm.bos_token_id, spm.eos_token_ids, spm.add_bos) == (1, (2,), True)
    assert spm.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}


@pytest.mark.parametrize(("pre", "digits"), [("llama-bpe", True), ("qwen2", False), ("gpt-2", True)])
def test_the_pre_tokenizer_is_chosen_by_name(pre: str, digits: bool) -> None:
    """The training text made tokens of digits; only Qwen's pattern takes digits one by one."""
    ids = tokenizer_from_gguf(small.gguf_bpe_metadata(pre)).encode("12", add_special_tokens=False)
    assert (len(ids) == 1) is digits


def test_llama3_begins_with_a_beginning_token_unless_the_file_says_otherwise() -> None:
    metadata = small.gguf_bpe_metadata("llama-bpe") | {"tokenizer.ggml.bos_token_id": 400}
    assert tokenizer_from_gguf(metadata).add_bos
    assert not tokenizer_from_gguf(metadata | {"tokenizer.ggml.add_bos_token": False}).add_bos
    assert not tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": "qwen2"}).add_bos


def test_types_may_be_missing() -> None:
    metadata = small.gguf_spm_metadata()
    expected = tokenizer_from_gguf(metadata).encode("Once ʘ 🙂")
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("Once ʘ 🙂") == expected
    assert tokenizer.decode(expected) == "Once ʘ 🙂"


def test_no_space_prefix() -> None:
    tokenizer = tokenizer_from_gguf(small.gguf_spm_metadata() | {"tokenizer.ggml.add_space_prefix": False})
    ids = tokenizer.encode("Once", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == b"Once"
    assert tokenizer.decode(tokenizer.encode(" Once")) == " Once"


def test_empty_tokens_and_an_incomplete_byte_alphabet_are_tolerated() -> None:
    metadata = small.gguf_spm_metadata()
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens[10], tokens[300] = "<0x-1>", ""
    tokenizer = tokenizer_from_gguf(metadata | {"tokenizer.ggml.tokens": tokens})
    assert tokenizer.token_bytes(10) == b"<0x-1>"
    assert tokenizer.token_bytes(9) == b"\x06"
    assert tokenizer.token_bytes(300) == b""
    assert tokenizer.decode(tokenizer.encode("Once upon")) == "Once upon"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "'t5' is not supported; supported: llama .*, gpt2"),
        ({"model": None}, "None is not supported"),
        ({"model": 3}, "model must be a string"),
        ({"pre": "starcoder"}, "'starcoder' is not supported; supported: gpt-2, llama-bpe"),
        ({"tokens": []}, "missing or empty"),
        ({"tokens": [1, 2]}, "list of strings"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "two tokens are the same"),
        ({"tokens": ["a", "\udcff"], "token_type": [1, 1]}, "not UTF-8"),
        ({"token_type": [1]}, "1 entries for"),
        ({"merges": ["a b c"]}, "line 1 is not a merge of two tokens"),
        ({"merges": ["qqq zzz"]}, "the GGUF tokenizer: .*out of vocabulary"),
        ({"add_bos_token": 1}, "add_bos_token must be true or false"),
    ],
)
def test_bad_byte_level_metadata(changes: dict[str, Any], message: str) -> None:
    metadata = small.gguf_bpe_metadata() | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
    with pytest.raises(KuiperError, match=message):
        tokenizer_from_gguf(metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "scores is missing"),
        ({"scores": [0.0]}, "1 entries for"),
        (
            {"tokens": ["<unk>", "a", "a"], "scores": [0.0] * 3, "token_type": [2, 1, 1]},
            "1 and 2 are the same",
        ),
        ({"tokens": ["<unk>", "a\0"], "scores": [0.0] * 2, "token_type": [2, 1]}, "zero byte"),
        ({"tokens": ["<unk>", "a"], "scores": [0.0, float("nan")], "token_type": [2, 1]}, "the score nan"),
    ],
)
def test_bad_sentencepiece_metadata(changes: dict[str, Any], message: str) -> None:
    metadata = small.gguf_spm_metadata() | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
    with pytest.raises(TokenizerError, match=message):
        tokenizer_from_gguf(metadata)


def test_no_tokenizer_at_all() -> None:
    with pytest.raises((TokenizerError, UnsupportedError), match=r"tokenizer\.ggml"):
        tokenizer_from_gguf({})
