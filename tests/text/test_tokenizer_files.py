"""Finding tokenizer files, and what is said about bad ones."""

from __future__ import annotations

import base64
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import small_tokenizers as small

from kuiperllm.errors import TokenizerError
from kuiperllm.text import load_tokenizer

ADDED = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized", "special"], False) | {"content": "zz"}


def refused(path: Path, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(path)
    assert str(path.parent) in str(caught.value)
    assert "\n" not in str(caught.value)


def bad_file(folder: Path, data: bytes, message: str) -> None:
    path = folder / "some.file"
    path.write_bytes(data)
    refused(path, message)


def test_missing_files(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no such file")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", r"no tokenizer there; looked for tokenizer\.json")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    refused(tmp_path / "vocab.json", "no merges.txt beside it")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    refused(tmp_path / "tokenizer_config.json", "give its folder")


def test_odd_files(tmp_path: Path) -> None:
    bad_file(tmp_path, b"", "the file is empty")
    bad_file(tmp_path, b"GGUF\x03\0\0\0" + bytes(40), "GGUF file is read with the model")
    bad_file(tmp_path, bytes(1000), "not a tokenizer of a known kind")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "not a regular file")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    refused(tmp_path / "huge", "too large for a tokenizer file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": {', "not valid JSON"),
        ('{"model": ' + "[" * 100_000, "not valid JSON"),
        ('{"model": []}', "no model section"),
        ('{"model": {"type": "WordPiece"}}', "'WordPiece' is not supported; supported: BPE"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}}}', "no list of merges"),
        ('{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "impossible id -1"),
        (
            '{"model": {"type": "BPE", "vocab": {"a": 99999999999}, "merges": []}}',
            "impossible id 99999999999",
        ),
        ('{"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}', "two tokens share one id"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "decoder null is not supported"),
    ],
)
def test_bad_tokenizer_json(text: str, message: str, tmp_path: Path) -> None:
    bad_file(tmp_path, text.encode(), message)


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}, "WordPiece.* is not supported"),
        ("decoder", {"type": "Sequence", "decoders": []}, "decoder section is missing or malformed"),
        ("decoder", {"type": "Fuse"}, "does not say what stands for a blank"),
        ("added_tokens", {"a": 1}, "added_tokens must be a list"),
        ("added_tokens", [ADDED | {"id": 9}], "added token 'zz' has id 9, but 420 follows"),
        ("added_tokens", [{"id": 1 << 40, "content": "zz"}], "impossible id 1099511627776"),
        ("added_tokens", [{"id": 420}], "added token 420 has no content"),
        ("added_tokens", [7], "has no content"),
        ("pre_tokenizer", {"type": "Nonsense"}, r"some\.file: "),
    ],
)
def test_bad_sections(section: str, value: Any, message: str, tmp_path: Path) -> None:
    raw = json.loads(small.byte_level_json())
    raw[section] = value
    bad_file(tmp_path, json.dumps(raw).encode(), message)


@pytest.mark.parametrize("merges", [["a b c"], ["zzz qqq"], [["a"]], [1], {"a": 1}])
def test_absurd_merges(merges: Any, tmp_path: Path) -> None:
    raw = json.loads(small.byte_level_json())
    raw["model"]["merges"] = merges
    bad_file(tmp_path, json.dumps(raw).encode(), r"some\.file: ")


def test_a_pattern_that_backtracks_without_end_is_an_error(tmp_path: Path) -> None:
    raw = json.loads(small.byte_level_json())
    pattern = {"Regex": "(a+)+$"}
    raw["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"cannot encode the text: .*retry-limit"):
        tokenizer.encode("a" * 40 + "b")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("merges.txt", "#version: 0.2\na b\nab", "merges.txt: line 3 is not a merge of two tokens: 'ab'"),
        ("merges.txt", "a b\n#version: 0.2 x", "line 2 is not a merge"),
        ("merges.txt", "qqqq zzzz", "merges.txt: .*out of vocabulary"),
        ("vocab.json", '{"a": "b"}', "vocab.json: token 'a' has the impossible id 'b'"),
        ("vocab.json", "{}", "vocabulary must be a JSON object"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: must hold a JSON object, not a list"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token must be a token's text"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "add_bos_token must be a bool"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template must be"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"9999": {"content": "<x>"}}}',
            "added token '<x>' has id 9999, but 420 follows",
        ),
        ("special_tokens_map.json", "{", "special_tokens_map.json: not valid JSON"),
    ],
)
def test_bad_vocab_and_merges(name: str, text: str, message: str, tmp_path: Path) -> None:
    small.write_vocab_and_merges(tmp_path)
    (tmp_path / name).write_text(text)
    refused(tmp_path / "vocab.json", message)


