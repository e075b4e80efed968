"""Corrupt and hostile files of torch.save: nothing is run, nothing large is made, one clear error each.

All files are opened by one other process whose address space is bounded.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from bounded_open import complaint, open_all
from checkpoint_writers import CONFIG, make_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint_fuzz import FUZZ, check, json_values, mutate, mutations

from kuiperllm.checkpoint import open_checkpoint
from kuiperllm.errors import UnsupportedError
from meta_checkpoints import TensorCode, archive, as_meta, container, opcodes, params_of, pickled, saved

FOUR = np.arange(4, dtype=np.float32).tobytes()


def u16(*values):
    return struct.pack(f"<{len(values)}H", *values)


def u32(*values):
    return struct.pack(f"<{len(values)}I", *values)


def u64(*values):
    return struct.pack(f"<{len(values)}Q", *values)


def code(*parts):
    """A file whose pickle is these opcodes, between the version and the end."""
    return container(b"\x80\x02" + b"".join(parts) + b".", {"0": FOUR})


def tensor(shape=(4,), strides=(1,), count=4, **more):
    return container({"a": TensorCode(shape, strides, count, **more)}, {"0": FOUR})


def call(module_and_name, arguments):
    """A call in the four ways in which a pickle can ask for one."""
    module, name = module_and_name
    plain = opcodes(arguments)
    lines = f"{module}\n{name}\n".encode()
    stack = opcodes(module) + opcodes(name) + b"\x93"
    return {
        "reduce": b"c" + lines + plain + b"R",
        "stack": stack + plain + b"R",
        "instance": b"(" + b"".join(map(opcodes, arguments)) + b"i" + lines,
        "object": b"(c" + lines + b"".join(map(opcodes, arguments)) + b"o",
        "newobj": b"c" + lines + plain + b"\x81",
    }


GLOBALS = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("builtins", "bytearray"),
    ("__builtin__", "eval"),
    ("functools", "partial"),
    ("operator", "methodcaller"),
    ("runpy", "_run_code"),
    ("numpy", "load"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("torch", "load"),
    ("torch", "Tensor"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.jit", "load"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_sparse_tensor"),
    ("__torch__", "Model"),
    ("collections", "defaultdict"),
    ("kuiperllm.checkpoint.opening", "open_checkpoint"),
    ("kuiperllm.checkpoint.pickled", "Constructor"),
]
FORBIDDEN = {
    f"{way} of {'.'.join(name)}": (
        code(raw),
        "UnsupportedError",
        f"{'.'.join(name)}, which is no tensor; refused",
    )
    for name in GLOBALS
    for way, raw in call(name, ("echo 1",)).items()
}

PICKLES = {
    "empty": (container(b"", {}), "CheckpointError", "pickle ends within 1 bytes from byte 0"),
    "no end": (container(b"\x80\x02}", {}), "CheckpointError", "pickle ends within 1 bytes from byte 3"),
    "no value": (container(b"\x80\x02.", {}), "CheckpointError", "takes a value that is not there"),
    "protocol 0": (container(pickle.dumps({"a": 1}, 0), {}), "UnsupportedError", "uses opcode"),
    "protocol 200": (container(b"\x80\xc8}.", {}), "CheckpointError", "protocol 200"),
    "a number": (code(opcodes(1)), "CheckpointError", "holds no dictionary of tensors"),
    "a tensor alone": (code(opcodes(TensorCode((4,), (1,), 4))), "CheckpointError", "no dictionary"),
    "itself": (code(b"}q\x00(X\x01\0\0\0ah\x00u"), "CheckpointError", "'a' is no tensor"),
    "a list in itself": (code(b"](]q\x00h\x00aeR"), "CheckpointError|UnsupportedError", ""),
    "key that is a list": (code(b"}]Ns"), "CheckpointError", "has the key a list"),
    "key that is a tuple": (code(b"})Ns"), "CheckpointError", "has the key a tuple"),
    "key of 2^60": (
        code(b"}", opcodes(1 << 60), b"Ns"),
        "CheckpointError",
        "has the key 1152921504606846976",
    ),
    "key twice": (code(b"}(X\x01\0\0\0aNX\x01\0\0\0aNu"), "CheckpointError", "'a' appears twice"),
    "key without a value": (code(b"}(X\x01\0\0\0au"), "CheckpointError", "a key without a value"),
    "no mark": (code(b"t"), "CheckpointError", "a mark that is not there"),
    "below a mark": (code(b"}(s"), "CheckpointError", "takes a value that is not there"),
    "items of a number": (code(b"K\x01(K\x01K\x02u"), "CheckpointError", "treats 1 as a dict"),
    "items of a tuple": (code(b")(K\x01e"), "CheckpointError", "treats a tuple as a list"),
    "recall of what is not there": (code(b"h\x07"), "CheckpointError", "recalls value 7"),
    "text of 4 GB": (code(b"X\xff\xff\xff\xff"), "CheckpointError", "ends within 4294967295 bytes"),
    "text of 2^60": (code(b"\x8d", u64(1 << 60)), "UnsupportedError", "opcode 8d"),
    "bytes of 2^60": (code(b"\x96", u64(1 << 60)), "UnsupportedError", "opcode 96"),
    "long of 2 GB": (code(b"\x8b", u32((1 << 31) - 1)), "UnsupportedError", "opcode 8b"),
    "frame of 2^63": (code(b"\x95", u64(1 << 63)), "CheckpointError", "holds no dictionary|not there"),
    "memo at 2^32-1": (code(b"}r\xff\xff\xff\xff"), "CheckpointError", "holds no dictionary of tensors"),
    "text not UTF-8": (code(b"X\x01\0\0\0\xff"), "CheckpointError", "is not UTF-8"),
    "half a character": (
        code(b"}X\x03\0\0\0\xed\xa0\x80K\x01s"),
        "CheckpointError",
        "'\\ud800' is no tensor",
    ),
    "extension 1": (code(b"\x82\x01"), "UnsupportedError", "uses opcode 82"),
    "persistent id as text": (code(b"P0\n"), "UnsupportedError", "uses opcode 50"),
    "global without an end": (code(b"cos"), "CheckpointError", "ends within a name"),
    "global by numbers": (code(b"K\x01K\x02\x93"), "CheckpointError", "names a global with 2 of 1"),
    "odd name of a global": (
        code(b"ca\x1b[2J\r" + b"x" * 5000 + b"\nb\n"),
        "UnsupportedError",
        "asks for 'a\\x1b[2J\\rxxx",
    ),
    "call of a dictionary": (code(b"})R"), "UnsupportedError", "calls a dict, which makes no tensor"),
    "call of a type": (code(b"ctorch\nFloatStorage\n)R"), "UnsupportedError", "which makes no tensor"),
    "call without arguments": (
        code(b"ctorch._utils\n_rebuild_tensor_v2\n)R"),
        "CheckpointError",
        "0 arguments",
    ),
    "call with a list": (code(b"ccollections\nOrderedDict\n]R"), "UnsupportedError", "which makes no tensor"),
    "new object": (code(b"ccollections\nOrderedDict\n)\x81"), "UnsupportedError", "uses opcode 81"),
    "dictionary from pairs": (
        code(b"ccollections\nOrderedDict\n", opcodes(([("a", 1)],)), b"R"),
        "CheckpointError",
        "makes an OrderedDict with arguments",
    ),
    "state of a tensor": (
        code(opcodes(TensorCode((4,), (1,), 4)), opcodes({"__class__": 1}), b"b"),
        "CheckpointError",
        "treats a TorchTensor as a dict",
    ),
    "deep tuples": (code(b")" + b"\x85" * 400_000), "CheckpointError", "holds no dictionary of tensors"),
    "deep lists": (
        code(b"]" * 200_000 + b"a" * 199_999),
        "CheckpointError",
        "holds no dictionary of tensors",
    ),
    "a tree of 2^100 leaves": (
        code(b"}X\x01\0\0\0a)" + b"".join(b"q\x00h\x00\x86" for _ in range(100)) + b"s"),
        "CheckpointError",
        "'a' is no tensor",
    ),
    "a key of 2^100 leaves": (
        code(b"})" + b"".join(b"q\x00h\x00\x86" for _ in range(100)) + b"Ns"),
        "CheckpointError",
        "has the key a tuple",
    ),
    "arguments of 2^100 leaves": (
        code(
            b"ctorch._utils\n_rebuild_tensor_v2\n(]"
            + b"".join(b"q\x00h\x00\x86" for _ in range(100))
            + b"NNNtR"
        ),
        "CheckpointError",
        "a tensor has a tuple as its storage",
    ),
    "two million dictionaries": (code(b"}" * 2_000_000), "CheckpointError", "more than 500000 opcodes"),
    "two million memos": (code(b"}" + b"\x94" * 2_000_000), "CheckpointError", "more than 500000 opcodes"),
    "two million marks": (code(b"(" * 2_000_000), "CheckpointError", "more than 500000 opcodes"),
    "a huge tuple": (code(b"(" + b"N" * 400_000 + b"t"), "CheckpointError", "holds no dictionary of tensors"),
    "a huge tuple of arguments": (
        code(b"ctorch._utils\n_rebuild_tensor_v2\n(" + b"N" * 400_000 + b"tR"),
        "CheckpointError",
        "made of 400000 arguments",
    ),
    "9 MB": (container(bytes(9 << 20), {}), "CheckpointError", "a pickle of 9437184 bytes; at most 8388608"),
}

BIG = 1 << 40
TENSORS = {
    "beyond its storage": (tensor((5,)), "CheckpointError", "does not lie within its storage of 4 elements"),
    "offset beyond": (tensor((1,), offset=4), "CheckpointError", "does not lie within its storage"),
    "offset negative": (tensor((4,), offset=-1), "CheckpointError", "not whole numbers from 0 up"),
    "offset of 2^64": (tensor((4,), offset=1 << 64), "CheckpointError", "does not lie within its storage"),
    "offset a truth": (tensor((3,), offset=True), "CheckpointError", "not whole numbers"),
    "offset a float": (tensor((3,), offset=0.0), "CheckpointError", "not whole numbers"),
    "size negative": (tensor((-4,)), "CheckpointError", "not whole numbers from 0 up"),
    "size a text": (tensor(("4",)), "CheckpointError", "not whole numbers from 0 up"),
    "size a list": (tensor([4]), "CheckpointError", "not whole numbers from 0 up"),
    "size None": (tensor(None), "CheckpointError", "not whole numbers from 0 up"),
    "strides negative": (tensor((4,), (-1,)), "CheckpointError", "not whole numbers from 0 up"),
    "strides too large": (tensor((2,), (4,)), "CheckpointError", "strides [4] and offset 0 does not lie"),
    "strides of 2^64": (tensor((2,), (1 << 64,)), "CheckpointError", "does not lie within its storage"),
    "strides of 2^64 for one element": (
        tensor((1,), (1 << 64,)),
        "CheckpointError",
        "lacks tensor tok_embeddings",
    ),
    "fewer strides": (tensor((2, 2), (1,)), "CheckpointError", "has 2 sizes and 1 strides"),
    "more strides": (tensor((2,), (1, 1)), "CheckpointError", "has 1 sizes and 2 strides"),
    "expanded to 2^40": (tensor((BIG,), (0,)), "CheckpointError", "does not lie within its storage"),
    "expanded to 2^80": (tensor((BIG, BIG), (0, 0)), "CheckpointError", "does not lie within its storage"),
    "empty but huge": (
        tensor((0, BIG, BIG), (1, 1, 1)),
        "CheckpointError",
        "does not lie within its storage",
    ),
    "100 dimensions": (tensor((1,) * 100, (1,) * 100), "CheckpointError", "not whole numbers from 0 up"),
    "storage missing": (tensor(key="1"), "CheckpointError", "there is no storage '1' in the archive"),
    "storage elsewhere": (tensor(key="../version"), "CheckpointError", "there is no storage '../version'"),
    "storage named by a number": (tensor(key=0), "CheckpointError", "a storage has the key 0"),
    "count too large": (tensor(count=5), "CheckpointError", "claims 5 elements of float32, but has 16 bytes"),
    "count too small": (tensor((3,), count=3), "CheckpointError", "claims 3 elements of float32"),
    "count of 2^62": (tensor(count=1 << 62), "CheckpointError", "but has 16 bytes"),
    "count negative": (tensor(count=-4), "CheckpointError", "but has 16 bytes"),
    "count a truth": (tensor(count=True), "CheckpointError", "and True elements"),
    "type a function": (
        tensor(storage="torch._utils\n_rebuild_tensor_v2\n"),
        "CheckpointError",
        "has a Constructor as its type",
    ),
    "type unknown": (
        tensor(storage="torch\nQInt8Storage\n"),
        "UnsupportedError",
        "asks for torch.QInt8Storage",
    ),
    "two types": (
        container(
            {"a": TensorCode((4,), (1,), 4), "b": TensorCode((4,), (1,), 4, storage="torch\nIntStorage\n")},
            {"0": FOUR},
        ),
        "CheckpointError",
        "storage '0' is float32 in one place and int32 in another",
    ),
    "3 arguments": (tensor(more=(False,)), "CheckpointError", "made of 5 arguments"),
    "8 arguments": (tensor(more=(False, None, None, None)), "CheckpointError", "made of 8 arguments"),
    "negated": (
        tensor(more=(False, None, {"neg": True})),
        "CheckpointError",
        "marked as conjugated or negated",
    ),
    "storage that is none": (
        code(b"ctorch._utils\n_rebuild_tensor_v2\n", opcodes(({}, 0, (4,), (1,), False, None)), b"R"),
        "CheckpointError",
        "a tensor has a dict as its storage",
    ),
    "parameter of no tensor": (
        code(b"ctorch._utils\n_rebuild_parameter\n", opcodes((1, True, None)), b"R"),
        "CheckpointError",
        "a parameter is not made of a tensor",
    ),
    "persistent id of another kind": (
        code(opcodes(("module", 1)), b"Q"),
        "CheckpointError",
        "not of a storage",
    ),
    "persistent id nested": (
        code(opcodes((((((("storage",),),),),), 1, 2, 3, 4)), b"Q"),
        "CheckpointError",
        "not of a storage",
    ),
}


GOOD = saved({"a": np.ones(4, np.float32)})
DIRECTORY = GOOD.index(b"PK\x01\x02")
END_64, END = GOOD.index(b"PK\x06\x06"), GOOD.index(b"PK\x05\x06")


def patched(at, raw):
    return GOOD[:at] + raw + GOOD[at + len(raw) :]


def with_big_endian():
    entries = {"x/data.pkl": pickled({}), "x/byteorder": b"big"}
    return archive(entries)


def deflated():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("x/data.pkl", pickled({"a": TensorCode((4,), (1,), 4)}))
        target.writestr("x/data/0", bytes(50_000_000))
    assert len(out.getvalue()) < 100_000
    return out.getvalue()


ARCHIVES = {
    "signature only": (b"PK\x03\x04", "CheckpointError", "has no directory at its end"),
    "end only": (b"PK\x03\x04" + GOOD[END:], "CheckpointError", "its directory claims"),
    "half": (GOOD[: len(GOOD) // 2], "CheckpointError", "truncated; copy or download it again"),
    "end cut off": (GOOD[:-1], "CheckpointError", "has no directory at its end"),
    "front cut off": (GOOD[:4] + GOOD[200:], "CheckpointError", ""),
    "compressed": (deflated(), "UnsupportedError", "is compressed; torch.save stores entries as they are"),
    "method 99": (patched(DIRECTORY + 10, u16(99)), "UnsupportedError", "is compressed"),
    "encrypted": (patched(DIRECTORY + 8, u16(1)), "UnsupportedError", "is encrypted"),
    "packed to less": (patched(DIRECTORY + 20, u32(1)), "UnsupportedError", "is compressed"),
    "size of 4 GB": (
        patched(DIRECTORY + 20, u32(0xFFFFFFF0, 0xFFFFFFF0)),
        "CheckpointError",
        "reaches beyond",
    ),
    "size in an extra field that is absent": (
        patched(DIRECTORY + 20, u32(0xFFFFFFFF, 0xFFFFFFFF)),
        "CheckpointError",
        "lacks its size in 64 bits",
    ),
    "offset beyond the end": (
        patched(DIRECTORY + 42, u32(1 << 31)),
        "CheckpointError",
        "begins at byte 2147483648",
    ),
    "offset of something else": (
        patched(DIRECTORY + 42, u32(7)),
        "CheckpointError",
        "not where its directory",
    ),
    "offset of the next entry": (
        patched(DIRECTORY + 42, u32(GOOD.index(b"PK\x03\x04", 4))),
        "CheckpointError",
        "overlap|not where its directory says",
    ),
    "name of 65535 bytes": (
        patched(DIRECTORY + 28, u16(0xFFFF)),
        "CheckpointError",
        "entry 0 of its directory",
    ),
    "directory of another size": (patched(END_64 + 40, u64(46)), "CheckpointError", "directory claims"),
    "directory of 2^63 bytes": (
        patched(END_64 + 40, u64(1 << 63)),
        "CheckpointError",
        "directory claims bytes",
    ),
    "directory at 2^63": (patched(END_64 + 48, u64(1 << 63)), "CheckpointError", "directory claims bytes"),
    "2^60 entries": (patched(END_64 + 32, u64(1 << 60)), "CheckpointError", f"claims {1 << 60} entries"),
    "one entry more": (patched(END_64 + 32, u64(6)), "CheckpointError", "directory"),
    "no entries": (patched(END_64 + 32, u64(0)), "CheckpointError", "0 of its archive's 0 entries end in"),
    "another disk": (patched(END_64 + 20, u32(3)), "UnsupportedError", "archive that was split"),
    "end record elsewhere": (
        patched(END - 12, u64(3)),
        "CheckpointError",
        "the offset of its directory is wrong",
    ),
    "end record at 2^64-1": (
        patched(END - 12, u64((1 << 64) - 1)),
        "CheckpointError",
        "the offset of its directory is wrong",
    ),
    "name twice": (
        archive({"x/data.pkl": pickled({}), "x/data.pkx": b""}).replace(b"data.pkx", b"data.pkl"),
        "CheckpointError",
        "'x/data.pkl' appears twice",
    ),
    "big endian": (with_big_endian(), "UnsupportedError", "byte order b'big'; supported: little endian"),
    "no pickle": (archive({"x/version": b"3"}), "CheckpointError", "is no file of torch.save: 0 of"),
    "two pickles": (
        archive({"x/data.pkl": pickled({}), "y/data.pkl": pickled({})}),
        "CheckpointError",
        "is no file of torch.save: 2 of",
    ),
}


def overlapping():
    """Two entries of the directory that stand for the same bytes, as in a ZIP bomb."""
    inner = archive({"x/data/1": FOUR}, wide=False)
    inner = inner[: inner.index(b"PK\x01\x02")]
    entries = {"x/data.pkl": pickled({}), "x/data/0": inner}
    whole = archive(entries, wide=False)
    start = whole.index(b"PK\x01\x02", whole.index(b"x/data/0"))
    directory, end = whole[start:-22], whole[-22:]
    header = whole.index(inner)
    fields = (0, 0, 0x800, 0, 0, 0, 0, 16, 16, 8, 0, 0, 0, 0, 0, header)
    directory += struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *fields) + b"x/data/1"
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 3, 3, len(directory), start, 0)
    return whole[:start] + directory + end


def many_entries():
    """A directory of 200,000 entries without names, which all stand for one header."""
    raw = b"PK\x03\x04" + bytes(26)
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *[0] * 16)
    end = (0, 0, 0, 0, 200_000, 200_000, 46 * 200_000, 30)
    raw += entry * 200_000 + struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, *end)
    raw += struct.pack("<4sIQI", b"PK\x06\x07", 0, 30 + 46 * 200_000, 1)
    return raw + struct.pack("<4s4H2IH", b"PK\x05\x06", *[0] * 7)


ARCHIVES["200000 entries"] = (many_entries(), "CheckpointError", "claims 200000 entries in 9200000 bytes")
ARCHIVES["overlap"] = (overlapping(), "CheckpointError", "'x/data/0' and 'x/data/1' overlap")


def truncations():
    whole = saved(as_meta(make_tensors(), CONFIG))
    cuts = sorted(
        {int(len(whole) * part) for part in np.linspace(0, 1, 40, endpoint=False)} | {len(whole) - 32}
    )
    return {f"cut at {cut}": (whole[:cut], "CheckpointError|UnsupportedError", "") for cut in cuts} | {
        "the whole": (whole, "opened", "")
    }


def test_every_case(tmp_path):
    """One test over all, as they share the process that opens them; failures name the case."""
    cases = FORBIDDEN | PICKLES | TENSORS | ARCHIVES | truncations()
    paths = []
    for number, (raw, _, _) in enumerate(cases.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "params.json").write_text(json.dumps(params_of(CONFIG)))
        (folder / "consolidated.00.pth").write_bytes(raw)
        paths.append(folder)
    wrong = []
    for (name, (_, kinds, message)), outcome in zip(cases.items(), open_all(paths), strict=True):
        alternatives = [complaint(name, outcome, kinds, text) for text in message.split("|")]
        if all(alternatives):
            wrong.append(alternatives[0])
        elif (
            outcome[0] != "opened" and "consolidated.00.pth" not in outcome[1] and "params" not in outcome[1]
        ):
            wrong.append(f"{name}: does not name the file: {outcome[1]}")
    assert not wrong, "\n".join(wrong)


class Trap:
    """Pickles as a call; what it would do can be seen."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_call_is_refused_by_name_and_not_made(tmp_path, protocol):
    (tmp_path / "params.json").write_text(json.dumps(params_of(CONFIG)))
    path = tmp_path / "consolidated.00.pth"
    target = tmp_path / "ran"
    for trap, name in [
        (Trap(os.system, f"touch {target}"), rf"{os.system.__module__}\.system"),
        (Trap(builtins.eval, f"open({str(target)!r}, 'w')"), r"(builtins|__builtin__)\.eval"),
        (Trap(os.mkdir, str(target)), rf"{os.mkdir.__module__}\.mkdir"),
        (Trap(getattr, os, "system"), ""),
    ]:
        try:
            raw = pickle.dumps({"a": trap}, protocol)
        except TypeError:  # modules cannot be pickled
            raw = pickle.dumps({"a": Trap(getattr, "os", "system")}, protocol)
            name = r"(builtins|__builtin__)\.getattr"
        path.write_bytes(container(raw, {"0": FOUR}))
        with pytest.raises(
            UnsupportedError, match=rf"consolidated\.00\.pth: asks for {name}, which is no tensor"
        ):
            open_checkpoint(tmp_path)
    assert not target.exists()


