"""Exports that go wrong leave nothing behind, and say why in one line."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kuiperllm import CheckpointError, ExportError, KuiperError, UnsupportedError, UsageError, export
from kuiperllm.checkpoint.random import RandomCheckpoint
from kuiperllm.checkpoint.writing import output as output_module
from kuiperllm.config import ModelConfig
from kuiperllm.core import DType
from kuiperllm.engine.export import exporting
from kuiperllm.engine.export.exporting import export_checkpoint
from kuiperllm.engine.export.options import ExportOptions
from tiny_models import BASE, random_weights, write_checkpoint

OUTS = {"out": {}, "m.gguf": {"quant": "q8"}, "m.bin": {"version": 1}}
CONFIG = BASE | {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 264}

every_format = pytest.mark.parametrize(("out", "options"), OUTS.items(), ids=OUTS)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", CONFIG, random_weights(CONFIG))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what goes wrong while writing ------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_damaged_weights_are_named(tmp_path: Path, out: str, options: dict[str, Any], value: float) -> None:
    weights = random_weights(CONFIG)
    weights["model.layers.1.mlp.up_proj.weight"][77, 5] = value
    model = write_checkpoint(tmp_path / "source", CONFIG, weights)
    with pytest.raises(
        CheckpointError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight: a weight is NaN"
    ):
        export(model, tmp_path / out, **options)
    assert left(tmp_path) == ["source"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_damaged_norm_is_named(tmp_path: Path, dtype: Any) -> None:
    weights = random_weights(CONFIG)
    weights["model.norm.weight"][3] = np.nan
    model = write_checkpoint(tmp_path / "source", CONFIG, weights, dtype=dtype)
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight: a weight is NaN or infinite"):
        export(model, tmp_path / "out", quant="q8")
    assert left(tmp_path) == ["source"]


def test_weights_that_are_too_large_are_named(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["lm_head.weight"][0, 0] = 1e8
    model = write_checkpoint(tmp_path / "source", CONFIG, weights)
    with pytest.raises(UnsupportedError, match=r"tensor lm_head\.weight: a weight of 1e\+08 is too large"):
        export(model, tmp_path / "out", dtype="float16")
    with pytest.raises(UnsupportedError, match=r"tensor lm_head\.weight: a weight of 1e\+08 is too large"):
        export(model, tmp_path / "out", quant="q4")
    assert left(tmp_path) == ["source"]


class FullDisk:
    """A file on a disk that has room for some bytes only."""

    def __init__(self, file: Any, room: list[int], error: int) -> None:
        self._file, self._room, self._error = file, room, error

    def write(self, data: Any) -> int:
        if self._room[0] <= 0:
            raise OSError(self._error, os.strerror(self._error))
        written: int = self._file.write(data[: max(1, min(len(data), self._room[0], 1000))])
        self._room[0] -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def limit_disk(monkeypatch: pytest.MonkeyPatch, room: int, error: int = errno.ENOSPC) -> None:
    counter = [room]

    def opened(*arguments: Any, **options: Any) -> FullDisk:
        return FullDisk(open(*arguments, **options), counter, error)

    monkeypatch.setattr(output_module, "open", opened, raising=False)


@every_format
@pytest.mark.parametrize("room", [0, 10, 70_000, 90_000])
def test_a_full_disk(
    tmp_path: Path, model: Path, out: str, options: dict[str, Any], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_disk(monkeypatch, room)
    with pytest.raises(ExportError, match=r"the disk is full; nothing was kept$"):
        export(model, tmp_path / out, **options)
    assert left(tmp_path) == ["source"]


@every_format
def test_what_was_there_before_stays(
    tmp_path: Path, model: Path, out: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    export(model, tmp_path / out, **options)
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        limit_disk(patch, 100_000, errno.EIO)
        with pytest.raises(ExportError, match=r"cannot be written: Input/output error$"):
            export(model, tmp_path / out, force=True, **options)
    assert snapshot(tmp_path) == before
    export(model, tmp_path / out, force=True, **options)
    assert snapshot(tmp_path) == before


def test_writes_that_are_cut_short_go_on(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(model, tmp_path / "a.gguf")
    limit_disk(monkeypatch, 1 << 40)
    export(model, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_disk_works_meanwhile(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(output_module, "_FLUSHED_BYTES", 50_000)
    monkeypatch.setattr(output_module, "_flush", flushed.append)
    export(model, tmp_path / "m.gguf")
    assert 2 <= len(flushed) <= 12
    monkeypatch.undo()
    export(model, tmp_path / "same.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "same.gguf").read_bytes()


def test_too_little_space_is_found_before_anything_is_written(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=400_000))
    monkeypatch.setattr(output_module.Output, "create", lambda *a: pytest.fail("wrote"))
    with pytest.raises(ExportError, match=r"out: needs \d+ KiB and the disk has 391 KiB free; make room"):
        export(model, tmp_path / "out")
    assert left(tmp_path) == ["source"]


def test_a_rename_that_fails_restores_the_old_folder(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(model, tmp_path / "out")
    before = snapshot(tmp_path)
    rename = os.rename

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == "out" and not str(source).endswith("-replaced"):
            raise OSError(errno.EACCES, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(output_module.os, "rename", fail)
    with pytest.raises(ExportError, match="cannot be written: Permission denied"):
        export(model, tmp_path / "out", quant="q8", force=True)
    assert snapshot(tmp_path) == before


SLOW = """
import sys, time
from kuiperllm.checkpoint.writing import convert
whole = convert.Converter.convert
def slowly(self, *args):
    for piece in whole(self, *args):
        time.sleep(0.05)
        yield piece
