"""A memory source whose memory is files, so that tensors may be larger than the memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
from pathlib import Path

from kuiperllm.core.memory import MemoryInfo, MemorySource, out_of_memory


class FileMemory(MemorySource):
    """Memory in files of a folder: the system keeps in memory what is used, and the rest on the disk.

    Args:
        folder: where the files are made, one for each reservation; it must exist.
    """

    alignment = 64
    granularity = mmap.PAGESIZE

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: dict[int, tuple[mmap.mmap, Path]] = {}
        self._count = 0

    def reserve(self, nbytes: int) -> int:
        """Make a file of `nbytes` bytes, all zero, and map it.

        Raises:
            OutOfMemoryError: the disk has less free space than that.
        """
        if nbytes > self.info().free_bytes:
            raise out_of_memory("file", nbytes, self.info())
        path = self.folder / f"{self._count}.memory"
        self._count += 1
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.truncate(descriptor, nbytes)  # a sparse file: it takes blocks of the disk as they are written
            pages = mmap.mmap(descriptor, nbytes)  # shared by default, so what is written reaches the file
        finally:
            os.close(descriptor)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        self._maps[address] = pages, path
        return address

    def release(self, address: int, nbytes: int) -> None:
        """Unmap a file and delete it."""
        pages, path = self._maps.pop(address)
        pages.close()
        path.unlink()

    def info(self) -> MemoryInfo:
        """The free space of the disk and its size."""
        usage = shutil.disk_usage(self.folder)
        return MemoryInfo(usage.free, usage.total)
