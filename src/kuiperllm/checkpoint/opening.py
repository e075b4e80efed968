"""Opening a checkpoint of any format, which is recognised from content and never from a file's name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kuiperllm.checkpoint import gguf_file, llama2c
from kuiperllm.checkpoint.base import Checkpoint, Progress, brief
from kuiperllm.checkpoint.gguf import GgufCheckpoint
from kuiperllm.checkpoint.llama2c import Llama2cCheckpoint
from kuiperllm.checkpoint.mapping import MappedFile
from kuiperllm.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE, open_sharded, open_single
from kuiperllm.errors import CheckpointError, UnsupportedError

SUPPORTED = "safetensors, GGUF, llama2.c .bin"
MAX_FILES_LOOKED_AT = 1000

# torch.save writes a ZIP archive, and before that a bare pickle.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05")
_PICKLE_REASON = "holds a Python pickle, which can run code and is never loaded; convert it to safetensors"
_GIT_LFS = b"version https://git-lfs"
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
_FILE_SUFFIXES = (".gguf", ".bin", ".safetensors", ".pth", ".pt", ".json", ".model")


def open_checkpoint(
    source: str | Path, *, progress: Progress | None = None, revision: str | None = None
) -> Checkpoint:
    """Open a checkpoint. Only its headers are read; tensors are mapped into memory when they are loaded.

    Args:
        source: a file, a folder, or the id of a model on the hub, such as `Qwen/Qwen2.5-0.5B-Instruct`. An id
            is tried only if it is a string and no such path exists.
        progress: told how far a download has come.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: there is nothing of that name, or the files are truncated, corrupt or incomplete.
        ConfigError: the configuration is incomplete or contradicts itself.
        UnsupportedError: format, architecture or data type is not supported.
        DownloadError: the model could not be fetched from the hub.
    """
    path = Path(source)
    if "\0" in str(path):
        raise CheckpointError(f"{brief(str(path))} is not the name of a file")
    if os.path.isdir(path):
        return _open_folder(path)
    if os.path.lexists(path):
        return _open_file(path, source=path)
    if isinstance(source, str) and _is_hub_id(source):
        from kuiperllm.checkpoint.hub import download

        return _open_folder(download(source, revision=revision, progress=progress))
    raise CheckpointError(
        f"{path}: there is no such file or folder; give a path, or the id of a model on the hub as OWNER/NAME"
    )


def _is_hub_id(source: str) -> bool:
    return _HUB_ID.fullmatch(source) is not None and not source.lower().endswith(_FILE_SUFFIXES)


def recognise(path: Path) -> str | None:
    """The format by the first bytes: `safetensors`, `gguf`, `llama2.c`, `pickle`, `git-lfs`, or None.

    Raises:
        CheckpointError: the file cannot be read or is empty.
    """
    file = MappedFile(path)
    start = bytes(file.memory[: llama2c.HEADER_BYTES])
    if start.startswith(gguf_file.MAGIC):
        return "gguf"
    # Before the others: a llama2.c file without magic may begin with any small number, and so look like them,
    # while neither of them can look like seven plausible sizes.
    if llama2c.parse_header(start) is not None:
        return "llama2.c"
    if start.startswith(_PICKLES):
        return "pickle"
    if start.startswith(_GIT_LFS):
        return "git-lfs"
    if start[8:9] == b"{":
        return "safetensors"
    return None


def _open_file(path: Path, *, source: Path) -> Checkpoint:
    """Open a file; `source` is what the user named, the file or its folder."""
    kind = recognise(path)
    if kind == "safetensors":
        return open_single(path, source=source)
    if kind == "gguf":
        return GgufCheckpoint(path)
    if kind == "llama2.c":
        return Llama2cCheckpoint(path)
    if kind == "pickle":
        raise UnsupportedError(f"{path}: {_PICKLE_REASON}")
    if kind == "git-lfs":
        raise CheckpointError(f"{path}: is a pointer of Git LFS, not the file itself; run git lfs pull")
    raise UnsupportedError(f"{path}: is no checkpoint of a known format; supported: {SUPPORTED}")


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / SINGLE_FILE).exists():
        return _open_file(folder / SINGLE_FILE, source=folder)
    if (folder / INDEX_FILE).exists():
        return open_sharded(folder)
    files = _recognised_files(folder)
    pickles = [path for path, kind in files.items() if kind == "pickle"]
    weights = [path for path, kind in files.items() if kind != "pickle"]
    if len(weights) == 1:
        return _open_file(weights[0], source=folder)
    if weights:
        names = ", ".join(path.name for path in weights[:5])
        raise CheckpointError(
            f"{folder}: holds {len(weights)} files with weights and no {INDEX_FILE}; "
            f"name one of them: {names}"
        )
    if pickles:
        raise UnsupportedError(f"{pickles[0]}: {_PICKLE_REASON}")
    raise CheckpointError(f"{folder}: holds no weights; supported: {SUPPORTED}")


def _recognised_files(folder: Path) -> dict[Path, str]:
    """The files of a folder whose content is known, with their format."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from None
    found = {}
    for path in (folder / name for name in names[:MAX_FILES_LOOKED_AT]):
        if path.is_file() and path.stat().st_size and (kind := recognise(path)):
            found[path] = kind
    return found
