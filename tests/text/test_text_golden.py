"""Real tokenizers and chat templates against vectors made by other programs."""

from __future__ import annotations

import json
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from kuiperllm.text import ChatTemplate, Tokenizer, chat_template, load_tokenizer, tokenizer_from_gguf

pytestmark = pytest.mark.shared


def vectors(shared: Path, name: str) -> list[tuple[str, list[int]]]:
    """Texts and ids of llama.cpp's tokenizer tests; the last text is empty."""
    base = shared / "golden" / "llama_cpp_vocab" / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{base}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{base}.out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines, strict=True)]


def gguf_metadata(path: Path) -> dict[str, Any]:
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(str(path)).fields
    return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}


def folder_of(target: Path, *files: Path, **renamed: Path) -> Path:
    for file in files:
        shutil.copy(file, target)
    for name, file in renamed.items():
        shutil.copy(file, target / f"{name}.json")
    return target


def load(shared: Path, form: str, tmp_path: Path) -> Tokenizer:
    folder = shared / "tokenizers"
    match form:
        case "llama3 vocab":
            files = [folder / "llama3" / name for name in ("vocab.json", "merges.txt")]
            config = folder / "llama3" / "llama3.2-instruct.tokenizer_config.json"
            return load_tokenizer(folder_of(tmp_path, *files, tokenizer_config=config))
        case "spm gguf" | "gpt-2 gguf":
            name = "llama-spm" if form == "spm gguf" else "gpt-2"
            vocabulary = shared / "golden" / "llama_cpp_vocab" / f"ggml-vocab-{name}.gguf"
            return tokenizer_from_gguf(gguf_metadata(vocabulary))
        case _:
            return load_tokenizer(folder / form)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("llama-spm", "llama2/tokenizer.model"),
        ("llama-spm", "llama2/tokenizer.json"),
        ("llama-spm", "llama2/tokenizer.bin"),
        ("llama-spm", "spm gguf"),
        ("llama-bpe", "llama3/tokenizer.model"),
        ("llama-bpe", "llama3 vocab"),
        ("gpt-2", "gpt-2 gguf"),
    ],
)
def test_llama_cpp_vectors(name: str, form: str, shared: Path, tmp_path: Path) -> None:
    tokenizer = load(shared, form, tmp_path)
    for text, ids in vectors(shared, name):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json", "tokenizer.bin"])
def test_llama2c_cases(file: str, shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / "llama2" / file)
    for case in json.loads((shared / "golden" / "llama2_tokenizer_cases.json").read_text()):
        assert tokenizer.encode(case["prompt"]) == case["tokens"]


def test_the_stories_tokenizers_agree(shared: Path) -> None:
    folder = shared / "models" / "stories260K"
    from_bin = load_tokenizer(folder / "tok512.bin")
    others = [
        load_tokenizer(folder / "tok512.model"),
        tokenizer_from_gguf(gguf_metadata(folder / "stories260Ktok512.gguf")),
    ]
    text = (shared / "corpora" / "tinystories_sample.txt").read_text()
    text = " ".join(text.split())  # the .model asks for single blanks, llama2.c does not look
    ids = from_bin.encode(text)
    assert from_bin.decode(ids) == text
    for other in others:
        assert other.encode(text) == ids
        assert (other.bos_token_id, other.eos_token_ids, other.vocab_size) == (1, (2,), 512)


@pytest.mark.parametrize("form", ["llama3/tokenizer.model", "llama3 vocab"])
def test_llama3_special_tokens_and_loading_time(form: str, shared: Path, tmp_path: Path) -> None:
    start = time.process_time()
    tokenizer = load(shared, form, tmp_path)
    assert time.process_time() - start < 3.0
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    assert [tokenizer.special_tokens[name] for name in names] == [128000, 128001, 128006, 128007, 128009]
    assert tokenizer.vocab_size == 128256
    assert tokenizer.encode("a<|eot_id|>", parse_special=True) == [128000, 64, 128009]
    assert 128009 not in tokenizer.encode("a<|eot_id|>")


QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("version", "added", "size"),
    [("qwen2", 3, 151646), ("qwen2.5-instruct", 22, 151665), ("qwen3", 26, 151669)],
)
def test_qwen_agrees_with_a_pipeline_built_by_hand(
    version: str, added: int, size: int, shared: Path, tmp_path: Path
) -> None:
    folder = shared / "tokenizers" / "qwen"
    config = folder / f"{version}.tokenizer_config.json"
    files = [folder / "vocab.json", folder / "merges.txt"]
    tokenizer = load_tokenizer(folder_of(tmp_path, *files, tokenizer_config=config))
    native = tokenizers.Tokenizer(models.BPE.from_file(str(files[0]), str(files[1])))
    native.normalizer = normalizers.NFC()
    native.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    native.decoder = decoders.ByteLevel()
    texts = [text for text, _ in vectors(shared, "llama-bpe")] + [
        "e\u0301 1234 'RE",
        "今日は  良い\r\n\r\n天気 ",
    ]
    texts += (shared / "corpora" / "tinyshakespeare.txt").read_text()[:20000].split("\n\n")
    for text in texts:
        ids = native.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == native.decode(ids)
    listed = json.loads(config.read_text())["added_tokens_decoder"]
    assert (tokenizer.vocab_size, len(listed)) == (size, added)
    for token_id, token in listed.items():
        parsed = tokenizer.encode("a" + token["content"] + "b", parse_special=True)
        assert parsed == [64, int(token_id), 65]
        assert tokenizer.is_special(int(token_id)) is token["special"]
    assert tokenizer.eos_token_ids == (151645,)
    assert tokenizer.bos_token_id is None


def chat_cases(shared: Path) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads((shared / "golden/chat_templates_hf_jinja.json").read_text())[
        "cases"
    ]
    assert len(cases) == 53
    return cases


def test_chat_templates(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2025, 7, 10, 12)

    monkeypatch.setattr(chat_template, "datetime", Clock)
    failed = []
    for case in chat_cases(shared):
        data = dict(case["data"])
        tokens = {name: data.pop(name, "") for name in ("bos_token", "eos_token")}
        # Where a case leaves it open, the template's own default is what is expected.
        default = "add_generation_prompt is not defined" in case["chat_template"]
        data.setdefault("add_generation_prompt", default)
        text = ChatTemplate(case["chat_template"], **tokens).render(data.pop("messages"), **data)
        if text != case["expected"]:
            failed.append(case["name"])
    assert failed == [case["name"] for case in chat_cases(shared) if not case["python_jinja2_matches"]]
    assert len(failed) == 1


def test_collected_templates_compile(shared: Path) -> None:
    for path in sorted((shared / "chat_templates").glob("*.jinja")):
        messages = [{"role": "user", "content": "What is 2 + 2?"}]
        text = ChatTemplate(path.read_text(), bos_token="<s>", where=path.name).render(messages, tools=[])
        assert "What is 2 + 2?" in text
