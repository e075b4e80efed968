"""What holds for tokenizers of every kind, against the libraries and against first principles."""

# ruff: noqa: RUF001
from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import small_tokenizers as small
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from kuiperllm.errors import TokenizerError
from kuiperllm.text import Tokenizer, load_tokenizer

# --- both kinds -------------------------------------------------------------------------------------------


def test_kinds_are_recognised(small_tokenizers: dict[str, Tokenizer]) -> None:
    assert [tokenizer.kind for tokenizer in small_tokenizers.values()] == list(small_tokenizers)


def test_ids_out_of_range_are_refused(any_tokenizer: Tokenizer) -> None:
    size = any_tokenizer.vocab_size
    for token_id in (-1, size, 1 << 40):
        for use in (any_tokenizer.token_bytes, any_tokenizer.is_special, lambda i: any_tokenizer.decode([i])):
            with pytest.raises(TokenizerError, match=rf"{token_id} is outside the vocabulary of {size}"):
                use(token_id)
    assert any_tokenizer.decode(range(size)) is not None


def test_lone_surrogates_are_refused(any_tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"lone surrogate U\+D800 at 2"):
        any_tokenizer.encode("ab\ud800")


def test_special_tokens_are_text_unless_asked_for(any_tokenizer: Tokenizer) -> None:
    for name, token_id in any_tokenizer.special_tokens.items():
        text = f"a{name}b"
        ids = any_tokenizer.encode(text, add_special_tokens=False)
        assert not any(any_tokenizer.is_special(i) for i in ids)
        assert any_tokenizer.decode(ids) == text
        parsed = any_tokenizer.encode(text, add_special_tokens=False, parse_special=True)
        assert [i for i in parsed if any_tokenizer.is_special(i)] == [token_id]
        assert name not in any_tokenizer.decode(parsed)
        assert name in any_tokenizer.decode(parsed, skip_special_tokens=False)
        assert any_tokenizer.token_bytes(token_id) == name.encode()


def test_parsing_specials_gives_the_ids_of_the_parts(any_tokenizer: Tokenizer) -> None:
    name, token_id = next(iter(any_tokenizer.special_tokens.items()))

    def plain(text: str) -> list[int]:
        return any_tokenizer.encode(text, add_special_tokens=False)

    parsed = any_tokenizer.encode(f"{name}Once{name}{name}upon", add_special_tokens=False, parse_special=True)
    assert parsed == [token_id, *plain("Once"), token_id, token_id, *plain("upon")]


def test_the_beginning_token_comes_first_once(any_tokenizer: Tokenizer) -> None:
    for text in ("", "Once upon"):
        with_bos, without = any_tokenizer.encode(text), any_tokenizer.encode(text, add_special_tokens=False)
        expected = [any_tokenizer.bos_token_id] if any_tokenizer.add_bos else []
        assert with_bos == expected + without
    assert any_tokenizer.encode("", add_special_tokens=False) == []


def test_long_texts_take_time_in_proportion(any_tokenizer: Tokenizer) -> None:
    for text in ("a" * 200_000, " " * 200_000 + "x", "ab " * 70_000, "🙂" * 50_000):
        assert any_tokenizer.decode(any_tokenizer.encode(text)) == text


# --- byte-level BPE ---------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60) | st.text("a b'\n1é🙂", max_size=60))
def test_byte_level_round_trip(small_tokenizers: dict[str, Tokenizer], text: str) -> None:
    for kind in ("tokenizer.json", "vocab.json + merges.txt", "tiktoken", "gguf bpe"):
        tokenizer = small_tokenizers[kind]
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_gpt2_files_agree_with_the_library(small_tokenizers: dict[str, Tokenizer]) -> None:
    native = tokenizers.Tokenizer.from_str(small.byte_level_json())
    for text in small.TEXTS:
        expected = native.encode(text, add_special_tokens=False).ids
        for kind in ("tokenizer.json", "vocab.json + merges.txt", "gguf bpe"):
            assert small_tokenizers[kind].encode(text, parse_special=True) == expected, (kind, text)
            assert small_tokenizers[kind].decode(expected) == native.decode(expected)


