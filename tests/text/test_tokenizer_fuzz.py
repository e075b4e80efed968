"""Damaged files of every kind: a tokenizer or a KuiperError, quickly, and nothing else."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import small_tokenizers as small
from hypothesis import given, settings
from hypothesis import strategies as st

from kuiperllm.errors import KuiperError
from kuiperllm.text import Tokenizer, load_tokenizer, tokenizer_from_gguf

FUZZ = settings(max_examples=60, deadline=None)
SECONDS = 3.0

EDGES = [b"", b"\0", b"\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"9" * 30]
EDGES += [b'"', b"{", b"[" * 50, b" ", b"\n", b"-1", b"<0x-1>", b"\xc3", b"e999", b"\x0a\x80"]


@st.composite
def damage(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes with up to four cuts, replacements and insertions."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([0, 0, 1, 1, 2, 4, 8, 100, 10**6]))
        patch = draw(st.one_of(st.sampled_from(EDGES), st.binary(max_size=8)))
        data = data[:start] + patch + data[start + length :]
    return data


def use(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Once upon a été 🙂 123 <s><|im_end|>", parse_special=True)
    tokenizer.decode(ids)
    tokenizer.decode(range(0, tokenizer.vocab_size, max(1, tokenizer.vocab_size // 500)))


def survives(load: Any) -> None:
    start = time.monotonic()
    message = "none"
    try:
        use(load())
    except KuiperError as error:
        message = str(error)
    assert message
    assert "\n" not in message
    assert time.monotonic() - start < SECONDS


def file_survives(name: str, data: bytes, **others: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for other, content in others.items():
            (Path(folder) / other.replace("__", ".")).write_bytes(content)
        path = Path(folder) / name
        path.write_bytes(data)
        survives(lambda: load_tokenizer(path))


@FUZZ
@given(st.data())
def test_sentencepiece_files(data: st.DataObject) -> None:
    file_survives("tokenizer.model", data.draw(damage(small.spm_model())))


@FUZZ
@given(st.data())
def test_sentencepiece_files_with_normalization_rules(data: st.DataObject) -> None:
    model = small.spm_model("unigram", "nmt_nfkc")
    rules = model.index(b"nmt_nfkc") + 8
    # The rules make up most of the file; half of the examples damage what comes before them.
    if data.draw(st.booleans()):
        damaged = data.draw(damage(model[:rules])) + model[rules:]
    else:
        damaged = model[:rules] + data.draw(damage(model[rules:]))
    file_survives("tokenizer.model", damaged)


@FUZZ
@given(st.data())
def test_llama2c_files(data: st.DataObject) -> None:
    file_survives("tokenizer.bin", data.draw(damage(small.llama2c_bytes())))


@FUZZ
@given(st.data())
def test_tiktoken_files(data: st.DataObject) -> None:
    file_survives("tokenizer.model", data.draw(damage(small.tiktoken_bytes())))


@FUZZ
@given(st.data())
def test_tokenizer_json_files(data: st.DataObject) -> None:
    file_survives("tokenizer.json", data.draw(damage(small.byte_level_json().encode())))


@FUZZ
@given(st.data(), st.sampled_from(["vocab.json", "merges.txt", "tokenizer_config.json"]))
def test_vocab_and_merges_files(data: st.DataObject, victim: str) -> None:
    vocab, merges = small.byte_level_parts()
    files = {
        "vocab.json": json.dumps(vocab).encode(),
        "merges.txt": "\n".join(map(" ".join, merges)).encode(),
        "tokenizer_config.json": json.dumps(small.tokenizer_config()).encode(),
    }
    files[victim] = data.draw(damage(files[victim]))
    vocab_file = files.pop("vocab.json")
    file_survives(
        "vocab.json", vocab_file, **{name.replace(".", "__"): content for name, content in files.items()}
    )


# --- values of the wrong shape ----------------------------------------------------------------------------

ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 7, 2**31, 2**32 - 1, 2**63, 10**30, 1e300, float("nan"), -0.5]),
    st.sampled_from(["", " ", "a", "a b", "\u2581", "\0", "Ġ", "<0x-1>", "BPE", "Unigram", "ByteLevel", "é"]),
    st.sampled_from([[], {}, [1], ["a"], [["a", "b"]], {"a": 1}, {"type": "BPE"}, {"type": "Sequence"}]),
    st.text(max_size=3),
)


def containers(value: Any) -> list[Any]:
    """All lists and objects inside a JSON value; of long ones only the first entries are looked into."""
    found = [value] if isinstance(value, dict | list) and value else []
    children = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    for child in children[:8]:
        found += containers(child)
    return found


@st.composite
def reshaped(draw: st.DrawFn, value: Any) -> Any:
    """A copy of a JSON value with up to three entries replaced, deleted or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = containers(value)
        if not places:
            break
        place = draw(st.sampled_from(range(len(places))).map(places.__getitem__))
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        odd = copy.deepcopy(draw(ODD_VALUES))
        match draw(st.sampled_from(["replace", "replace", "delete", "add"])):
            case "replace":
                place[key] = odd
            case "delete":
                del place[key]
            case _ if isinstance(place, dict):
                place[draw(st.text(max_size=3))] = odd
            case _:
                place.append(odd)
    return value


def rich_json() -> dict[str, Any]:
    """A tokenizer.json that uses every section."""
    raw: dict[str, Any] = json.loads(small.byte_level_json())
    raw["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    raw["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\s+|\\S+"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [0], "tokens": ["<|im_start|>"]}},
    }
    return raw


@FUZZ
@given(st.data())
def test_tokenizer_json_of_the_wrong_shape(data: st.DataObject) -> None:
    raw = rich_json()
    sections = [key for key in raw if key != "version"]
    section = data.draw(st.sampled_from(sections))
    raw[section] = data.draw(reshaped({"it": raw[section]})).get("it")
    file_survives("tokenizer.json", json.dumps(raw).encode())


@FUZZ
@given(st.data())
def test_tokenizer_config_of_the_wrong_shape(data: st.DataObject) -> None:
    config = data.draw(reshaped(small.tokenizer_config(add_bos_token=True)))
    files = {"tokenizer_config__json": json.dumps(config).encode()}
    file_survives("tokenizer.json", small.byte_level_json().encode(), **files)
    file_survives("tokenizer.model", small.spm_model(), **files)


@FUZZ
@given(st.data(), st.booleans())
def test_gguf_metadata_of_the_wrong_shape(data: st.DataObject, byte_level: bool) -> None:
    metadata = small.gguf_bpe_metadata() if byte_level else small.gguf_spm_metadata()
    metadata = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in metadata.items()}
    metadata = data.draw(reshaped(metadata))
    survives(lambda: tokenizer_from_gguf(metadata))
