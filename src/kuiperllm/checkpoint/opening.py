"""Opening a checkpoint of any format, which is recognised from content and not from a file's name.

Only where several files make up a checkpoint do names say which belong together.
"""

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

SUPPORTED = "safetensors, GGUF, llama2.c .bin, Meta's consolidated.NN.pth with params.json"
MAX_FILES_LOOKED_AT = 1000

_PICKLES = (b"\x80\x02", b"\x80\x04", b"\x80\x05")
_PICKLE_REASON = "holds a Python pickle, which can run code and is never loaded; convert it to safetensors"
# torch.save began with a pickled number before version 1.6, and writes a ZIP archive since.
_TORCH = b"PK\x03\x04"
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_OLD_TORCH_REASON = (
    "is in the format of torch.save before version 1.6, which is not supported; load and save it again with "
    "a newer torch, or convert it to safetensors"
)
_PICKLE_KINDS = ("torch", "old torch", "pickle")
_PARAMS_FILE = "params.json"  # of Meta; what reads its files is imported only where they are
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
    """The format by the first bytes: a checkpoint's, or `torch`, `old torch`, `pickle`, `git-lfs`, or None.

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
    # Before pickles: the length of a safetensors header may look like their first bytes.
    if start[4:9] == b"\0\0\0\0{":
        return "safetensors"
    if start.startswith(_TORCH):
        return "torch"
    if start.startswith(_OLD_TORCH):
        return "old torch"
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
    if kind == "torch":
        return _open_torch(path)
    if kind == "old torch":
        raise UnsupportedError(f"{path}: {_OLD_TORCH_REASON}")
    if kind == "pickle":
        raise UnsupportedError(f"{path}: {_PICKLE_REASON}")
    if kind == "git-lfs":
        raise CheckpointError(f"{path}: is a pointer of Git LFS, not the file itself; run git lfs pull")
    raise UnsupportedError(f"{path}: is no checkpoint of a known format; supported: {SUPPORTED}")


def _open_torch(path: Path) -> Checkpoint:
    """Open a file of torch.save: one of Meta's shards, with all the others, or llama2.c's checkpoint."""
    from kuiperllm.checkpoint.meta import open_training, shard_names
    from kuiperllm.checkpoint.torch_file import TorchFile

    if shard_names([path.name]) and (path.parent / _PARAMS_FILE).exists():
        checkpoint = _open_shards(path.parent)
    else:
        checkpoint = open_training(TorchFile(path))
    if checkpoint is None:
        raise UnsupportedError(
            f"{path}: of torch.save's files, only Meta's consolidated.NN.pth with {_PARAMS_FILE} beside them "
            "and llama2.c's training checkpoints are read; convert it to safetensors"
        )
    return checkpoint


def _open_shards(folder: Path) -> Checkpoint | None:
    """Open Meta's shards, whose first bytes are looked at before; None if there are none."""
    from kuiperllm.checkpoint.meta import open_meta, shard_names

    names = shard_names(_names(folder))
    for path in (folder / name for name in names):
        if (kind := recognise(path)) == "torch":
            continue
        if kind in ("old torch", "pickle", "git-lfs"):
            return _open_file(path, source=folder)
        raise CheckpointError(f"{path}: is no file of torch.save; copy or download it again")
    return open_meta(folder, names) if names else None


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / SINGLE_FILE).exists():
        return _open_file(folder / SINGLE_FILE, source=folder)
    if (folder / INDEX_FILE).exists():
        return open_sharded(folder)
    if (folder / _PARAMS_FILE).exists() and (checkpoint := _open_shards(folder)) is not None:
        return checkpoint
    files = _recognised_files(folder)
    pickles = [path for path, kind in files.items() if kind in _PICKLE_KINDS]
    weights = [path for path, kind in files.items() if kind not in _PICKLE_KINDS]
    if len(weights) == 1:
        return _open_file(weights[0], source=folder)
    if weights:
        names = ", ".join(path.name for path in weights[:5])
        raise CheckpointError(
            f"{folder}: holds {len(weights)} files with weights and no {INDEX_FILE}; "
            f"name one of them: {names}"
        )
    if len(pickles) == 1:
        return _open_file(pickles[0], source=folder)
    if pickles:
        raise UnsupportedError(f"{pickles[0]}: {_PICKLE_REASON}")
    raise CheckpointError(f"{folder}: holds no weights; supported: {SUPPORTED}")


def _names(folder: Path) -> list[str]:
    """The names of the first files of a folder."""
    try:
        return sorted(os.listdir(folder))[:MAX_FILES_LOOKED_AT]
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from None


def _recognised_files(folder: Path) -> dict[Path, str]:
    """The files of a folder whose content is known, with their format."""
    found = {}
    for path in (folder / name for name in _names(folder)):
        if path.is_file() and path.stat().st_size and (kind := recognise(path)):
            found[path] = kind
    return found
