"""The threads that run kernels, and the programs they run.

A launch is a kernel with its arguments and a number of work items; a program is a list of launches. The team
(the calling thread plus workers, made once per process) runs a program without returning to Python: between
launches the threads meet in a few hundred nanoseconds, so a captured decode step costs one call however many
operators it has. `team_kernel.py` is the part that is compiled.

This is the one threading layer of the CPU back end. Numba's own layers are not used: workqueue needs 100 us
for each parallel region, omp and tbb need libraries that a plain install lacks or does not find.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from kuiperllm.backends.cpu.features import physical_cores
from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.config import settings
from kuiperllm.core.allocator import PrivatePool
from kuiperllm.core.device import Device, Graph
from kuiperllm.core.memory import Buffer
from kuiperllm.core.tensor import Tensor
from kuiperllm.errors import DeviceError

# As in team_kernel.py, which is imported only to be compiled.
_MODULE = "kuiperllm.backends.cpu.team_kernel"
_CLOSED, _ASLEEP, _STATES = 8, 32, 40
_PROGRESS_SLOTS = 8
_MAX_THREADS = 1024
_MAX_ARGUMENTS = 64

Argument = Tensor | int | float
_Launch = tuple[int, bytes, int, int, int]  # kernel, arguments, items, grain, sharers


class CpuGraph(Graph):
    """Captured launches and everything they read and write, kept alive for as long as the graph."""

    def __init__(self, pool: PrivatePool) -> None:
        self.pool = pool
        """Where the memory of its intermediate results comes from."""
        self._launches: list[_Launch] = []
        self._keep: dict[int, Buffer] = {}
        self._program: _Program | None = None

    def record(
        self, kernel: Kernel, arguments: tuple[Argument, ...], items: int, grain: int, sharers: int
    ) -> None:
        """Add a launch."""
        self._launches.append((kernel.address, kernel.pack(*_raw(arguments)), items, grain, sharers))
        for argument in arguments:
            if isinstance(argument, Tensor) and not self.pool.owns(argument.buffer):
                self._keep[id(argument.buffer)] = argument.buffer

    def replay(self) -> None:
        """Run the captured launches again, on the same memory."""
        if self._program is None:
            self._program = _Program(self._launches)
        team().run(self._program)

    def __len__(self) -> int:
        return len(self._launches)


class _Program:
    """Launches laid out as the team's kernels read them."""

    def __init__(self, launches: list[_Launch]) -> None:
        self._arguments = [ctypes.create_string_buffer(packed, len(packed)) for _, packed, *_ in launches]
        rows = [
            (address, ctypes.addressof(block), *shares)
            for (address, _, *shares), block in zip(launches, self._arguments, strict=True)
        ]
        self._launches = np.array(rows, np.int64).reshape(len(rows), 5)
        self._progress = np.zeros(_PROGRESS_SLOTS * len(rows), np.int64)
        self.launches = self._launches.ctypes.data
        self.progress = self._progress.ctypes.data
        self.count = len(rows)


