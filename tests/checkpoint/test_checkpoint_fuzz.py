"""Mutations of good files: whatever happens to the bytes, all tensors load or a KuiperError says why."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from checkpoint_writers import CONFIG, make_tensors, random_blocks, write_folder, write_gguf, write_llama2c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kuiperllm.checkpoint import Weight, open_checkpoint
from kuiperllm.errors import KuiperError
from kuiperllm.quant import QuantTensor

SMALL = CONFIG | {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
FUZZ = settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SECONDS = 2.0
HEADER = 2048  # mutations fall here half of the time: the rest of a file is weights, which cannot be wrong

EDGES = [
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    31,
    32,
    33,
    255,
    1 << 15,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 42,
    1 << 60,
]
EDGES += [(1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 32]

positions = st.one_of(st.integers(0, HEADER), st.integers(0, 1 << 20))
mutations = st.lists(
    st.one_of(
        st.tuples(st.just("byte"), positions, st.integers(0, 255)),
        st.tuples(st.just("u32"), positions, st.sampled_from(EDGES)),
        st.tuples(st.just("u64"), positions, st.sampled_from(EDGES)),
        st.tuples(st.just("cut"), positions, st.just(0)),
        st.tuples(st.just("delete"), positions, st.integers(1, 40)),
        st.tuples(st.just("insert"), positions, st.integers(1, 40)),
        st.tuples(st.just("repeat"), positions, st.integers(1, 200)),
    ),
    min_size=1,
    max_size=4,
)


def mutate(raw: bytes, changes) -> bytes:
    out = bytearray(raw)
    for kind, position, value in changes:
        at = position % max(len(out), 1)
        if kind == "byte":
            out[at : at + 1] = bytes([value])
        elif kind in ("u32", "u64"):
            size = int(kind[1:]) // 8
            out[at : at + size] = (value % (1 << (8 * size))).to_bytes(size, "little")
        elif kind == "cut":
            del out[at:]
        elif kind == "delete":
            del out[at : at + value]
        elif kind == "insert":
            out[at:at] = bytes(value)
        else:
            out[at:at] = out[at : at + value]
    return bytes(out)


def check(path) -> None:
    """Open a checkpoint and load all of it; every error but KuiperError fails the test."""
    start, message = time.process_time(), "opened"
    try:
        with open_checkpoint(path) as checkpoint:
            for name, info in checkpoint.tensors.items():
                check_weight(checkpoint.load(name), info.shape)
                checkpoint.release(name)
    except KuiperError as error:
        message = str(error)
    assert message
    assert "\n" not in message
    assert message.encode()
    assert time.process_time() - start < SECONDS


def check_weight(weight: Weight, shape: tuple[int, ...]) -> None:
    assert weight.shape == shape
    for array in weight.arrays if isinstance(weight, QuantTensor) else (weight,):
        assert array.flags.aligned
        assert not array.flags.writeable
        if array.size:  # touch the first and the last byte
            array.reshape(-1)[[0, -1]].tobytes()


def write(kind: str, folder):
    """A small good file of this kind; the path to open, and the path to mutate."""
    tensors = make_tensors(SMALL)
    if kind == "safetensors":
        write_folder(folder, tensors, SMALL)
        return folder, folder / "model.safetensors"
    if kind == "shard index":
        write_folder(folder, tensors, SMALL, shards=2)
        return folder, folder / "model.safetensors.index.json"
    if kind == "config":
        write_folder(folder, tensors, SMALL)
        return folder, folder / "config.json"
    if kind == "gguf Q4_K":
        name, config = "model.layers.0.mlp.down_proj.weight", SMALL | {"intermediate_size": 256}
        tensors = make_tensors(config) | {name: random_blocks("Q4_K", (32, 256))}
        path = write_gguf(folder / "m", tensors, config, kinds={name: "Q4_K"})
    elif kind.startswith("gguf"):
        extra = {"rope_freqs.weight": np.ones(4, np.float32)}
        path = write_gguf(folder / "m", tensors, SMALL, matrices=kind.split()[1], extra=extra)
    else:
        path = write_llama2c(folder / "m", tensors, SMALL, version=int(kind[-1]))
    return path, path


KINDS = [
    "safetensors",
    "shard index",
    "config",
    "gguf F32",
    "gguf Q8_0",
    "gguf Q4_K",
    "llama2.c 0",
    "llama2.c 1",
    "llama2.c 2",
]


@pytest.fixture(scope="module", params=KINDS)
def target(request, tmp_path_factory):
    opened, mutated = write(request.param, tmp_path_factory.mktemp("fuzz"))
    with open_checkpoint(opened) as checkpoint:  # the file is good before it is mutated
        assert len(checkpoint.tensors) == 12
    return opened, mutated, mutated.read_bytes()


@FUZZ
@given(changes=mutations)
def test_mutated_bytes(target, changes):
    opened, mutated, raw = target
    mutated.write_bytes(mutate(raw, changes))
    check(opened)


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([0, -1, 1, 10**9, 2**63, 10**400]),
        st.floats(),
        st.text(max_size=20),
        st.sampled_from(["F32", "BF16", "llama3", "yarn", "linear", "silu", "model.safetensors", "../x"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(
                st.text(max_size=8), st.sampled_from(["rope_type", "type", "factor", "dtype", "shape"])
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)
CONFIG_KEYS = [
    *CONFIG,
    "head_dim",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "dtype",
    "hidden_act",
]


@FUZZ
@given(changes=st.dictionaries(st.sampled_from(CONFIG_KEYS), json_values, min_size=1, max_size=3))
def test_config_with_other_values(tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp() / "fuzz-config"
    if not folder.exists():
        write_folder(folder, make_tensors(SMALL), SMALL)
    (folder / "config.json").write_text(json.dumps(SMALL | changes))
    (folder / "generation_config.json").write_text(
        json.dumps(dict(zip(GENERATION_KEYS, changes.values(), strict=False)))
    )
    check(folder)


GENERATION_KEYS = ["eos_token_id", "temperature", "top_k"]


@FUZZ
@given(entry=st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), json_values, min_size=1))
def test_safetensors_header_with_other_values(tmp_path_factory, entry):
    folder = tmp_path_factory.getbasetemp() / "fuzz-header"
    if not folder.exists():
        write_folder(folder, make_tensors(SMALL), SMALL)
    header = json.dumps({"a": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]} | entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    check(folder)


REAL = [
    "models/stories260K/stories260K.bin",
    "models/stories260K/stories260K_v1.bin",
    "models/stories260K/stories260Ktok512.gguf",
    "models/llama-2-tiny-random/llama-2-tiny-random.gguf",
    "models/safetensors_samples/discollama-lora.safetensors",
]


@pytest.mark.shared
@pytest.mark.parametrize("name", REAL)
@settings(FUZZ, max_examples=60)
@given(changes=mutations)
def test_mutated_real_files(shared, tmp_path_factory, name, changes):
    folder = tmp_path_factory.getbasetemp() / "fuzz-real"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "mutated").write_bytes(mutate((shared / name).read_bytes(), changes))
    check(folder / "mutated")
