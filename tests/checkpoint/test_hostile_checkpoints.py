"""Corrupt and hostile files: one clear error each, soon, and with little memory.

All files are opened by one other process whose address space is bounded, so that a parser that believes a
size field fails there, at once.
"""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from bounded_open import complaint, open_all
from checkpoint_writers import (
    CONFIG,
    described,
    llama2c_numbers,
    make_tensors,
    pair,
    raw_gguf,
    raw_safetensors,
    string,
    write_folder,
    write_gguf,
    write_llama2c,
)

from kuiperllm.checkpoint import open_checkpoint
from kuiperllm.errors import CheckpointError


def u32(*values):
    return struct.pack(f"<{len(values)}I", *values)


def u64(*values):
    return struct.pack(f"<{len(values)}Q", *values)


ARRAY, U8, STRING = 9, 0, 8
EMBEDDING = ("token_embd.weight", (8, 4))


def keyed(raw):
    """A file with one more key, `x`, whose type and value are these bytes."""
    return raw_gguf(extra=string("x") + raw)


GGUF = {
    "magic only": (b"GGUF", "CheckpointError", "reaches beyond the end of the file"),
    "no counts": (b"GGUF" + u32(3), "CheckpointError", "reaches beyond the end of the file"),
    "version 1": (
        raw_gguf(version=1),
        "UnsupportedError",
        "GGUF version 1 is not supported; supported: 2 and 3",
    ),
    "version 99": (raw_gguf(version=99), "UnsupportedError", "GGUF version 99"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "UnsupportedError", "big-endian"),
    "2^60 tensors": (raw_gguf(tensor_count=1 << 60), "CheckpointError", f"claims {1 << 60} tensors"),
    "100000 tensors": (raw_gguf(tensor_count=100_000), "CheckpointError", "claims 100000 tensors"),
    "2^60 pairs": (raw_gguf(count=1 << 60), "CheckpointError", f"claims {1 << 60} key/value pairs"),
    "one pair too many": (raw_gguf(count=9), "CheckpointError", "reaches beyond the end"),
    "array of 2^63, 43 bytes": (
        b"GGUF" + u32(3) + u64(0, 1) + u64(3) + b"abc" + u32(ARRAY, U8) + u64(1 << 63),
        "CheckpointError",
        f"claims {1 << 63} items of 'abc'",
    ),
    "array of 2^63 strings": (keyed(u32(ARRAY, STRING) + u64(1 << 63)), "CheckpointError", "items of 'x'"),
    "array of 2^40 bytes": (keyed(u32(ARRAY, U8) + u64(1 << 40)), "CheckpointError", "items of 'x'"),
    "array past the end": (keyed(u32(ARRAY, U8) + u64(1000) + b"\0" * 9), "CheckpointError", "items of 'x'"),
    "array of unknown type": (keyed(u32(ARRAY, 13) + u64(1) + bytes(64)), "CheckpointError", "value type 13"),
    "nested array": (keyed(u32(ARRAY, ARRAY, U8) + u64(1)), "UnsupportedError", "nested arrays"),
    "deeply nested": (keyed((u32(ARRAY) + u64(1)) * 100_000), "UnsupportedError|CheckpointError", ""),
    "value of unknown type": (keyed(u32(77) + bytes(64)), "CheckpointError", "value type 77"),
    "string of 2^64-1": (keyed(u32(STRING) + u64((1 << 64) - 1)), "CheckpointError", "a string of"),
    "string past the end": (
        keyed(u32(STRING) + u64(1000) + b"abc"),
        "CheckpointError",
        "field of 1000 bytes",
    ),
    "string in array past the end": (
        keyed(u32(ARRAY, STRING) + u64(2) + string("a") + u64(1 << 62) + bytes(32)),
        "CheckpointError",
        "a string of",
    ),
    "string not UTF-8": (keyed(u32(STRING) + string(b"\xff\xfe")), "CheckpointError", "is not UTF-8"),
    "key not UTF-8": (raw_gguf(extra=pair(b"\xc3", "u32", 1)), "CheckpointError", "is not UTF-8"),
    "array string not UTF-8": (
        keyed(u32(ARRAY, STRING) + u64(1) + string(b"\xe9")),
        "CheckpointError",
        "is not UTF-8",
    ),
    "key twice": (raw_gguf(extra=pair("llama.block_count", "u32", 1)), "CheckpointError", "appears twice"),
    "tensor twice": (
        raw_gguf(tensors=(described(*EMBEDDING), described(*EMBEDDING, 0, 128)), data=bytes(256)),
        "CheckpointError",
        "'token_embd.weight' appears twice",
    ),
    "dimensions of 2^42": (
        raw_gguf(tensors=(described("token_embd.weight", (1 << 42, 1 << 42)),), data=bytes(64)),
        "CheckpointError",
        "more than the file holds",
    ),
    "product of 2^64": (
        raw_gguf(tensors=(described("token_embd.weight", (1 << 32, 1 << 32)),), data=bytes(64)),
        "CheckpointError",
        "more than the file holds",
    ),
    "product of 2^64 plus 4": (
        raw_gguf(tensors=(described("token_embd.weight", (2, (1 << 63) + 2)),), data=bytes(64)),
        "CheckpointError",
        "more than the file holds",
    ),
    "dimension 0": (
        raw_gguf(tensors=(described("token_embd.weight", (8, 0)),)),
        "CheckpointError",
        "more than the file holds",
    ),
    "5 dimensions": (
        raw_gguf(tensors=(described("token_embd.weight", (1, 1, 1, 1, 1)),), data=bytes(64)),
        "CheckpointError",
        "has 5 dimensions",
    ),
    "2^32-1 dimensions": (
        raw_gguf(tensors=(string("a") + u32(0xFFFFFFFF) + bytes(64),)),
        "CheckpointError",
        "has 4294967295 dimensions",
    ),
    "offset past the end": (
        raw_gguf(tensors=(described(*EMBEDDING, 0, 1 << 50),), data=bytes(128)),
        "CheckpointError",
        "the file is truncated",
    ),
    "offset 2^64-32": (
        raw_gguf(tensors=(described(*EMBEDDING, 0, (1 << 64) - 32),), data=bytes(128)),
        "CheckpointError",
        "the file is truncated",
    ),
    "data cut off": (
        raw_gguf(tensors=(described(*EMBEDDING),), data=bytes(127)),
        "CheckpointError",
        "the file is truncated",
    ),
    "offset misaligned": (
        raw_gguf(tensors=(described(*EMBEDDING, 0, 4),), data=bytes(256)),
        "CheckpointError",
        "no multiple of 32",
    ),
    "overlap": (
        raw_gguf(tensors=(described(*EMBEDDING), described("output.weight", (8, 4), 0, 32)), data=bytes(256)),
        "CheckpointError",
        "'token_embd.weight' and 'output.weight' overlap",
    ),
    **{
        f"alignment {value}": (
            raw_gguf({"general.alignment": (kind, value)}),
            "CheckpointError",
            "must be a power of two",
        )
        for kind, value in [
            ("u32", 0),
            ("u32", 3),
            ("u32", 1 << 31),
            ("i32", -32),
            ("f32", 32.0),
            ("str", "32"),
        ]
    },
    "type IQ4_NL": (
        raw_gguf(tensors=(described("token_embd.weight", (256, 1), 20),), data=bytes(144)),
        "UnsupportedError",
        "type IQ4_NL (number 20), which is not supported; supported: F32, F16, Q4_0",
    ),
    "a vector of type Q4_K": (
        raw_gguf(tensors=(described("output_norm.weight", (256,), 12),), data=bytes(144)),
        "UnsupportedError",
        "is Q4_K of shape [256]; Q4_K is supported for matrices",
    ),
    "rows that Q6_K cannot divide": (
        raw_gguf(tensors=(described("token_embd.weight", (128, 2), 14),), data=bytes(210)),
        "CheckpointError",
        "has rows of 128, which Q6_K cannot divide into blocks of 256",
    ),
    "half of a super-block": (
        raw_gguf(tensors=(described("token_embd.weight", (256, 2), 12),), data=bytes(144 + 72)),
        "CheckpointError",
        "the file is truncated",
    ),
    "type 1000": (
        raw_gguf(tensors=(described(*EMBEDDING, 1000),), data=bytes(256)),
        "UnsupportedError",
        "type unknown (number 1000)",
    ),
    "Q8_0 rows of 33": (
        raw_gguf(tensors=(described("token_embd.weight", (33, 2), 8),), data=bytes(256)),
        "CheckpointError",
        "cannot divide into blocks of 32",
    ),
    "Q8_0 vector": (
        raw_gguf(tensors=(described("output_norm.weight", (64,), 8),), data=bytes(256)),
        "UnsupportedError",
        "supported for matrices",
    ),
    "no architecture": (raw_gguf({"general.architecture": None}), "UnsupportedError", "architecture None"),
    "architecture gemma": (
        raw_gguf({"general.architecture": ("str", "gemma")}),
        "UnsupportedError",
        "the architecture 'gemma' is not supported; supported: llama, qwen2, qwen3",
    ),
    "architecture number": (
        raw_gguf({"general.architecture": ("u32", 1)}),
        "UnsupportedError",
        "architecture 1",
    ),
    "10^9 layers": (raw_gguf({"llama.block_count": ("u32", 10**9)}), "ConfigError", "=1000000000 is outside"),
    "2^64-1 layers": (
        raw_gguf({"llama.block_count": ("u64", 2**64 - 1)}),
        "ConfigError",
        "num_hidden_layers=",
    ),
    "0 heads": (raw_gguf({"llama.attention.head_count": ("u32", 0)}), "ConfigError", "num_attention_heads=0"),
    "-1 heads": (
        raw_gguf({"llama.attention.head_count": ("i32", -1)}),
        "ConfigError",
        "num_attention_heads=-1",
    ),
    "key missing": (raw_gguf({"llama.block_count": None}), "ConfigError", "llama.block_count is missing"),
    "tokens that are numbers": (
        raw_gguf({"tokenizer.ggml.tokens": ("raw", u32(ARRAY, 4) + u64(2) + u32(1, 2))}),
        "CheckpointError",
        "tokenizer.ggml.tokens must hold strings, not [1, 2]",
    ),
    "key of wrong type": (
        raw_gguf({"llama.block_count": ("str", "1")}),
        "ConfigError",
        "llama.block_count must be a whole number, not '1'",
    ),
    "epsilon NaN": (
        raw_gguf({"llama.attention.layer_norm_rms_epsilon": ("f32", float("nan"))}),
        "ConfigError",
        "must be a finite number",
    ),
    "epsilon beyond float32": (
        raw_gguf({"llama.attention.layer_norm_rms_epsilon": ("f64", 1e308)}),
        "ConfigError",
        "rms_norm_eps",
    ),
    "heads per layer": (
        raw_gguf({"llama.attention.head_count_kv": ("raw", u32(ARRAY, 4) + u64(2) + u32(1, 2))}),
        "UnsupportedError",
        "differs between layers",
    ),
    "partial rotary": (
        raw_gguf({"llama.rope.dimension_count": ("u32", 2)}),
        "UnsupportedError",
        "dimension_count=2",
    ),
    "experts": (raw_gguf({"llama.expert_count": ("u32", 8)}), "UnsupportedError", "mixture of 8 experts"),
    "split": (raw_gguf({"split.count": ("u32", 3)}), "UnsupportedError", "one of 3 parts; join them"),
    "window": (
        raw_gguf({"llama.attention.sliding_window": ("u32", 4)}),
        "UnsupportedError",
        "sliding-window",
    ),
    "longrope": (
        raw_gguf({"llama.rope.scaling.type": ("str", "longrope")}),
        "UnsupportedError",
        "rope scaling 'longrope' is not supported; supported: none, linear, yarn",
    ),
    "yarn with a negative factor": (
        raw_gguf(
            {
                "llama.rope.scaling.type": ("str", "yarn"),
                "llama.rope.scaling.factor": ("f32", -2.0),
                "llama.rope.scaling.attn_factor": ("f32", 2.0),
            }
        ),
        "ConfigError",
        "factor=-2.0 is below 1.0",
    ),
    "tensor of no known part": (
        raw_gguf(tensors=(described("blk.0.ssm_in.weight", (8,)),), data=bytes(64)),
        "UnsupportedError",
        "'blk.0.ssm_in.weight' belongs to no part",
    ),
    "layer beyond the last": (
        raw_gguf(tensors=(described("blk.1.attn_norm.weight", (8,)),), data=bytes(64)),
        "CheckpointError",
        "'blk.1.attn_norm.weight', but its header says 1 layers",
    ),
    "name with line breaks": (
        raw_gguf(tensors=(described("a\nb\x1b[2J" + "x" * 4000, (8,)),), data=bytes(64)),
        "UnsupportedError",
        "'a\\nb\\x1b[2J",
    ),
    "divisors of wrong shape": (
        raw_gguf(tensors=(described("rope_freqs.weight", (3,)),), data=bytes(64)),
        "CheckpointError",
        "must be F32 of shape [2], not F32 of shape [3]",
    ),
    "divisors of zero": (
        raw_gguf(tensors=(described("rope_freqs.weight", (2,)),), data=bytes(64)),
        "CheckpointError",
        "not a number above 0",
    ),
    "query rows that contradict the heads": (
        raw_gguf(tensors=(described("blk.0.attn_q.weight", (8, 6)),), data=bytes(192)),
        "CheckpointError",
        "q_proj.weight has the shape [6, 8], but the configuration asks for [8, 8]",
    ),
}


