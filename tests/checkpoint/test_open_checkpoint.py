"""How a checkpoint is found and its format recognised."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from checkpoint_writers import make_tensors, raw_safetensors, write_folder, write_gguf, write_llama2c

from kuiperllm.checkpoint import open_checkpoint
from kuiperllm.errors import CheckpointError, ConfigError, DownloadError, KuiperError, UnsupportedError
from meta_checkpoints import saved

BARE_PICKLE = "pickle.* never loaded; convert it to safetensors"


def test_the_name_of_a_file_does_not_matter(tmp_path):
    tensors = make_tensors()
    write_gguf(tmp_path / "a.bin", tensors)
    write_llama2c(tmp_path / "b.gguf", tensors, version=0)
    write_llama2c(tmp_path / "c.safetensors", tensors, version=1)
    folder = write_folder(tmp_path / "d", tensors)
    os.rename(folder / "model.safetensors", folder / "weights.pth")
    found = [
        open_checkpoint(tmp_path / name).format
        for name in ("a.bin", "b.gguf", "c.safetensors", "d/weights.pth")
    ]
    assert found == ["gguf", "llama2.c", "llama2.c", "safetensors"]
    assert open_checkpoint(folder).format == "safetensors"
    assert open_checkpoint(str(folder)).path == folder
    assert open_checkpoint(folder / "weights.pth").path == folder / "weights.pth"


@pytest.mark.parametrize(
    "dim", [640, 1152, 1408]
)  # their first bytes are those of pickle protocols 2, 4 and 5
def test_version_0_of_any_size_is_no_pickle(tmp_path, dim):
    sizes = np.array([dim, 8, 123, 2, 2, 4, 4], "<i4")  # byte 8 is the brace of a safetensors header
    (tmp_path / "m").write_bytes(sizes.tobytes() + bytes(64))
    with pytest.raises(
        CheckpointError, match=r"llama2\.c version 0 checkpoint with this header takes \d+ bytes"
    ):
        open_checkpoint(tmp_path / "m")


def test_folder_with_one_gguf_or_llama2c_file(tmp_path):
    (tmp_path / "a").mkdir()
    write_gguf(tmp_path / "a/model", make_tensors())
    (tmp_path / "a/README.md").write_text("# A model\n")
    assert open_checkpoint(tmp_path / "a").format == "gguf"
    write_llama2c(tmp_path / "a/other", make_tensors(), version=1)
    with pytest.raises(
        CheckpointError, match=r"holds 2 files with weights .* name one of them: model, other"
    ):
        open_checkpoint(tmp_path / "a")


def test_symbolic_links_are_followed(tmp_path):
    folder = write_folder(tmp_path / "blobs", make_tensors())
    link = tmp_path / "snapshot"
    link.mkdir()
    for name in os.listdir(folder):
        (link / name).symlink_to(folder / name)
    assert open_checkpoint(link).format == "safetensors"
    os.unlink(folder / "model.safetensors")
    with pytest.raises(KuiperError):
        open_checkpoint(link)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_are_refused_and_never_loaded(tmp_path, protocol):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(), protocol))
    with zipfile.ZipFile(tmp_path / "consolidated.00.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap()))
    (tmp_path / "config.json").write_text("{}")
    for source in (tmp_path, tmp_path / "pytorch_model.bin", tmp_path / "consolidated.00.pth"):
        with pytest.raises(UnsupportedError, match=f"{BARE_PICKLE}|asks for .*mkdir, .*; refused") as caught:
            open_checkpoint(source)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_files_of_torch_that_are_no_checkpoint(tmp_path):
    tensors = {"model.norm.weight": np.ones(4, np.float32)}
    (tmp_path / "pytorch_model.bin").write_bytes(saved(tensors))
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(UnsupportedError, match=r"only Meta's .* are read; convert it to safetensors"):
            open_checkpoint(source)
    (tmp_path / "other.bin").write_bytes(saved(tensors))
    with pytest.raises(UnsupportedError, match=BARE_PICKLE):
        open_checkpoint(tmp_path)
    # what torch.save wrote before version 1.6: a magic number, pickled
    (tmp_path / "other.bin").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + bytes(100))
    with pytest.raises(
        UnsupportedError, match=r"of torch\.save before version 1\.6.*save it again with a newer"
    ):
        open_checkpoint(tmp_path / "other.bin")


def test_nothing_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no weights; supported: safetensors, GGUF"):
        open_checkpoint(tmp_path / "empty")
    for source in (
        tmp_path / "nothing",
        "no-such-model.gguf",
        "a/b/c",
        "models/m.gguf",
        "x" * 5000,
        "a\0b",
        "",
        "~",
    ):
        with pytest.raises(
            CheckpointError, match=r"no such file or folder|not the name of a file|holds no weights|files"
        ):
            open_checkpoint(source)


def test_a_path_is_never_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(Path("Qwen/Qwen2.5-0.5B"))


@pytest.mark.parametrize("source", ["a/..", "../a", "a/b..c", "a/b/../c", "/a/b"])
def test_ids_with_path_tricks(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((CheckpointError, DownloadError)):
        open_checkpoint(source)
    assert os.listdir(tmp_path) == []


def test_files_that_are_no_checkpoint(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("Once upon a time, there was a little model.\n" * 100)
    with pytest.raises(
        UnsupportedError, match=r"notes\.txt: is no checkpoint .*; supported: safetensors, GGUF"
    ):
        open_checkpoint(text)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(
        CheckpointError, match="is a pointer of Git LFS, not the file itself; run git lfs pull"
    ):
        open_checkpoint(tmp_path)
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(CheckpointError, match="the file is empty"):
        open_checkpoint(empty)
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            open_checkpoint(special)


def test_missing_config(tmp_path):
    folder = write_folder(tmp_path / "m", make_tensors())
    (folder / "config.json").unlink()
    for source in (folder, folder / "model.safetensors"):
        with pytest.raises(CheckpointError, match=r"the file config\.json is missing"):
            open_checkpoint(source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b" " * (5 << 20), r"has 5242880 bytes; at most"),
        (b"[" + b"[]," * 1_000_001 + b"[]]", "more than 2000000 values"),
        (b"{}", "model_type is missing"),
    ],
    ids=range(10),
)
def test_bad_config(tmp_path, text, message):
    folder = write_folder(tmp_path, make_tensors())
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=message) as caught:
        open_checkpoint(folder)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_quantized_by_another_scheme(tmp_path):
    folder = write_folder(tmp_path, make_tensors())
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        text[:-1] + ', "quantization_config": {"quant_method": "hqq", "bits": 4}}'
    )
    with pytest.raises(
        UnsupportedError, match="quantized with 'hqq' are not supported; supported: kuiper, awq"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize("length", [0x280, 0x480, 0x580])
def test_a_header_as_long_as_a_pickle_begins(tmp_path, length):
    folder = write_folder(tmp_path, {"model.norm.weight": np.ones(4, np.float32)})
    entry = {"model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    raw = raw_safetensors(json.dumps(entry).encode().ljust(length), np.ones(4, np.float32).tobytes())
    assert raw.startswith(bytes([0x80, length >> 8]))
    (folder / "model.safetensors").write_bytes(raw)
    assert open_checkpoint(folder).load("model.norm.weight").tolist() == [1, 1, 1, 1]


def test_importing_is_cheap():
    code = (
        "import sys, kuiperllm.checkpoint\n"
        "heavy = {'huggingface_hub', 'tqdm', 'torch', 'numba', 'gguf', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