class Team:
    """The threads of the CPU back end. Use `team()`: there is one per process."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._lock = threading.RLock()
        self._control = np.zeros(_STATES + 8 * _MAX_THREADS, np.int64)
        self._control[_CLOSED] = 1
        self._address = self._control.ctypes.data
        self._start, self._finish, self._work = (Kernel(_MODULE, n) for n in ("start", "finish", "work"))
        self._semaphores: list[threading.Semaphore] = []
        self._open: _Program | None = None
        self._arguments = ctypes.create_string_buffer(8 * _MAX_ARGUMENTS)
        self._single = _Program([(0, bytes(8), 0, 0, 0)])

    def launch(
        self, kernel: Kernel, arguments: tuple[Argument, ...], items: int, grain: int, sharers: int
    ) -> None:
        """Run one kernel; see `team_kernel.claimed_range`."""
        with self._lock:
            kernel.pack_into(self._arguments, *_raw(arguments))
            if items <= grain or self.num_threads == 1:
                kernel.call(ctypes.addressof(self._arguments), items)
                return
            launch = self._single._launches[0]
            launch[0], launch[1] = kernel.address, ctypes.addressof(self._arguments)
            launch[2], launch[3], launch[4] = items, grain, sharers
            self.run(self._single)

    def run(self, program: _Program) -> None:
        """Run a program to its end, even if Ctrl-C strikes after the workers have begun."""
        with self._lock:
            workers = self.num_threads - 1
            if len(self._semaphores) < workers:
                self._hire(workers)
            self._close()
            self._open = program  # alive for as long as workers may be inside
            try:
                self._start.call_with(
                    self._address, program.launches, program.count, program.progress, workers
                )
                if self._control[_ASLEEP]:
                    self._wake(workers)
            finally:
                self._close()

    def _close(self) -> None:
        """Take part in the program that is open, if one is, until it is done and the workers have left."""
        if not self._control[_CLOSED]:
            self._finish.call_with(self._address)
        self._open = None

    def _hire(self, workers: int) -> None:
        """Start the workers that are missing. They sleep until the first program wakes them."""
        for kernel in (self._start, self._finish, self._work):
            kernel.address  # noqa: B018 - compile now rather than in each worker
        for index in range(len(self._semaphores), workers):
            semaphore = threading.Semaphore(0)
            self._control[_STATES + 8 * index] = 1
            self._semaphores.append(semaphore)
            arguments = (semaphore, self._work, self._address, index)
            threading.Thread(target=_live, args=arguments, name=f"kuiper-{index + 1}", daemon=True).start()

    def _wake(self, workers: int) -> None:
        for index in range(workers):
            flag = _STATES + 8 * index + 1
            if self._control[flag]:
                self._control[flag] = 0
                self._semaphores[index].release()


def _live(semaphore: threading.Semaphore, work: Kernel, control: int, worker: int) -> None:
    """A worker thread: sleep, and when woken, work until there has been nothing to do for a while."""
    while True:
        semaphore.acquire()
        work.call_with(control, worker)


def _raw(arguments: tuple[Argument, ...]) -> list[int | float]:
    return [a.address if isinstance(a, Tensor) else a for a in arguments]


# --- the process's team -----------------------------------------------------------------------------------


class _Capture(threading.local):
    """The graph that this thread records, if any: other threads go on running what they launch."""

    graph: CpuGraph | None = None


_team: Team | None = None
_capture = _Capture()
_team_lock = threading.Lock()


def team() -> Team:
    """The threads of this process, made on first use."""
    global _team
    if _team is None:
        with _team_lock:
            if _team is None:
                _team = Team(settings().num_threads or physical_cores())
    return _team


def set_num_threads(num_threads: int) -> None:
    """Use this many threads from now on, the calling one included.

    Raises:
        DeviceError: the number is not 1 to 1024.
    """
    if not 1 <= num_threads <= _MAX_THREADS:
        raise DeviceError(f"threads must be 1 to {_MAX_THREADS}, not {num_threads}")
    with team()._lock:
        team().num_threads = num_threads


def num_threads() -> int:
    """How many threads run kernels, the calling one included."""
    return team().num_threads


def launch(
    kernel: Kernel, *arguments: Argument, items: int, grain: int = 1, in_long_runs: bool = False
) -> None:
    """Run a kernel over `items` work items, or record that if a graph is being captured.

    Args:
        kernel: what to run.
        arguments: its parameters in order; a tensor stands for the address of its first element.
        items: how many work items there are; 0 does nothing.
        grain: work items that a thread claims at a time.
        in_long_runs: claim many items at first, and `grain` only in the end. For kernels that memory delivers
            the more to, the longer they read on from where they are.
    """
    if items <= 0:
        return
    sharers = num_threads() if in_long_runs else 0
    if (graph := _capture.graph) is not None:
        graph.record(kernel, arguments, items, grain, sharers)
    else:
        team().launch(kernel, arguments, items, grain, sharers)


@contextmanager
def capture(beside: CpuGraph | None = None) -> Iterator[CpuGraph]:
    """Record the launches of this thread into a graph instead of running them.

    What is allocated meanwhile comes from a pool that belongs to the graph: memory that an operator gives up
    serves the next one, and nothing else.

    Args:
        beside: a graph whose pool this one uses as well; see `Device.capture`.

    Raises:
        DeviceError: a capture is already under way.
    """
    if _capture.graph is not None:
        raise DeviceError("a graph is already being captured; finish it first")
    with Device("cpu").allocator.private_pool(None if beside is None else beside.pool) as pool:
        _capture.graph = graph = CpuGraph(pool)
        try:
            yield graph
        finally:
            _capture.graph = None


def _forget_team() -> None:
    """A forked child has none of its parent's threads: it hires its own."""
    global _team
    _team = _capture.graph = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_team)