def one(shape, offsets, dtype="F32", **more):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


SAFETENSORS = {
    "7 bytes": (b"\x02\0\0\0\0\0\0", "UnsupportedError", "no checkpoint of a known format"),
    "length 2^63": (u64(1 << 63) + b"{}", "CheckpointError", f"claims {1 << 63} bytes; at most 100000000"),
    "length past the end": (u64(1000) + b"{}", "CheckpointError", "claims 1000 bytes, but the file has 10"),
    "not JSON": (raw_safetensors(b"{a}"), "CheckpointError", "not valid JSON"),
    "deep": (raw_safetensors(b'{"a":' + b"[" * 100_000), "CheckpointError", "nested too deeply"),
    "many values": (
        raw_safetensors(b'{"a":[' + b"[]," * 3_000_000),
        "CheckpointError",
        "more than 2000000 values",
    ),
    "not UTF-8": (raw_safetensors(b'{"\xff":1}'), "CheckpointError", "byte 2 is not UTF-8"),
    "long number": (raw_safetensors(b'{"a":' + b"9" * 10_000 + b"}"), "CheckpointError", "not valid JSON"),
    "name twice": (
        raw_safetensors(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":{}}', bytes(4)),
        "CheckpointError",
        "'a' appears twice",
    ),
    "tensor is a number": (raw_safetensors({"a": 1}), "CheckpointError", "'a' is not described by an object"),
    "dtype F4": (
        raw_safetensors(one([2], [0, 1], "F4"), b"\0"),
        "UnsupportedError",
        "'F4', which is not supported",
    ),
    "dtype missing": (raw_safetensors({"a": {}}), "UnsupportedError", "data type None"),
    "dtype list": (raw_safetensors(one([1], [0, 4], ["F32"]), bytes(4)), "UnsupportedError", "['F32']"),
    "shape negative": (
        raw_safetensors(one([-1, -1], [0, 4]), bytes(4)),
        "CheckpointError",
        "the shape [-1, -1]",
    ),
    "shape bool": (raw_safetensors(one([True], [0, 4]), bytes(4)), "CheckpointError", "the shape [True]"),
    "shape float": (raw_safetensors(one([1.0], [0, 4]), bytes(4)), "CheckpointError", "the shape [1.0]"),
    "shape null": (raw_safetensors(one(None, [0, 4]), bytes(4)), "CheckpointError", "the shape None"),
    "shape of 100 ones": (
        raw_safetensors(one([1] * 100, [0, 4]), bytes(4)),
        "CheckpointError",
        "the shape [",
    ),
    "shape 2^42 squared": (
        raw_safetensors(one([1 << 42, 1 << 42], [0, 4]), bytes(4)),
        "CheckpointError",
        "which is not what float32 of shape",
    ),
    "product of 2^64 plus 4 bytes": (
        raw_safetensors(one([(1 << 62) + 1], [0, 4]), bytes(4)),
        "CheckpointError",
        "which is not what float32 of shape",
    ),
    "empty but huge": (
        raw_safetensors(one([0, 1 << 62, 1 << 62], [0, 0])),
        "CheckpointError",
        "the shape [0, 46",
    ),
    "extent too small": (raw_safetensors(one([2], [0, 4]), bytes(8)), "CheckpointError", "has 4 bytes"),
    "offsets reversed": (
        raw_safetensors(one([1], [4, 0]), bytes(4)),
        "CheckpointError",
        "the offsets [4, 0]",
    ),
    "offsets negative": (
        raw_safetensors(one([1], [-4, 0]), bytes(4)),
        "CheckpointError",
        "the offsets [-4, 0]",
    ),
    "three offsets": (
        raw_safetensors(one([1], [0, 4, 8]), bytes(8)),
        "CheckpointError",
        "the offsets [0, 4, 8]",
    ),
    "offsets past the end": (
        raw_safetensors(one([3], [0, 12]), bytes(8)),
        "CheckpointError",
        "ends at byte 12 of 8; the file is truncated",
    ),
    "offsets of 2^70": (
        raw_safetensors(one([1], [1 << 70, (1 << 70) + 4]), bytes(8)),
        "CheckpointError",
        "the file is truncated",
    ),
    "overlap": (
        raw_safetensors(
            one([2], [0, 8]) | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)
        ),
        "CheckpointError",
        "tensors 'a' and 'b' overlap",
    ),
    "half a character as name": (
        raw_safetensors(b'{"\\ud800":{"dtype":"X"}}'),
        "UnsupportedError",
        "tensor '\\ud800' has the data type 'X'",
    ),
}

