"""Files that appear whole or not at all.

Everything is written into a hidden folder beside the place where it belongs, brought to the disk, and then
renamed. Whatever goes wrong before that, the folder is removed and what was there before is as it was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core.memory import format_bytes
from kuiperllm.errors import ExportError, UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SPARE_BYTES = 1 << 20  # of a disk: for the files beside the weights, and for the file system itself

_FLUSHED_BYTES = 128 << 20  # after so many, the disk is given something to do

# What a folder may hold if an export is to replace it. Anything else in there is somebody's work.
_REPLACEABLE = re.compile(
    r"(generation_|tokenizer_)?config\.json|model[\w.-]*\.safetensors(\.index\.json)?|tokenizer\.(json|model|bin)"
    r"|(vocab|special_tokens_map|added_tokens)\.json|merges\.txt|chat_template\.(jinja|json)",
    re.ASCII,
)


class Output:
    """Where an export goes: a folder, or a file with perhaps others beside it.

    A context manager. `commit` puts everything in place; leaving without it leaves no trace.

    Args:
        path: the folder or the main file.
        is_folder: which of them.
        replace: whether what exists there may be replaced.
        beside: names of further files, in the same folder as the main file.

    Raises:
        UsageError: there is something already, or something that must not be replaced.
        ExportError: nothing can be written there.
    """

    def __init__(self, path: Path, *, is_folder: bool, replace: bool, beside: Iterable[str] = ()) -> None:
        self.path = path
        self._final = Path(os.path.realpath(path))  # a link stays, what it points to is replaced
        self._is_folder = is_folder
        self._replace = replace
        self._beside = tuple(beside)
        with _errors(path):
            self._check_target()
        self._staging: Path | None = None
        self._aside: Path | None = None
        self._files: list[str] = []
        self.bytes_written = 0

    def _check_target(self) -> None:
        final, parent = self._final, self._final.parent
        if not final.name:
            raise UsageError(f"{self.path}: is not the name of a file or folder")
        if not parent.is_dir():
            raise UsageError(f"{self.path}: there is no folder {parent}; make it first")
        if self._is_folder:
            self._check_folder()
        else:
            for file in (final, *(parent / name for name in self._beside)):
                self._check_file(file)

    def _check_file(self, file: Path) -> None:
        if file.is_dir():
            raise UsageError(f"{file}: is a folder; name a file")
        if os.path.lexists(file) and not stat.S_ISREG(os.stat(file).st_mode):
            raise UsageError(f"{file}: is not a regular file")
        if os.path.lexists(file) and not self._replace:
            raise UsageError(f"{file}: exists already; choose another name, or --force to replace it")

    def _check_folder(self) -> None:
        final = self._final
        if not os.path.lexists(final):
            return
        if not final.is_dir():
            raise UsageError(f"{self.path}: is a file; this format is a folder")
        with _errors(self.path):
            entries = sorted(os.scandir(final), key=lambda entry: entry.name)
        if not entries:
            return
        if not self._replace:
            raise UsageError(f"{self.path}: exists already; choose another name, or --force to replace it")
        for entry in entries:
            if not (entry.is_file(follow_symlinks=False) and _REPLACEABLE.fullmatch(entry.name)):
                raise UsageError(
                    f"{self.path}: holds {entry.name}, which is no part of a checkpoint; --force replaces "
                    "the whole folder, so move that away first"
                )

    def require_space(self, nbytes: int) -> None:
        """Refuse an export that the disk has no room for.

        Raises:
            ExportError: less than `nbytes` are free.
        """
        with _errors(self.path):
            free = shutil.disk_usage(self._final.parent).free
        if free < nbytes + _SPARE_BYTES:
            raise ExportError(
                f"{self.path}: needs {format_bytes(nbytes)} and the disk has {format_bytes(free)} free; "
                "make room or choose another disk"
            )

    def __enter__(self) -> Self:
        staging = self._final.parent / f".{self._final.name}.partial-{os.getpid()}"
        try:
            with _errors(self.path):
                if staging.exists():  # of a dead process that had this number
                    shutil.rmtree(staging)
                staging.mkdir()
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self._staging = staging
        return self

    def create(self, name: str | None = None) -> OutputFile:
        """A new file: `name` in the folder or beside the main file; None is the main file.

        Raises:
            ExportError: it cannot be made.
        """
        assert self._staging is not None
        name = self._final.name if name is None else name
        self._files.append(name)
        return OutputFile(self, self._staging / name, self._shown(name))

    def add(self, name: str, data: bytes) -> None:
        """A small file with these contents.

        Raises:
            ExportError: it cannot be written.
        """
        with self.create(name) as file:
            file.write(np.frombuffer(data, np.uint8))

    def _shown(self, name: str) -> Path:
        """What to call a file in messages: the name that it will have."""
        return self.path / name if self._is_folder else self.path.parent / name

    def commit(self) -> None:
        """Put everything in its place.

        Raises:
            ExportError: that cannot be done; what was there before is still there.
        """
        assert self._staging is not None
        with _errors(self.path):
            _sync_folder(self._staging)
            self._check_target()  # somebody may have put something there meanwhile
            if self._is_folder:
                self._swap_in(self._staging)
            else:
                for name in reversed(self._files):  # the main file is the first one made
                    os.replace(self._staging / name, self._final.parent / name)
            _sync_folder(self._final.parent)

    def _swap_in(self, staging: Path) -> None:
        if self._final.exists() and any(self._final.iterdir()):
            self._aside = staging.with_name(f"{staging.name}-replaced")
            os.rename(self._final, self._aside)
        os.rename(staging, self._final)  # over an empty folder as well

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._aside is not None and self._aside.exists():
            if self._final.exists():
                shutil.rmtree(self._aside, ignore_errors=True)
            else:
                os.rename(self._aside, self._final)
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)


class OutputFile:
    """A file that is being written from front to back. A context manager; on the disk when it is left."""

    def __init__(self, output: Output, path: Path, shown: Path) -> None:
        self._output = output
        self._shown = shown
        with _errors(shown):
            self._file: IO[Any] = open(path, "xb", buffering=0)  # noqa: SIM115 - closed in __exit__
        self.position = 0
        self._flushed = 0
        self._flusher: Thread | None = None

    def write(self, data: NDArray[Any]) -> None:
        """Append the bytes of an array.

        Raises:
            ExportError: the disk is full, or broken.
        """
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        with _errors(self._shown):
            while len(view):  # one call may write less than it is given
                written = self._file.write(view)
                view = view[written:]
                self.position += written
                self._output.bytes_written += written
        self._flush_behind()

    def _flush_behind(self) -> None:
        """Let the disk work meanwhile, so that not all is left to do at the end."""
        if self.position - self._flushed < _FLUSHED_BYTES or (
            self._flusher is not None and self._flusher.is_alive()
        ):
            return
        self._flushed = self.position
        self._flusher = Thread(target=_flush, args=(self._file.fileno(),), daemon=True)
        self._flusher.start()

    def pad_to(self, position: int) -> None:
        """Append zeros up to this position."""
        assert position >= self.position
        if position > self.position:
            self.write(np.zeros(position - self.position, np.uint8))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._flusher is not None:
                self._flusher.join()
            if kind is None:
                with _errors(self._shown):
                    os.fsync(self._file.fileno())
        finally:
            self._file.close()


def _flush(descriptor: int) -> None:
    """Bring what has been written to the disk. What goes wrong is found again by the last `fsync`."""
    with contextlib.suppress(OSError):
        getattr(os, "fdatasync", os.fsync)(descriptor)


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turn errors of the system into one line each."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ExportError(f"{path}: the disk is full; nothing was kept") from None
        raise ExportError(f"{path}: cannot be written: {error.strerror or error}") from None