convert.Converter.convert = slowly
from kuiperllm.cli import main
sys.exit(main(sys.argv[1:]))
"""


@every_format
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=str
)
def test_signals(
    tmp_path: Path, model: Path, out: str, options: dict[str, Any], number: signal.Signals, code: int
) -> None:
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-c", SLOW, "export", "-m", str(model), *words, str(tmp_path / out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        partial = [path for path in tmp_path.glob(f".{out}.partial-*/*") if path.stat().st_size > 5000]
        if partial or process.poll() is not None:
            break
        time.sleep(0.05)
    assert partial, process.communicate()
    process.send_signal(number)
    printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (code, "")
    assert "Traceback" not in said
    assert not (tmp_path / out).exists()
    if number != signal.SIGKILL:  # nobody can clean up after that, but the target is not there either
        assert left(tmp_path) == ["source"]


# --- what is refused --------------------------------------------------------------------------------------


@every_format
def test_nothing_is_replaced_without_force(
    tmp_path: Path, model: Path, out: str, options: dict[str, Any]
) -> None:
    export(model, tmp_path / out, **options)
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match="exists already; choose another name, or --force to replace it"):
        export(model, tmp_path / out, **options)
    assert snapshot(tmp_path) == before


def test_an_empty_folder_is_taken(tmp_path: Path, model: Path) -> None:
    (tmp_path / "out").mkdir()
    export(model, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["notes.txt", "thesis.json", "data", ".git"])
def test_a_folder_with_other_things_is_never_replaced(tmp_path: Path, model: Path, name: str) -> None:
    export(model, tmp_path / "out")
    if "." in name[1:]:
        (tmp_path / "out" / name).write_text("mine")
    else:
        (tmp_path / "out" / name).mkdir()
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match=f"holds {name}, which is no part of a checkpoint"):
        export(model, tmp_path / "out", force=True)
    assert snapshot(tmp_path) == before


def test_the_source_is_never_touched(tmp_path: Path, model: Path) -> None:
    export(model, tmp_path / "m.gguf")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "same.gguf").hardlink_to(tmp_path / "m.gguf")
    before = snapshot(tmp_path)
    gguf, folder = tmp_path / "m.gguf", {"format": "safetensors"}
    for source, out, options in (
        (model, model, {}),
        (model, tmp_path / "link", {}),
        (tmp_path / "link", model, {}),
        (model, tmp_path, folder),
        (model / "model.safetensors", model, {}),
        (model, model / "model.safetensors", {"format": "gguf"}),
        (model / "model.safetensors", model / "model.safetensors", {"format": "gguf"}),
        (gguf, gguf, {}),
        (gguf, tmp_path / "same.gguf", {}),
        (gguf, tmp_path, folder),
    ):
        with pytest.raises(UsageError, match="is the source or a part of it; export to another place"):
            export(source, out, force=True, **options)
    assert snapshot(tmp_path) == before


@pytest.mark.shared
def test_a_tokenizer_beside_the_output_is_not_replaced_without_force(tmp_path: Path, shared: Path) -> None:
    stories = shared / "models" / "stories260K"
    (tmp_path / "tokenizer.bin").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"tokenizer\.bin: exists already"):
        export(stories / "stories260K.bin", tmp_path / "m.bin", tokenizer=stories / "tok512.bin")
    assert left(tmp_path) == ["tokenizer.bin"]


@pytest.mark.shared
def test_a_tokenizer_beside_the_output_that_is_the_same_is_left_alone(tmp_path: Path, shared: Path) -> None:
    stories = shared / "models" / "stories260K"
    for version in (0, 1):
        out = tmp_path / f"v{version}.bin"
        export(stories / "stories260K.bin", out, version=version, tokenizer=stories / "tok512.bin")
    assert left(tmp_path) == ["tokenizer.bin", "v0.bin", "v1.bin"]
    # The source's own is never written, whatever its bytes: here a score that nobody needs differs.
    other = bytearray((tmp_path / "tokenizer.bin").read_bytes())
    other[4:8] = np.float32(-1).tobytes()
    (tmp_path / "tokenizer.bin").write_bytes(other)
    export(tmp_path / "v0.bin", tmp_path / "again.bin", version=1, force=True)
    assert (tmp_path / "tokenizer.bin").read_bytes() == other
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "v1.bin").read_bytes()


@every_format
def test_what_appears_meanwhile_is_not_replaced(
    tmp_path: Path, model: Path, out: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = exporting.write

    def slowly(*arguments: Any, **more: Any) -> None:
        write(*arguments, **more)
        if out == "out":
            (tmp_path / out).mkdir()
            (tmp_path / out / "config.json").write_text("mine")
        else:
            (tmp_path / out).write_text("mine")

    monkeypatch.setattr(exporting, "write", slowly)
    with pytest.raises(UsageError, match="exists already"):
        export(model, tmp_path / out, **options)
    assert left(tmp_path) == sorted([out, "source"])
    target = tmp_path / out / "config.json" if out == "out" else tmp_path / out
    assert target.read_text() == "mine"


@pytest.mark.parametrize("threads", [0, -1, 2000])
def test_an_impossible_number_of_threads(tmp_path: Path, model: Path, threads: int) -> None:
    with pytest.raises(UsageError, match="threads must be 1 to 1024"):
        export(model, tmp_path / "out", threads=threads)


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *args: object, **options: object) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ExportError, match=r"out: cannot be written: Read-only file system$"):
        export(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("no/such/out", {}, "there is no folder"),
        ("file", {"format": "safetensors"}, "is a file; this format is a folder"),
        ("", {"format": "gguf"}, "is a folder; name a file"),
        ("out", {"format": "onnx"}, "format 'onnx' is unknown; choose one of safetensors, gguf, llama2c"),
        ("out", {"quant": "q5"}, "quant 'q5' is unknown in safetensors"),
        ("m.gguf", {"quant": "iq2_xs"}, "quant 'iq2_xs' is unknown in GGUF"),
        ("m.bin", {"quant": "q4"}, "quant 'q4' is unknown in llama2c"),
        ("out", {"quant": "q8", "group_size": 48}, "group_size 48 is not possible; choose 32, 64 or 128"),
        ("out", {"quant": "q8", "group_size": 0}, "group_size must be a whole number"),
        ("out", {"group_size": 32}, "there are no groups with quant keep"),
        ("m.gguf", {"quant": "q4_k_m", "group_size": 64}, "GGUF types have groups of their own"),
        ("m.gguf", {"version": 1}, "only the format llama2c has versions"),
        ("m.bin", {"version": 4}, "llama2c has no version 4"),
        ("m.bin", {"version": 1, "quant": "q8"}, "llama2c version 1 is float32, not q8"),
        ("m.bin", {"version": 3, "quant": "none"}, "llama2c version 3 is int8, not none"),
        ("m.bin", {"version": 0, "group_size": 64}, "float32 versions of llama2c have no groups"),
        ("m.bin", {"version": 2, "group_size": 64}, "groups of 64 do not divide rows of 64 and 96 weights"),
        ("m.bin", {"version": 3, "group_size": 100}, "groups of 100 do not divide all matrices"),
        ("m.bin", {"dtype": "float16"}, "llama2c has no float16"),
        ("out", {"dtype": "int8"}, "dtype 'int8' is unknown"),
        ("out", {"zero_point": True, "quant": "q8"}, "zero points belong to quant q4"),
        ("out", {"search": True}, "there are no scales to search with quant keep"),
        ("a\0b", {}, "is not the name of a file"),
    ],
)
def test_bad_options(tmp_path: Path, model: Path, out: str, options: dict[str, Any], message: str) -> None:
    target = tmp_path / out if out else tmp_path / "folder"
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = snapshot(tmp_path)
    with pytest.raises(KuiperError) as caught:
        export(model, target, **options)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path) == before


def test_a_source_without_tokenizer_is_exported_with_a_note(tmp_path: Path, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    for out in ("out", "m.gguf"):
        report = export(model, tmp_path / out)
        assert report.notes[0].startswith("exported without a tokenizer: ")


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ExportOptions("safetensors", "q4"),
        ExportOptions("gguf", "q4_k_m"),
        ExportOptions("llama2c", version=2, group_size=64),
    ],
    ids=["safetensors", "gguf", "llama2c"],
)
def test_memory_holds_some_rows_only(tmp_path: Path, options: ExportOptions) -> None:
    """A model of 187 MB in float32, whose largest matrix has 64 MB, is exported with a fraction of that."""
    config = ModelConfig.from_hf(
        CONFIG
        | {
            "vocab_size": 16_000,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 8,
            "head_dim": 128,
        }
    )
    source = RandomCheckpoint(config, DType.bfloat16)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        report = export_checkpoint(source, tmp_path / "out", options, name="random", threads=2)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert sum(4 * np.prod(tensor.shape) for tensor in report.tensors) > 180e6
    assert peak < 50e6