MAGIC1 = struct.pack("<Ii", 0x616B3432, 1)
TINY = CONFIG | {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}


def version2(group):
    head = struct.pack("<Ii", 0x616B3432, 2) + llama2c_numbers(CONFIG, 20) + struct.pack("<Bi", 1, group)
    return head.ljust(256, b"\0")


LLAMA2C = {
    "magic only": (MAGIC1, "UnsupportedError", "no checkpoint of a known format"),
    "version 3": (
        struct.pack("<Ii", 0x616B3432, 3) + bytes(300),
        "UnsupportedError",
        "llama2.c version 3 is not supported; supported: 0, 1, 2, and 3 of KuiperLLama",
    ),
    "version -1": (struct.pack("<Ii", 0x616B3432, -1) + bytes(300), "UnsupportedError", "version -1"),
    "all zero": ((MAGIC1 + bytes(28)).ljust(256, b"\0"), "CheckpointError", "describes no possible network"),
    "10^9 layers": (
        (MAGIC1 + llama2c_numbers(TINY | {"num_hidden_layers": 10**9}, 20)).ljust(256, b"\0"),
        "CheckpointError",
        "layers=1000000000",
    ),
    "version 0, 10^9 layers": (
        llama2c_numbers(TINY | {"num_hidden_layers": 10**9}, 20),
        "UnsupportedError",
        "no checkpoint of a known format",
    ),
    "largest sizes": (
        llama2c_numbers(CONFIG | {"hidden_size": 1 << 24, "intermediate_size": 1 << 24}, 1 << 24),
        "CheckpointError",
        "copy or download it again",
    ),
    "most layers": (
        llama2c_numbers(CONFIG | {"num_hidden_layers": 4096}, 20),
        "CheckpointError",
        "copy or download it again",
    ),
    "dim no multiple of heads": (
        (MAGIC1 + llama2c_numbers(TINY | {"num_attention_heads": 3}, 20)).ljust(256, b"\0"),
        "CheckpointError",
        "describes no possible network",
    ),
    "vocabulary of -2^31": (llama2c_numbers(TINY, -(1 << 31)), "UnsupportedError", "known format"),
    **{
        f"group size {group}": (version2(group), "UnsupportedError", f"groups of {group} do not divide")
        for group in (0, -32, 48, 1 << 30)
    },
    "version 2 without weights": (version2(32), "CheckpointError", "but the file has 256"),
}


