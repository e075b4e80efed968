"""DLPack both ways: values, lifetimes, the capsule protocol, refusals."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from kuiperllm.core import Device, DType, Tensor
from kuiperllm.errors import DeviceError, DLPackError, DTypeError

NUMPY_TYPES = [dtype for dtype in DType if dtype is not DType.bfloat16]


def allocated() -> int:
    return Device("cpu").allocator.stats().allocated_bytes


def sample(dtype: DType) -> Tensor:
    tensor = Tensor.empty((3, 4), dtype)
    tensor.numpy()[:] = np.arange(12).reshape(3, 4)
    return tensor


class Producer:
    """Offers a capsule made by hand."""

    def __init__(self, capsule: Any, device: tuple[int, int] = (1, 0)) -> None:
        self.capsule = capsule
        self.device = device

    def __dlpack__(self, **options: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


class OldProducer:
    """Like a library from before DLPack 1: it does not know `max_version`."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, stream: int | None = None) -> Any:
        return self.tensor.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def name_of(capsule: Any) -> str:
    return repr(capsule).split('"')[1]


@pytest.mark.parametrize("dtype", NUMPY_TYPES)
@pytest.mark.parametrize("index", [..., (slice(None, None, 2), slice(None, None, -1)), (1,), (1, 2)])
def test_numpy_takes_our_memory(dtype: DType, index: Any) -> None:
    tensor = sample(dtype)
    array = np.from_dlpack(tensor[index])
    assert array.dtype == dtype.numpy
    assert np.array_equal(array, np.arange(12, dtype=dtype.numpy).reshape(3, 4)[index])
    tensor.numpy()[:] = 5
    assert (array == 5).all()


@pytest.mark.parametrize("dtype", NUMPY_TYPES)
@pytest.mark.parametrize("index", [..., (slice(None, None, 2), slice(None, None, -1)), (1,), (1, 2)])
def test_we_take_numpys_memory(dtype: DType, index: Any) -> None:
    array = np.arange(12, dtype=dtype.numpy).reshape(3, 4)
    view = np.asarray(array[index])
    tensor = Tensor.from_dlpack(view)
    assert tensor.dtype is dtype
    assert tensor.shape == view.shape
    assert tensor.address == view.ctypes.data
    assert np.array_equal(tensor.numpy(), view)


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("old", [False, True])
def test_through_our_own_capsules(dtype: DType, old: bool) -> None:
    tensor = sample(dtype)[1:, ::-2]
    back = Tensor.from_dlpack(OldProducer(tensor) if old else tensor)
    assert (back.dtype, back.shape, back.strides) == (dtype, tensor.shape, tensor.strides)
    assert back.address == tensor.address
    assert back.tolist() == [[7.0, 5.0], [11.0, 9.0]]


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (), (1, 1)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    tensor = Tensor.full(shape, 2)
    assert np.from_dlpack(tensor).shape == shape
    back = Tensor.from_dlpack(tensor)
    assert back.shape == shape
    assert back.tolist() == np.full(shape, 2.0).tolist()


def test_the_memory_lives_as_long_as_the_consumer() -> None:
    start = allocated()
    tensor = sample(DType.float32)
    array = np.from_dlpack(tensor)
    again = Tensor.from_dlpack(array)
    del tensor, array
    assert allocated() == start + 64
    assert again.tolist()[2] == [8.0, 9.0, 10.0, 11.0]
    del again
    assert allocated() == start


@pytest.mark.parametrize("version", [None, (0, 8), (1, 0), (1, 9), (2, 0)])
def test_an_unused_capsule_frees_the_memory(version: tuple[int, int] | None) -> None:
    start = allocated()
    tensor = sample(DType.float32)
    capsule = tensor.__dlpack__(max_version=version)
    assert name_of(capsule) == ("dltensor" if version in (None, (0, 8)) else "dltensor_versioned")
    del tensor
    assert allocated() == start + 64
    del capsule
    assert allocated() == start


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_a_capsule_is_consumed_once(version: tuple[int, int] | None) -> None:
    capsule = sample(DType.float32).__dlpack__(max_version=version)
    taken = Tensor.from_dlpack(Producer(capsule))
    assert name_of(capsule).startswith("used_dltensor")
    with pytest.raises(DLPackError, match="consumed before"):
        Tensor.from_dlpack(Producer(capsule))
    start = allocated()
    del capsule
    assert allocated() == start
    assert taken[0, 1].item() == 1.0
    del taken
    assert allocated() == start - 64