def test_bad_tiktoken_files(tmp_path: Path) -> None:
    good = small.tiktoken_bytes()
    bad_file(tmp_path, good + b"!!!! 420\n", "line 421 is not a token in base64 and its rank")
    bad_file(tmp_path, good + b"IA== x\n", "line 421 is not a token")
    bad_file(tmp_path, good + b"enp6eno= 500\n", "the ranks are not 0 to 420, each once")
    bad_file(tmp_path, good + b"enp6eno= 3\n", "the ranks are not")
    bad_file(tmp_path, good + b"IQ== 420\n", "two ranks share one token")
    bad_file(tmp_path, good + base64.b64encode(b"a" * 300) + b" 420\n", "has 300 bytes")
    bad_file(tmp_path, b"IQ== 0\nIg== 1\n", r"byte 0x00 has no token \(254 are missing\)")


def test_bad_llama2c_files(tmp_path: Path) -> None:
    good = small.llama2c_bytes()
    bad_file(tmp_path, good[:-1], "claims .* bytes, .* are left")
    bad_file(tmp_path, good + b"\0\0\0", "truncated in the header of token")
    for length in (-1, 1 << 30, 0x7FFFFFFF):
        bad_file(tmp_path, good + struct.pack("<fi", 0.0, length), f"claims {length} bytes, 0 are left")
    bad_file(tmp_path, good + struct.pack("<fi", 0.0, 1) + b"\xff", "is not UTF-8")
    bad_file(tmp_path, good + struct.pack("<fi", float("nan"), 1) + b"\x01", "has the score nan")
    bad_file(tmp_path, good + struct.pack("<fi", 0.0, 1) + b"a", "are the same: 'a'")
    bad_file(tmp_path, good[:17], "1 tokens are too few")


def test_bad_sentencepiece_files(tmp_path: Path) -> None:
    good = small.spm_model()
    bad_file(tmp_path, good[:-3], "truncated")
    bad_file(
        tmp_path, good + b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "bytes promised at byte .*, 0 left"
    )
    bad_file(tmp_path, good + b"\x0a" + b"\x80" * 30, "truncated or corrupt number")
    bad_file(tmp_path, good + b"\x0a\x03\x0a\x01a", "are the same: 'a'")
    bad_file(tmp_path, good + b"\x0a\x02\x18\x09", "has the unknown type 9")
    bad_file(tmp_path, good + b"\x0a\x03\x0a\x01\xff", "is not UTF-8")
    bad_file(tmp_path, good + b"\x12\x02\x18\x04", "model type 4 is not supported")
    bad_file(tmp_path, b"\x0a\x05\x0a\x03abc", "no unknown token|model type")


def test_normalization_rules_that_leave_their_table(tmp_path: Path) -> None:
    good = small.spm_model("unigram", "nmt_nfkc")
    rules = good.index(b"nmt_nfkc") + 8
    start = good.index(b"\x12", rules) + 4  # tag and a length of three bytes
    assert 0 < int.from_bytes(good[start : start + 4], "little") < len(good)
    for offset, patch in (
        (4, b"\xff\xff\xff\x7f"),
        (4, b"\xff\xff\xff\xff"),
        (0, b"\xff\xff\xff\x7f"),
        (0, bytes(4)),
    ):
        damaged = good[: start + offset] + patch + good[start + offset + 4 :]
        bad_file(tmp_path, damaged, "normalization rules are corrupt")
