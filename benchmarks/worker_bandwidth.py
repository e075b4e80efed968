"""The memory read bandwidth of the machine behind the worker protocol, independent of the engines.

Each thread reads its own half (third, ...) of a buffer of 1 GiB on huge pages through compiled C
(`read_bandwidth.c`; ctypes releases the interpreter's lock meanwhile). One sample is the fastest of a few
passes.

Usage: worker_bandwidth.py LIBRARY
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

from worker_protocol import serve

BUFFER_BYTES = 1 << 30
PASSES = 8
ALIGNMENT = 1024  # what read_bandwidth.c reads per step


class Bandwidth:
    """Holds the buffer."""

    def __init__(self, library: str) -> None:
        self.read_all = ctypes.CDLL(library).read_all
        self.read_all.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self.memory = mmap.mmap(-1, BUFFER_BYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        ctypes.memset(self.address, 1, BUFFER_BYTES)

    def read_bandwidth(self, *, threads: int) -> float:
        """Bytes per second read by all threads together."""
        share = BUFFER_BYTES // threads // ALIGNMENT * ALIGNMENT
        starts = [self.address + i * share for i in range(threads)]
        seconds = []
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(PASSES):
                start = perf_counter()
                list(pool.map(self.read_all, starts, [share] * threads))
                seconds.append(perf_counter() - start)
        return share * threads / min(seconds)


if __name__ == "__main__":
    serve(Bandwidth(sys.argv[1]))
