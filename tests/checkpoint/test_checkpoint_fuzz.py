"""Mutations of good files: whatever happens to the bytes, all tensors load or a KuiperError says why."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from checkpoint_writers import CONFIG, make_tensors, random_blocks, write_folder, write_gguf, write_llama2c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized_writers import UP, awq, gptq, packed_int, random_e4m3, write_quantized

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
    if kind in METHODS:
        return write_method(kind, folder), folder / "model.safetensors"
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


def quantized_parts(method: str):
    """A quantized matrix of each method, and its `quantization_config`."""
    rng, shape = np.random.default_rng(0), (256, 128)
    if method == "awq":
        return awq(rng, shape, 32), {"bits": 4, "group_size": 32, "version": "gemm"}
    if method == "gptq":
        return gptq(rng, shape, 32, act_order=True), {"bits": 4, "group_size": 32, "desc_act": True}
    if method == "fp8":
        arrays = {"weight": random_e4m3(rng, shape), "weight_scale_inv": np.ones((2, 1), np.float32)}
        return arrays, {"weight_block_size": [128, 128], "fmt": "e4m3"}
    if method == "compressed-tensors":
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        return packed_int(rng, shape, 32, 4, symmetric=False, act_order=True), {
            "format": "pack-quantized",
            "config_groups": groups,
        }
    arrays = {
        "weight": rng.integers(0, 256, (256, 64), np.uint8),
        "weight_scale": np.ones((256, 4), np.float16),
        "weight_zero": rng.integers(0, 16, (256, 4), np.uint8),
    }
    return arrays, {"bits": 4, "group_size": 32, "zero_point": True}


METHODS = ["awq", "gptq", "fp8", "compressed-tensors", "kuiper"]


def write_method(method: str, folder):
    arrays, config = quantized_parts(method)
    return write_quantized(folder, {UP: arrays}, {"quant_method": method} | config)


KINDS = [
    *METHODS,
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


QUANTIZATION_KEYS = [
    "quant_method",
    "bits",
    "w_bit",
    "group_size",
    "version",
    "backend",
    "checkpoint_format",
    "is_marlin_format",
    "weight_block_size",
    "fmt",
    "format",
    "config_groups",
    "sparsity_config",
]


@pytest.mark.parametrize("method", METHODS)
@settings(FUZZ, max_examples=60)
@given(changes=st.dictionaries(st.sampled_from(QUANTIZATION_KEYS), json_values, min_size=1, max_size=3))
def test_quantization_with_other_values(tmp_path_factory, method, changes):
    folder = tmp_path_factory.getbasetemp() / f"fuzz-{method}"
    if not folder.exists():
        write_method(method, folder)
    config = json.loads((folder / "config.json").read_text())
    stated = {"quant_method": method} | quantized_parts(method)[1] | changes
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    check(folder)


WEIGHTS_KEYS = ["num_bits", "type", "strategy", "block_structure", "group_size", "symmetric"]


@settings(FUZZ, max_examples=60)
@given(changes=st.dictionaries(st.sampled_from(WEIGHTS_KEYS), json_values, min_size=1, max_size=3))
def test_quantized_groups_with_other_values(tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp() / "fuzz-groups"
    if not folder.exists():
        write_method("compressed-tensors", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"] = {"group_0": {"weights": {"num_bits": 4} | changes}}
    (folder / "config.json").write_text(json.dumps(config))
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
