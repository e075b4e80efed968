"""Hugging Face folders: values against the `safetensors` package, and how they are handed out."""

from __future__ import annotations

import gc
import json
import mmap
import os
import time

import numpy as np
import pytest
import safetensors.numpy
from checkpoint_writers import BFLOAT16, CONFIG, make_tensors, raw_safetensors, write_folder

from kuiperllm.checkpoint import TensorInfo, open_checkpoint
from kuiperllm.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from kuiperllm.errors import CheckpointError


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("shards", [1, 3])
def test_values_are_those_that_safetensors_wrote(tmp_path, dtype, shards):
    tensors = make_tensors(dtype=dtype)
    with open_checkpoint(write_folder(tmp_path / "m", tensors, shards=shards)) as checkpoint:
        assert checkpoint.format == "safetensors"
        assert set(checkpoint.tensors) == set(tensors)
        for name, expected in tensors.items():
            loaded = checkpoint.load(name)
            assert checkpoint.tensors[name] == TensorInfo(
                name, expected.dtype.name, expected.shape, expected.nbytes
            )
            assert loaded.dtype == expected.dtype
            assert loaded.shape == expected.shape
            assert loaded.tobytes() == expected.tobytes()
        assert checkpoint.config.hidden_size == 64
        assert checkpoint.config.eos_token_ids == (2,)
        assert not checkpoint.metadata


def test_every_data_type_is_named_as_safetensors_names_it(tmp_path):
    tensors = {name: np.arange(6).reshape(2, 3).astype(dtype) for name, dtype in DTYPES.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "all")
    with open(tmp_path / "all", "rb") as file:
        header = json.loads(file.read(8 + int.from_bytes(file.read(8), "little") - 8))
    source = SafetensorsFile(tmp_path / "all")
    for name, expected in tensors.items():
        entry = source.entries[name]
        assert header[name]["dtype"] == name
        assert source.file.array(entry.offset, entry.dtype, entry.info.shape).tobytes() == expected.tobytes()


def test_arrays_are_read_only_views_of_the_file(tmp_path):
    folder = write_folder(tmp_path, make_tensors(dtype=BFLOAT16))
    checkpoint = open_checkpoint(folder)
    array = checkpoint.load("lm_head.weight")
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, memoryview | mmap.mmap)
    assert np.shares_memory(array, checkpoint.load("lm_head.weight"))
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


def test_an_unaligned_tensor_is_copied_and_equal(tmp_path):
    expected = np.arange(6, dtype=np.float32)
    entry = {"dtype": "F32", "shape": [6], "data_offsets": [1, 25]}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(raw_safetensors({"a": entry}, b"\0" + expected.tobytes()))
    array = open_checkpoint(tmp_path).load("a")
    assert array.flags.aligned
    assert not array.flags.writeable
    assert array.tolist() == expected.tolist()


def test_header_in_any_order_with_null_metadata_scalars_and_empty_tensors(tmp_path):
    header = {
        "__metadata__": None,
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "none": {"dtype": "F16", "shape": [0, 7], "data_offsets": [12, 12]},
    }
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "x.dat").write_bytes(raw_safetensors(header, np.array([1, 2, 3], np.float32).tobytes()))
    with open_checkpoint(tmp_path / "x.dat") as checkpoint:
        assert checkpoint.load("a") == 1
        assert checkpoint.load("b").tolist() == [2, 3]
        assert checkpoint.load("none").shape == (0, 7)


def test_arrays_outlive_the_checkpoint(tmp_path):
    tensors = make_tensors()
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors))
    array = checkpoint.load("model.norm.weight")
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.load("model.norm.weight")
    checkpoint.release("model.norm.weight")
    del checkpoint
    gc.collect()
    assert array.tolist() == tensors["model.norm.weight"].tolist()


def test_tied_head_is_absent_even_if_the_file_has_one(tmp_path):
    checkpoint = open_checkpoint(
        write_folder(tmp_path, make_tensors(), CONFIG | {"tie_word_embeddings": True})
    )
    assert "lm_head.weight" not in checkpoint.tensors
    assert checkpoint.config.tie_word_embeddings


def test_generation_defaults(tmp_path):
    write_folder(tmp_path, make_tensors())
    assert open_checkpoint(tmp_path).generation.temperature is None
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.7, "top_k": 20, "eos_token_id": [3, 4]}'
    )
    generation = open_checkpoint(tmp_path).generation
    assert (generation.temperature, generation.top_k, generation.eos_token_ids) == (0.7, 20, (3, 4))


def test_a_shard_opens_the_whole_checkpoint(tmp_path):
    tensors = make_tensors()
    write_folder(tmp_path, tensors, shards=2)
    checkpoint = open_checkpoint(tmp_path / "model-00002-of-00002.safetensors")
    assert set(checkpoint.tensors) == set(tensors)


def test_expect(tmp_path):
    checkpoint = open_checkpoint(write_folder(tmp_path, make_tensors()))
    assert checkpoint.expect("model.norm.weight", (64,)).nbytes == 256
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight has the shape \[64\], .* asks for \[63\]"
    ):
        checkpoint.expect("model.norm.weight", (63,))
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.9\.x' among its 21 tensors"):
        checkpoint.expect("model.layers.9.x", (1,))


def sparse_checkpoint(folder, gigabytes):
    """A folder whose weights take no space on the disk."""
    nbytes = gigabytes << 30
    entry = {"dtype": "F16", "shape": [nbytes // 2], "data_offsets": [0, nbytes]}
    header = raw_safetensors(json.dumps({"big": entry}).ljust(120).encode())
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + nbytes)
    return folder


def test_opening_a_large_file_takes_milliseconds(tmp_path):
    sparse_checkpoint(tmp_path, 4)
    start = time.process_time()
    array = open_checkpoint(tmp_path).load("big")
    assert time.process_time() - start < 0.1
    assert array.nbytes == 4 << 30
    assert array[-1] == 0


def test_release_drops_pages_from_resident_memory(tmp_path):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc to measure resident memory")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    safetensors.numpy.save_file({"a": np.ones(16 << 20, np.float32)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    array = checkpoint.load("a")
    before = resident()
    assert array.sum() == 16 << 20
    touched = resident()
    checkpoint.release("a")
    assert touched - before > 60 << 20
    assert resident() - before < 4 << 20
    assert array[-1] == 1  # the view is still valid


@pytest.mark.shared
def test_lora_adapter_of_another_project(shared):
    path = shared / "models/safetensors_samples/discollama-lora.safetensors"
    source = SafetensorsFile(path)
    expected = safetensors.numpy.load_file(path)
    assert set(source.entries) == set(expected)
    for name, tensor in expected.items():
        entry = source.entries[name]
        assert source.file.array(entry.offset, entry.dtype, entry.info.shape).tobytes() == tensor.tobytes()


@pytest.mark.shared
def test_published_configurations(shared, tmp_path):
    for i, folder in enumerate(sorted((shared / "configs").iterdir())):
        config = json.loads((folder / "config.json").read_text())
        target = write_folder(tmp_path / str(i), {"a": np.zeros(1, np.float32)}, config)
        if (folder / "generation_config.json").exists():
            (target / "generation_config.json").write_bytes((folder / "generation_config.json").read_bytes())
        assert open_checkpoint(target).config.hidden_size == config["hidden_size"]