def test_foreign_memory_is_deleted_exactly_once() -> None:
    calls: list[int] = []
    deleter = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(calls.append)
    from kuiperllm.core import dlpack

    values = (ctypes.c_float * 6)(*range(6))
    shape = (ctypes.c_int64 * 2)(2, 3)
    managed = dlpack._DLManagedTensor()
    view = managed.dl_tensor
    view.data, view.byte_offset = ctypes.addressof(values) - 4, 4
    view.device.device_type, view.ndim = 1, 2
    view.dtype.code, view.dtype.bits, view.dtype.lanes = 2, 32, 1
    view.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
    managed.deleter = ctypes.cast(deleter, ctypes.c_void_p).value
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
        ("PyCapsule_New", ctypes.pythonapi)
    )
    name = b"dltensor"
    tensor = Tensor.from_dlpack(Producer(new(ctypes.addressof(managed), name, None)))
    assert tensor.strides == (3, 1)  # no strides means contiguous
    row = tensor[1]
    array = row.numpy()
    del tensor, row
    gc.collect()
    assert array.tolist() == [3.0, 4.0, 5.0]
    assert calls == []
    del array
    assert calls == [ctypes.addressof(managed)]

    view.dtype.code = 6  # refused before it is taken: the capsule still owns it
    capsule = new(ctypes.addressof(managed), name, None)
    with pytest.raises(DTypeError, match="code 6, 32 bits, 1 lanes is not supported; supported: float32"):
        Tensor.from_dlpack(Producer(capsule))
    assert name_of(capsule) == "dltensor"
    assert len(calls) == 1


def test_read_only_memory_stays_read_only() -> None:
    values = np.arange(4, dtype=np.float32)
    values.flags.writeable = False
    tensor = Tensor.from_numpy(values)
    assert not tensor.writable
    assert not np.from_dlpack(tensor).flags.writeable
    assert not Tensor.from_dlpack(tensor).writable
    assert not Tensor.from_dlpack(values).writable
    with pytest.raises(DLPackError, match=r"knows only DLPack 0; clone\(\) it"):
        tensor.__dlpack__()
    assert Tensor.from_dlpack(Producer(tensor.__dlpack__(copy=True))).writable


def test_a_copy_on_request() -> None:
    tensor = sample(DType.int32)
    shared, copied = np.from_dlpack(tensor, copy=False), np.from_dlpack(tensor, copy=True)
    tensor.numpy()[0, 0] = 99
    assert (shared[0, 0], copied[0, 0]) == (99, 0)
    with pytest.raises(DLPackError, match="cannot go to another device without a copy"):
        tensor.__dlpack__(dl_device=(2, 0), copy=False)


def test_refusals() -> None:
    with pytest.raises(DLPackError, match="an object of type list does not support DLPack"):
        Tensor.from_dlpack([1, 2])
    with pytest.raises(DeviceError, match="DLPack device type 7 is not supported"):
        Tensor.from_dlpack(Producer(None, (7, 0)))
    with pytest.raises(DTypeError, match="float32, float16"):
        Tensor.from_dlpack(np.zeros(3))
    with pytest.raises(DLPackError, match="not a DLPack capsule"):
        Tensor.from_dlpack(Producer("nonsense"))
    assert issubclass(DLPackError, BufferError)


def test_an_error_of_the_consumer_is_not_lost() -> None:
    start = allocated()
    # NumPy drops the capsule while it raises, so that its destructor runs with the exception pending.
    with pytest.raises(RuntimeError, match="Unsupported dtype"):
        np.from_dlpack(sample(DType.bfloat16))
    assert allocated() == start


def test_arrays_may_outlive_the_interpreter() -> None:
    script = (
        "import sys, numpy as np\n"
        "from kuiperllm.core import Tensor\n"
        "zeros = Tensor.zeros(3)\n"
        "sys.kept = [np.from_dlpack(zeros), zeros.__dlpack__(), zeros.numpy(), Tensor.from_dlpack(zeros)]\n"
        "sys.kept.append(Tensor.from_dlpack(np.zeros(3, 'f4')))\n"
        "kept = list(sys.kept)\n"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", list(DType))
def test_torch_both_ways(dtype: DType) -> None:
    torch = pytest.importorskip("torch")
    start = allocated()
    ours = sample(dtype)
    theirs = torch.from_dlpack(ours.T)
    assert theirs.dtype is getattr(torch, dtype.value)
    assert theirs.tolist() == ours.T.tolist()
    back = Tensor.from_dlpack(theirs[1:])
    assert back.address == ours[:, 1].address
    assert back.tolist() == ours.T[1:].tolist()
    del ours, theirs, back
    assert allocated() == start
    made = torch.arange(6).to(getattr(torch, dtype.value)).reshape(2, 3)
    taken = Tensor.from_dlpack(made)
    del made
    assert taken.tolist() == [[0, 1, 2], [3, 4, 5]]
