"""The host's memory: reserving, huge pages, limits, and how much the system says there is."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from kuiperllm.backends.cpu.meminfo import anonymous_bytes, darwin_memory_info, linux_memory_info, memory_info
from kuiperllm.backends.cpu.memory import HUGE_PAGE_BYTES, HostMemory
from kuiperllm.core import Allocator, Device, Tensor
from kuiperllm.core.memory import MemoryInfo
from kuiperllm.errors import OutOfMemoryError

MIB, GIB = 1 << 20, 1 << 30


def address_space() -> int:
    """Pages of virtual memory of this process (proc(5))."""
    return int(Path("/proc/self/statm").read_text().split()[0])


def test_reserved_memory_can_be_written_and_read() -> None:
    source = HostMemory()
    for nbytes in (4096, 64 * 1024, 5 * MIB):
        address = source.reserve(nbytes)
        assert address % source.alignment == 0
        ctypes.memset(address, 0x5A, nbytes)
        assert ctypes.string_at(address + nbytes - 1, 1) == b"Z"
        source.release(address, nbytes)


@pytest.mark.skipif(sys.platform != "linux", reason="needs procfs")
def test_released_memory_goes_back_to_the_system() -> None:
    source = HostMemory()
    before = address_space()
    address = source.reserve(256 * MIB)
    assert address_space() >= before + 256 * MIB // 4096
    source.release(address, 256 * MIB)
    assert address_space() < before + 16 * MIB // 4096


@pytest.mark.skipif(sys.platform != "linux", reason="needs procfs")
def test_a_released_block_between_others_goes_back_to_the_system() -> None:
    source = HostMemory()
    blocks = [source.reserve(15 * MIB) for _ in range(3)]
    for address in blocks:
        ctypes.memset(address, 0x5A, 15 * MIB)
    before = anonymous_bytes()
    source.release(blocks[1], 15 * MIB)
    assert anonymous_bytes() < before - 12 * MIB
    for address in blocks[::2]:  # in pieces: large bytes objects would change what the process holds
        pieces = range(address, address + 15 * MIB, 4096)
        assert all(ctypes.string_at(piece, 4096) == b"Z" * 4096 for piece in pieces)
        source.release(address, 15 * MIB)
    assert anonymous_bytes() < before - 32 * MIB


def test_blocks_of_all_sizes_are_apart() -> None:
    source, held = HostMemory(), {}
    for number, nbytes in enumerate(
        [MIB + 1, 16 * MIB, 16 * MIB, 17 * MIB, 16 * MIB, 16 * MIB, 5000, 3 * MIB]
    ):
        held[source.reserve(nbytes)] = number, nbytes
    for address, (number, nbytes) in held.items():
        ctypes.memset(address, number, nbytes)
    for address, (number, nbytes) in held.items():
        assert ctypes.string_at(address, nbytes) == bytes([number]) * nbytes
    for address, (_, nbytes) in held.items():
        source.release(address, nbytes)


@pytest.mark.skipif(sys.platform != "linux", reason="needs procfs")
def test_large_blocks_ask_for_huge_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        pytest.skip("this kernel has no transparent huge pages")
    source = HostMemory()
    sizes = 60 * MIB, 6 * MIB, 3 * MIB, MIB // 2
    *large, small = (source.reserve(size) for size in sizes)
    assert large[0] % HUGE_PAGE_BYTES == large[1] % HUGE_PAGE_BYTES == 0
    for address, size in zip(large, sizes, strict=False):
        assert "hg" in vm_flags(address)
        assert "hg" in vm_flags(address + size - 1)
    assert large[2] == large[1] + sizes[1]  # a huge page has the end of one and the beginning of the other
    assert "hg" not in vm_flags(small)
    for address, size in zip([*large, small], sizes, strict=True):
        source.release(address, size)


def vm_flags(address: int) -> list[str]:
    """The flags of the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("the address is not mapped")


def test_more_than_is_free_is_refused_before_it_is_touched() -> None:
    source = HostMemory(info=lambda: MemoryInfo(3 * GIB, 16 * GIB), touched=lambda: 0)
    with pytest.raises(OutOfMemoryError, match=r"^cpu memory: needs 4\.00 GiB, has 3\.00 GiB free of 16"):
        source.reserve(4 * GIB)


def test_reserved_but_untouched_memory_is_not_promised_twice() -> None:
    touched = [0]
    source = HostMemory(info=lambda: MemoryInfo(3 * GIB, 16 * GIB), touched=lambda: touched[0])
    address = source.reserve(2 * GIB)
    assert source.info() == MemoryInfo(1 * GIB, 16 * GIB)
    with pytest.raises(OutOfMemoryError, match=r"needs 2\.00 GiB, has 1\.00 GiB free"):
        source.reserve(2 * GIB)
    touched[0] = 2 * GIB  # from now on the system's own figure covers it
    assert source.info().free_bytes == 3 * GIB
    source.release(address, 2 * GIB)
    touched[0] = 0
    assert source.info().free_bytes == 3 * GIB


