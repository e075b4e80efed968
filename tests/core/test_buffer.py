"""Buffers: lifetimes, wrapping, copying, filling."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from pathlib import Path

import numpy as np
import pytest

from kuiperllm.core import Buffer, Device, Tensor
from kuiperllm.errors import MemoryLifetimeError, UsageError

CPU = Device("cpu")


def allocated() -> int:
    return CPU.allocator.stats().allocated_bytes


def bytes_of(buffer: Buffer) -> bytes:
    return ctypes.string_at(buffer.address, buffer.nbytes)


def buffer_of(data: bytes) -> Buffer:
    buffer = CPU.allocator.allocate(len(data))
    ctypes.memmove(buffer.address, data, len(data))
    return buffer


def wrapped(array: np.ndarray, writable: bool = True) -> Buffer:
    return Buffer.wrap(array, array.ctypes.data, array.nbytes, CPU, writable=writable)


def test_memory_goes_back_when_the_last_user_goes() -> None:
    start = allocated()
    buffer = CPU.allocator.allocate(4096)
    tensor = Tensor(buffer, "float32", (32, 32))
    del buffer
    view = tensor[3]
    del tensor
    assert allocated() == start + 4096
    array = view.numpy()
    array[:] = 7
    del view
    assert allocated() == start + 4096
    assert array.tolist() == [7.0] * 32
    part = array[2:4]
    del array
    assert allocated() == start + 4096
    del part
    assert allocated() == start


def test_release_ends_the_use_at_once_and_frees_once() -> None:
    start = allocated()
    buffer = CPU.allocator.allocate(64)
    tensor = Tensor(buffer, "float32", (16,))
    buffer.release()
    assert allocated() == start
    buffer.release()
    assert allocated() == start
    for use in (
        lambda: buffer.address,
        lambda: tensor.address,
        tensor.numpy,
        tensor.tolist,
        tensor.__dlpack__,
        lambda: tensor[0].item(),
        lambda: buffer.fill(0),
        lambda: buffer.copy_from(buffer),
        lambda: Tensor.zeros(16).copy_(tensor),
        lambda: tensor.copy_(Tensor.zeros(16)),
    ):
        with pytest.raises(MemoryLifetimeError, match="64 bytes on cpu was released"):
            use()
    assert "released" in repr(buffer)
    assert repr(tensor) == "Tensor(shape=[16], dtype=float32, device=cpu) released"


def test_released_memory_stays_while_numpy_looks_at_it() -> None:
    start = allocated()
    tensor = Tensor.full(16, 3)
    array = tensor.numpy()
    tensor.buffer.release()
    assert allocated() == start + 64
    assert Tensor.full(16, 5).address != array.ctypes.data
    assert array.tolist() == [3.0] * 16
    del array
    assert allocated() == start


def test_wrapped_memory_keeps_its_owner() -> None:
    array = np.arange(8, dtype=np.int32)
    owner = weakref.ref(array)
    buffer = wrapped(array)
    assert buffer.address == array.ctypes.data
    del array
    assert owner() is not None
    view = Tensor(buffer, "int32", 8).numpy()
    buffer.release()
    assert owner() is not None
    del view
    assert owner() is None


def test_wrapped_memory_map_that_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(np.arange(1024, dtype=np.float32).tobytes())
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    address = np.frombuffer(pages, np.uint8).ctypes.data
    buffer = Buffer.wrap(pages, address, len(pages), CPU, writable=False, alive=lambda: not pages.closed)
    tensor = Tensor(buffer, "float32", (256, 4))
    assert tensor[255].tolist() == [1020.0, 1021.0, 1022.0, 1023.0]
    pages.close()
    with pytest.raises(MemoryLifetimeError, match=r"4 KiB on cpu was closed by its owner; keep it open"):
        tensor.numpy()
    with pytest.raises(MemoryLifetimeError):
        _ = tensor.address


def test_wrap_refuses_what_is_no_memory() -> None:
    for address, nbytes in ((0, 8), (64, -1), (-64, 8)):
        with pytest.raises(UsageError, match="not a piece of memory"):
            Buffer.wrap(None, address, nbytes, CPU, writable=True)
    assert Buffer.wrap(None, 0, 0, CPU, writable=True).address == 0


def test_copy_with_offsets() -> None:
    src, dst = buffer_of(b"abcdefgh"), buffer_of(b"........")
    dst.copy_from(src, 3, dst_offset=4, src_offset=2)
    assert bytes_of(dst) == b"....cde."
    dst.copy_from(src, src_offset=6)
    assert bytes_of(dst) == b"gh..cde."
    dst.copy_from(src)
    assert bytes_of(dst) == b"abcdefgh"
    dst.copy_from(src, 0, dst_offset=8, src_offset=8)
    assert bytes_of(dst) == b"abcdefgh"


@pytest.mark.parametrize(("dst_offset", "src_offset"), [(0, 3), (3, 0), (2, 2)])
def test_copy_onto_itself(dst_offset: int, src_offset: int) -> None:
    data = bytes(range(100))
    buffer = buffer_of(data)
    buffer.copy_from(buffer, 97, dst_offset=dst_offset, src_offset=src_offset)
    expected = bytearray(data)
    expected[dst_offset : dst_offset + 97] = data[src_offset : src_offset + 97]
    assert bytes_of(buffer) == bytes(expected)


@pytest.mark.parametrize(
    "arguments", [(9, 0, 0), (8, 1, 0), (8, 0, 1), (1, -1, 0), (1, 0, -1), (-1, 0, 0), (None, 0, 9)]
)
def test_copy_is_bounds_checked(arguments: tuple[int | None, int, int]) -> None:
    src, dst = buffer_of(b"abcdefgh"), buffer_of(b"........")
    with pytest.raises(UsageError, match="reach outside a buffer of 8 bytes"):
        dst.copy_from(src, *arguments)
    assert bytes_of(dst) == b"........"


def test_fill() -> None:
    buffer = buffer_of(b"abcd")
    buffer.fill(65)
    assert bytes_of(buffer) == b"AAAA"
    for byte in (-1, 256):
        with pytest.raises(UsageError, match="a byte is from 0 to 255"):
            buffer.fill(byte)
    CPU.allocator.allocate(0).fill(1)


def test_read_only_memory_is_not_written() -> None:
    array = np.arange(4, dtype=np.uint8)
    buffer = wrapped(array, writable=False)
    for write in (lambda: buffer.fill(0), lambda: buffer.copy_from(buffer)):
        with pytest.raises(UsageError, match="read-only"):
            write()
    assert array.tolist() == [0, 1, 2, 3]