def merge_by_hand(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding as it is defined: join the neighbours of lowest rank, leftmost first."""
    parts = [bytes([byte]) for byte in word]
    while True:
        joins = [(ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, i = min(joins, default=(1 << 30, 0))
        if rank == 1 << 30:
            return [ranks[part] for part in parts]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


# The published patterns, written out.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_families_cut_words_by_their_pattern(family: str, tmp_path: Path) -> None:
    ranks = small.ranks()
    if family == "llama3":
        tokenizer = load_tokenizer(small.write_tiktoken(tmp_path / "any.name"))
    else:
        tokenizer = load_tokenizer(small.write_vocab_and_merges(tmp_path, tokenizer_class="Qwen2Tokenizer"))
    pattern = tokenizers.Regex(LLAMA3 if family == "llama3" else QWEN2)
    split = pre_tokenizers.Split(pattern, "isolated")
    for text in small.TEXTS:
        if family == "qwen2":
            text = tokenizers.normalizers.NFC().normalize_str(text)
        words = [word.encode() for word, _ in split.pre_tokenize_str(text)]
        expected = [
            i for word in words for i in ([ranks[word]] if word in ranks else merge_by_hand(word, ranks))
        ]
        actual = [i for i in tokenizer.encode(text, add_special_tokens=False) if not tokenizer.is_special(i)]
        if "<think>" not in text:
            assert actual == expected, text


def test_llama3_takes_whole_words_from_the_vocabulary(tmp_path: Path) -> None:
    """`ignore_merges`: a token that no merges lead to is still used for a word that equals it."""
    lines = small.tiktoken_bytes() + b"IHp5eHd2 %d\n" % len(small.ranks())  # " zyxwv"
    (tmp_path / "tokenizer.model").write_bytes(lines)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(" zyxwv", add_special_tokens=False) == [len(small.ranks())]


def test_meta_special_tokens(small_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, first = small_tokenizers["tiktoken"], len(small.ranks())
    assert tokenizer.vocab_size == first + 256
    ids = {name: token_id - first for name, token_id in tokenizer.special_tokens.items()}
    assert len(ids) == 256
    assert ids["<|begin_of_text|>"] == 0
    assert ids["<|end_of_text|>"] == 1
    assert ids["<|start_header_id|>"] == 6
    assert ids["<|end_header_id|>"] == 7
    assert ids["<|eom_id|>"] == 8
    assert ids["<|eot_id|>"] == 9
    assert ids["<|reserved_special_token_245|>"] == 255
    assert tokenizer.bos_token_id == first
    assert set(tokenizer.eos_token_ids) == {first + 1, first + 8, first + 9}


def test_added_tokens_that_are_not_special_are_always_parsed(small_tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("tokenizer.json", "vocab.json + merges.txt", "gguf bpe"):
        tokenizer = small_tokenizers[kind]
        think = tokenizer.vocab_size - 1
        assert think in tokenizer.encode("a<think>b")
        assert not tokenizer.is_special(think)
        assert tokenizer.decode([think]) == "<think>"


@pytest.mark.parametrize("version_line", [True, False])
def test_the_version_line_of_merges_is_optional(version_line: bool, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(small.write_vocab_and_merges(tmp_path, version_line=version_line))
    native = tokenizers.Tokenizer.from_str(small.byte_level_json())
    assert tokenizer.encode(small.LINES[0]) == native.encode(small.LINES[0]).ids


def test_what_the_config_beside_the_file_says(tmp_path: Path) -> None:
    small.write_vocab_and_merges(tmp_path, bos_token={"content": "<|im_start|>"}, add_bos_token=True)
    tokenizer = load_tokenizer(tmp_path)
    first = len(small.ranks())
    assert tokenizer.bos_token_id == first + 1
    assert tokenizer.eos_token_ids == (first + 2,)
    assert tokenizer.encode("a")[0] == first + 1
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    (tmp_path / "chat_template.jinja").write_text("from a file")
    assert load_tokenizer(tmp_path).chat_template == "from a file"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert load_tokenizer(tmp_path / "vocab.json", config_dir=elsewhere).special_tokens == {}


def test_the_template_of_tokenizer_json_tells_the_beginning_token(tmp_path: Path) -> None:
    raw = json.loads(small.byte_level_json())
    raw["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {
                    "<|im_start|>": {
                        "id": "<|im_start|>",
                        "ids": [len(small.ranks()) + 1],
                        "tokens": ["<|im_start|>"],
                    }
                },
            },
        ],
    }
    raw["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    raw["model"]["dropout"] = 0.5
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw))
    native = tokenizers.Tokenizer.from_str(small.byte_level_json())
    expected = [len(small.ranks()) + 1, *native.encode(small.LINES[0]).ids]
    assert load_tokenizer(path).encode(small.LINES[0]) == expected
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert load_tokenizer(path).encode(small.LINES[0]) == expected[1:]


# --- SentencePiece ----------------------------------------------------------------------------------------


def test_sentencepiece_agrees_with_the_library(spm: Tokenizer) -> None:
    native = small.spm_processor(small.spm_model())
    for text in small.TEXTS:
        ids = native.encode(text)
        assert spm.encode(text) == [1, *ids]
        assert spm.decode(ids) == native.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40) | st.text(" a\u2581b\n1é🙂<>0x", max_size=40))
def test_sentencepiece_encodes_any_text_like_the_library(
    small_tokenizers: dict[str, Tokenizer], text: str
) -> None:
    expected = small.spm_processor(small.spm_model()).encode(text)
    for kind in ("sentencepiece", "llama2.c", "gguf spm"):
        tokenizer = small_tokenizers[kind]
        assert tokenizer.encode(text, add_special_tokens=False) == expected
        assert tokenizer.decode(expected) == text.replace("\u2581", " ")


def test_unigram_and_normalization_rules_agree_with_the_library(tmp_path: Path) -> None:
    data = small.spm_model("unigram", "nmt_nfkc")
    (tmp_path / "tokenizer.model").write_bytes(data)
    tokenizer, native = load_tokenizer(tmp_path), small.spm_processor(data)
    for text in [*small.TEXTS, "ﬁ ①② ｆｕｌｌ   spaces  "]:
        assert tokenizer.encode(text) == [1, *native.encode(text)]


def test_llama2c_names_the_special_tokens_plainly(small_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = small_tokenizers["llama2.c"]
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.encode("") == [1]


def test_only_two_hex_digits_make_a_byte_token(tmp_path: Path) -> None:
    odd = ["<0x-1>", "<0x+1>", "<0x1>", "<0x123>", "<0xGG>", "<0x 1>", "<0x\u0661\u0661>"]
    data = small.llama2c_bytes()
    for text in odd:
        data += b"\0\0\x80\xc7" + len(text.encode()).to_bytes(4, "little") + text.encode()
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(data)
    tokenizer = load_tokenizer(path)
    first = tokenizer.vocab_size - len(odd)
    assert [tokenizer.token_bytes(first + i).decode() for i in range(len(odd))] == odd
    assert tokenizer.token_bytes(3) == b"\0"
    assert tokenizer.token_bytes(258) == b"\xff"
    assert tokenizer.decode(tokenizer.encode("ʘ <0x-1>")) == "ʘ <0x-1>"


def test_one_blank_is_dropped_from_the_front(spm: Tokenizer) -> None:
    blank = spm.encode("  x", add_special_tokens=False)
    assert spm.decode(blank) == "  x"
    word = spm.encode("x", add_special_tokens=False)
    assert b"".join(map(spm.token_bytes, word)) == b" x"
    assert spm.decode([1, *word]) == spm.decode(word) == "x"
    assert spm.decode([*word, *word]) == "x x"


def test_added_tokens_extend_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(small.spm_model())
    size = len(small.spm_entries())
    added = {
        "1": {"content": "<s>", "special": True},
        str(size): {"content": "<pad>", "special": True},
        str(size + 1): {"content": "[user]", "special": False},
    }
    config = {"added_tokens_decoder": added, "eos_token": "<pad>", "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.eos_token_ids == (size,)
    assert tokenizer.encode("a<pad>", parse_special=True)[-1] == size
    assert size not in tokenizer.encode("a<pad>")
    assert size + 1 in tokenizer.encode("a[user]b")
    assert tokenizer.decode(tokenizer.encode("a[user]b")) == "a[user]b"