# --- mutations --------------------------------------------------------------------------------------------

SMALL = CONFIG | {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "params.json").write_text(json.dumps(params_of(SMALL)))
    # few bytes of weights, so that mutations hit the rest
    raw = saved(as_meta(make_tensors(SMALL, np.float16), SMALL), align=2)
    (folder / "consolidated.00.pth").write_bytes(raw)
    with open_checkpoint(folder) as checkpoint:
        assert len(checkpoint.tensors) == 12
    return folder, raw


@FUZZ
@given(changes=mutations)
def test_mutated_bytes(target, changes):
    folder, raw = target
    (folder / "consolidated.00.pth").write_bytes(mutate(raw, changes))
    check(folder)


@FUZZ
@given(start=st.integers(-1500, 0), changes=mutations)
def test_mutated_directory(target, start, changes):
    folder, raw = target
    (folder / "consolidated.00.pth").write_bytes(raw[:start] + mutate(raw[start:], changes))
    check(folder)


@settings(FUZZ, max_examples=400)
@given(pickle_bytes=st.binary(max_size=200))
def test_any_pickle(target, pickle_bytes):
    folder, _ = target
    (folder / "consolidated.00.pth").write_bytes(container(b"\x80\x02" + pickle_bytes, {"0": FOUR}))
    check(folder)


@FUZZ
@given(
    changes=st.dictionaries(
        st.sampled_from([*params_of(SMALL), "use_scaled_rope", "hidden_dim", "moe"]), json_values
    )
)
def test_params_with_other_values(target, tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp() / "fuzz-params"
    folder.mkdir(exist_ok=True)
    (folder / "consolidated.00.pth").write_bytes(target[1])
    (folder / "params.json").write_text(json.dumps(params_of(SMALL) | changes))
    check(folder)
