"""Tokenizers written in the form of other files, and read back by this and by other packages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import small_tokenizers as small
import tokenizers

from kuiperllm.errors import UnsupportedError
from kuiperllm.text import Tokenizer, load_tokenizer, tokenizer_from_gguf
from kuiperllm.text.writing import gguf_tokenizer, llama2c_tokenizer, tokenizer_files

TEXTS = [text for text in small.TEXTS if "\0" not in text]


def assert_same(found: Tokenizer, expected: Tokenizer, *, special: bool = True) -> None:
    assert [found.encode(text) for text in TEXTS] == [expected.encode(text) for text in TEXTS]
    ids = range(expected.vocab_size)
    assert [found.token_bytes(i) for i in ids] == [expected.token_bytes(i) for i in ids]
    assert found.bos_token_id == expected.bos_token_id
    assert found.eos_token_ids[:1] == expected.eos_token_ids[:1]
    assert found.strips_leading_space == expected.strips_leading_space
    assert found.chat_template == expected.chat_template
    if special:
        marked = [f"<s>{name} x {name}" for name in expected.special_tokens]
        assert [found.encode(t, parse_special=True) for t in marked] == [
            expected.encode(t, parse_special=True) for t in marked
        ]


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_files_of_every_kind(small_tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    for number, tokenizer in enumerate(small_tokenizers.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert_same(load_tokenizer(written(folder, tokenizer_files(tokenizer))), tokenizer)


def test_files_are_what_other_packages_read(small_tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = small_tokenizers["gguf bpe"]
    native = tokenizers.Tokenizer.from_str(tokenizer_files(tokenizer)["tokenizer.json"].decode())
    for text in TEXTS[:7]:
        assert native.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    tokenizer = small_tokenizers["gguf spm"]
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(tokenizer_files(tokenizer)["tokenizer.model"])
    assert (processor.bos_id(), processor.eos_id(), processor.unk_id()) == (1, 2, 0)
    for text in TEXTS[:7]:
        assert [1, *processor.encode(text)] == tokenizer.encode(text)


def test_tokenizer_json_puts_the_beginning_token_in_front() -> None:
    metadata = small.gguf_bpe_metadata("llama-bpe") | {"tokenizer.ggml.bos_token_id": 420}
    tokenizer = tokenizer_from_gguf(metadata)
    native = tokenizers.Tokenizer.from_str(tokenizer_files(tokenizer)["tokenizer.json"].decode())
    assert native.encode("Once upon").ids == tokenizer.encode("Once upon")
    assert native.encode("Once upon").ids[0] == 420


def test_gguf_of_every_kind(small_tokenizers: dict[str, Tokenizer]) -> None:
    for kind, tokenizer in small_tokenizers.items():
        rows = tokenizer.vocab_size + 3
        metadata = gguf_tokenizer(tokenizer, rows)
        found = tokenizer_from_gguf(metadata)
        assert found.vocab_size == rows == len(metadata["tokenizer.ggml.token_type"]), kind
        assert_same(found, tokenizer)


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-2"])
def test_gguf_names_the_way_that_words_are_cut(pre: str) -> None:
    tokenizer = tokenizer_from_gguf(small.gguf_bpe_metadata(pre))
    assert gguf_tokenizer(tokenizer, 500)["tokenizer.ggml.pre"] == pre


def test_gguf_refuses_what_it_has_no_name_for(tmp_path: Path) -> None:
    definition = json.loads(small.byte_level_json())
    definition["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(UnsupportedError, match="cuts a text into words in a way"):
        gguf_tokenizer(load_tokenizer(tmp_path), 500)
    (tmp_path / "unigram.model").write_bytes(small.spm_model("unigram"))
    with pytest.raises(UnsupportedError, match="is a unigram model"):
        gguf_tokenizer(load_tokenizer(tmp_path / "unigram.model"), 500)
    (tmp_path / "nfkc.model").write_bytes(small.spm_model("bpe", "nmt_nfkc"))
    with pytest.raises(UnsupportedError, match="normalizes its text"):
        gguf_tokenizer(load_tokenizer(tmp_path / "nfkc.model"), 500)


def test_gguf_refuses_more_tokens_than_rows(small_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = small_tokenizers["gguf bpe"]
    with pytest.raises(UnsupportedError, match="tokens and the embedding 100 rows"):
        gguf_tokenizer(tokenizer, 100)


def test_llama2c_reads_back(small_tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = small_tokenizers["gguf spm"]
    for rows in (tokenizer.vocab_size, tokenizer.vocab_size + 2):
        data = llama2c_tokenizer(tokenizer, rows)
        assert data is not None
        (tmp_path / "tokenizer.bin").write_bytes(data)
        found = load_tokenizer(tmp_path / "tokenizer.bin")
        assert found.vocab_size == rows
        assert_same(found, tokenizer, special=False)


def test_llama2c_has_no_place_for_other_kinds(small_tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    assert llama2c_tokenizer(small_tokenizers["gguf bpe"], 500) is None
    assert llama2c_tokenizer(small_tokenizers["gguf spm"], 100) is None
    (tmp_path / "unigram.model").write_bytes(small.spm_model("unigram"))
    assert llama2c_tokenizer(load_tokenizer(tmp_path / "unigram.model"), 500) is None


def test_merges_that_no_scores_express_are_refused(tmp_path: Path) -> None:
    """Between two ways to make `abc` stands a merge of another token."""
    vocab = ["<unk>", "a", "b", "c", "ab", "bc", "abc", "cc"]
    definition = {
        "version": "1.0",
        "added_tokens": [],
        "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"},
        "model": {
            "type": "BPE",
            "vocab": {text: i for i, text in enumerate(vocab)},
            "merges": [["a", "b"], ["b", "c"], ["ab", "c"], ["c", "c"], ["a", "bc"]],
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(UnsupportedError, match="in an order that no scores can express"):
        gguf_tokenizer(load_tokenizer(tmp_path), 20)


@pytest.mark.shared
def test_real_files(shared: Path) -> None:
    """llama2.c's own exporter made the .bin files from the .model files."""
    llama2, stories = shared / "tokenizers" / "llama2", shared / "models" / "stories260K"
    for model, binary, rows in (
        (llama2 / "tokenizer.model", llama2 / "tokenizer.bin", 32000),
        (stories / "tok512.model", stories / "tok512.bin", 512),
        (stories / "tok512.bin", stories / "tok512.bin", 512),
    ):
        assert llama2c_tokenizer(load_tokenizer(model), rows) == binary.read_bytes()
    from_json = tokenizer_from_gguf(gguf_tokenizer(load_tokenizer(llama2 / "tokenizer.json"), 32000))
    for text in TEXTS:
        assert from_json.encode(text) == load_tokenizer(llama2 / "tokenizer.model").encode(text)