def test_a_size_beyond_the_address_space_is_out_of_memory() -> None:
    source = HostMemory(info=lambda: MemoryInfo(1 << 62, 1 << 62))
    with pytest.raises(OutOfMemoryError):
        source.reserve(1 << 60)
    with pytest.raises(OutOfMemoryError, match="cpu memory: needs"):
        Tensor.empty((1 << 30, 1 << 20))


def test_the_pool_recovers_on_the_real_source() -> None:
    limit = [64 * MIB]
    source = HostMemory(info=lambda: MemoryInfo(limit[0], 64 * MIB), touched=lambda: 1 << 60)
    pool = Allocator(source, Device("cpu"))
    cached = pool.allocate(32 * MIB)
    ctypes.memset(cached.address, 1, cached.nbytes)
    del cached
    limit[0] = 16 * MIB  # an allocation that the system refuses although the pool holds memory
    with pytest.raises(OutOfMemoryError):
        pool.allocate(20 * MIB)
    assert pool.stats().reserved_bytes == 0
    assert pool.allocate(8 * MIB).nbytes == 8 * MIB


@pytest.mark.parametrize("shape", [(1,), (3, 5), (1000,), (300, 1000), (2000, 1000)])
def test_tensors_are_aligned_to_64_bytes(shape: tuple[int, ...]) -> None:
    tensors = [Tensor.empty(shape, "int8") for _ in range(4)]
    assert all(tensor.address % 64 == 0 for tensor in tensors)


def test_memory_info_of_this_machine() -> None:
    free, total = memory_info()
    assert 0 < free <= total
    info = Device("cpu").memory_info()
    assert 0 < info.free_bytes <= info.total_bytes == total


# --- what the systems report ------------------------------------------------------------------------------


def fake_linux(tmp_path: Path, files: dict[str, str]) -> MemoryInfo:
    files = {"proc/meminfo": "MemTotal: 16777216 kB\nMemFree: 1024 kB\nMemAvailable: 8388608 kB\n", **files}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return linux_memory_info(tmp_path / "proc", tmp_path / "cgroup")


def test_linux_without_control_groups(tmp_path: Path) -> None:
    assert fake_linux(tmp_path, {}) == MemoryInfo(8 * GIB, 16 * GIB)


def test_linux_version_2_group(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/user.slice/job\n",
        "cgroup/user.slice/job/memory.max": "max\n",
        "cgroup/user.slice/job/memory.current": f"{GIB}\n",
        "cgroup/user.slice/memory.max": f"{4 * GIB}\n",
        "cgroup/user.slice/memory.current": f"{3 * GIB}\n",
        "cgroup/user.slice/memory.stat": f"anon 1\ninactive_file {GIB}\n",
    }
    assert fake_linux(tmp_path, files) == MemoryInfo(2 * GIB, 4 * GIB)


def test_linux_version_2_inside_a_container(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/../outside\n",
        "cgroup/memory.max": f"{2 * GIB}\n",
        "cgroup/memory.current": f"{GIB}\n",
    }
    assert fake_linux(tmp_path, files) == MemoryInfo(1 * GIB, 2 * GIB)


def test_linux_version_1_group(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:devices:/\n4:memory:/job\n0::/\n",
        "cgroup/memory/job/memory.limit_in_bytes": f"{6 * GIB}\n",
        "cgroup/memory/job/memory.usage_in_bytes": f"{5 * GIB}\n",
        "cgroup/memory/job/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
        "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "cgroup/memory/memory.usage_in_bytes": f"{7 * GIB}\n",
    }
    assert fake_linux(tmp_path, files) == MemoryInfo(2 * GIB, 6 * GIB)


def test_linux_group_that_is_over_its_limit(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "cgroup/memory.max": f"{GIB}\n",
        "cgroup/memory.current": f"{2 * GIB}\n",
    }
    assert fake_linux(tmp_path, files) == MemoryInfo(0, GIB)


def test_darwin() -> None:
    vm_stat = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               10000.\n"
        "Pages active:                            500000.\n"
        "Pages inactive:                          200000.\n"
        "Pages speculative:                         5000.\n"
        "Pages wired down:                        100000.\n"
        "Pages purgeable:                           1000.\n"
    )
    assert darwin_memory_info("17179869184\n", vm_stat) == MemoryInfo(216_000 * 16384, 16 * GIB)
    assert darwin_memory_info("17179869184\n", "") == MemoryInfo(16 * GIB, 16 * GIB)


def test_strided_copy_of_every_item_size() -> None:
    backend = Device("cpu").backend
    for itemsize in (1, 2, 4, 8):
        src = np.arange(24, dtype=f"u{itemsize}").reshape(4, 6)
        dst = np.zeros((3, 4), src.dtype)
        backend.copy_strided(dst.ctypes.data, (4, 1), src.ctypes.data, (2, 6), (3, 4), itemsize)
        assert np.array_equal(dst, src.T[::2])