def truncations(name, raw):
    """A good file cut off at many places."""
    cuts = sorted({int(len(raw) * part) for part in np.linspace(0, 1, 40, endpoint=False)} | {len(raw) - 32})
    return {f"{name} cut at {cut}": (raw[:cut], "CheckpointError|UnsupportedError", "") for cut in cuts}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    tensors = make_tensors()
    good = {
        "gguf": write_gguf(folder / "g", tensors, matrices="Q8_0").read_bytes(),
        "safetensors": (write_folder(folder / "s", tensors) / "model.safetensors").read_bytes(),
        **{f"v{v}": write_llama2c(folder / f"{v}", tensors, version=v).read_bytes() for v in (0, 1, 2)},
    }
    cases = {f"gguf: {name}": case for name, case in GGUF.items()}
    cases |= {f"safetensors: {name}": case for name, case in SAFETENSORS.items()}
    cases |= {f"llama2.c: {name}": case for name, case in LLAMA2C.items()}
    for name, raw in good.items():
        cases |= truncations(name, raw)
        cases[f"{name} itself"] = (raw, "opened", "")
    return cases


@pytest.fixture(scope="module")
def outcomes(cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    paths = {}
    for i, (name, (raw, _, _)) in enumerate(cases.items()):
        paths[name] = folder / f"{i}"
        paths[name].write_bytes(raw)
    paths["sparse"] = folder / "sparse"  # a header of more than 100 MB that the file does hold
    with open(paths["sparse"], "wb") as file:
        file.write(u64(100_000_001) + b"{")
        file.truncate(200_000_000)
    return dict(zip(paths, open_all(paths.values()), strict=True))


def test_every_case(cases, outcomes):
    """One test over all, as they share the process that opens them; failures name the case."""
    wrong = [complaint(name, outcomes[name], kinds, message) for name, (_, kinds, message) in cases.items()]
    assert not any(wrong), "\n".join(filter(None, wrong))


def test_header_of_more_than_the_format_allows(outcomes):
    kind, text, seconds = outcomes["sparse"]
    assert (kind, seconds < 1) == ("CheckpointError", True)
    assert "claims 100000001 bytes; at most 100000000 are allowed" in text


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "gone.safetensors"}, r"the file gone\.safetensors is missing; .*index\.json lists it"),
        ({"a": "../secret"}, r"lies in '\.\./secret', which is no file name"),
        ({"a": "/etc/passwd"}, "no file name"),
        ({"a": ".."}, "no file name"),
        ({"a": "x\0"}, "no file name"),
        ({"a": 3}, "lies in 3"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        (None, "has no weight_map"),
        ({"nowhere": "model-00001-of-00002.safetensors"}, "lacks tensor 'nowhere'"),
    ],
)
def test_bad_index(tmp_path, weight_map, message):
    folder = write_folder(tmp_path, make_tensors(), shards=2)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_missing_shard(tmp_path):
    folder = write_folder(tmp_path, make_tensors(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the file model-00002-of-00003\.safetensors is missing"):
        open_checkpoint(folder)
