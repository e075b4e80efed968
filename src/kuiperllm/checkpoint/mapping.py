"""A file mapped into memory, from which tensors are handed out as read-only views."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.errors import CheckpointError


class MappedFile:
    """A whole file as read-only memory.

    Every array that is handed out keeps the mapping alive; `close` gives up this object's own hold on it.

    Raises:
        CheckpointError: the file is missing, unreadable, empty or not a regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # O_NONBLOCK: opening a named pipe must not wait for a writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: is not a regular file")
            if status.st_size == 0:
                raise CheckpointError(f"{path}: the file is empty; copy or download it again")
            self._map: mmap.mmap | None = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be mapped into memory: {error.strerror}") from None
        finally:
            os.close(descriptor)
        self.size = len(self._map)

    @property
    def memory(self) -> mmap.mmap:
        """The mapping itself, for parsers of headers.

        Raises:
            CheckpointError: the file is closed.
        """
        if self._map is None:
            raise CheckpointError(
                f"{self.path}: the checkpoint is closed; tensors must be loaded before that"
            )
        return self._map

    def raw(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """A read-only view of `nbytes` bytes at `offset`; the caller has checked that the file has them."""
        return np.frombuffer(self.memory, np.uint8, nbytes, offset)

    def array(self, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """A read-only tensor at `offset`: a view, or a copy where the offset is not aligned for `dtype`."""
        count = int(np.prod(shape, dtype=np.int64))
        return aligned(self.raw(offset, count * dtype.itemsize), dtype.alignment).view(dtype).reshape(shape)

    def release(self, offset: int, nbytes: int) -> None:
        """Let the system drop the whole pages inside a range; they are read again when touched."""
        advice = getattr(mmap, "MADV_DONTNEED", None)
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if advice is not None and self._map is not None and end > start:
            self._map.madvise(advice, start, end - start)

    def close(self) -> None:
        """Give up the mapping; memory is unmapped when the last array on it is gone."""
        self._map = None


def aligned(raw: NDArray[np.uint8], alignment: int) -> NDArray[np.uint8]:
    """The same bytes at an address that is a multiple of `alignment`; copied only where needed."""
    if raw.ctypes.data % alignment:
        raw = raw.copy()  # NumPy allocates at multiples of 16 at least
    return raw
