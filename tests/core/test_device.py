"""Devices: finding them, and moving tensors between two of them."""

from __future__ import annotations

import copy
import ctypes
import pickle
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kuiperllm.backends.cpu.backend import CpuBackend
from kuiperllm.core import Allocator, Device, DType, Tensor, device
from kuiperllm.core.device import Backend, CopyKind, Event, Graph, MemoryInfo
from kuiperllm.errors import DeviceError

# --- names ------------------------------------------------------------------------------------------------


def test_there_is_one_object_for_each_device() -> None:
    cpu = Device("cpu")
    assert Device("cpu") is cpu
    assert Device("cpu:0") is cpu
    assert Device(cpu) is cpu
    assert Device() is cpu
    assert copy.deepcopy(cpu) is pickle.loads(pickle.dumps(cpu)) is cpu
    assert len({cpu, Device("cpu:0")}) == 1
    assert (repr(cpu), str(cpu), cpu.type, cpu.index, cpu.is_host) == ("Device('cpu')", "cpu", "cpu", 0, True)


@pytest.mark.parametrize("name", ["tpu", "CPU", "", "cpu:", "cpu:x", "cpu:-1", "cpu\n", 3, ["cpu"]])
def test_unknown_device(name: str) -> None:
    with pytest.raises(DeviceError, match=r'unknown device .*; devices are .*"cpu".* and "auto"$'):
        Device(name)


def test_the_host_is_one_device() -> None:
    with pytest.raises(DeviceError, match='there is no device "cpu:1"'):
        Device("cpu:1")


def test_cpu_properties_and_waiting() -> None:
    cpu = Device("cpu")
    assert cpu.backend.name == "cpu"
    assert cpu.backend.properties["logical_processors"]
    assert isinstance(cpu.allocator, Allocator)
    cpu.synchronize()
    with pytest.raises(DeviceError, match="cannot copy host to device"):
        cpu.backend.copy(0, 0, 0, CopyKind.host_to_device)


# --- a second device --------------------------------------------------------------------------------------

DEVICE_OFFSET = 1 << 52


class FarBackend(Backend):
    """A device in host memory whose addresses are shifted, so that mixing the two up is a crash."""

    name = "cuda"

    def __init__(self, index: int) -> None:
        if index > 1:
            raise DeviceError(f'there is no device "cuda:{index}"')
        self.cpu = CpuBackend()
        self.source = FarMemory()
        self.copies: list[CopyKind] = []
        self.waits = 0

    def copy(self, dst_address: int, src_address: int, nbytes: int, kind: CopyKind) -> None:
        self.copies.append(kind)
        to_host = kind is CopyKind.device_to_host
        from_host = kind is CopyKind.host_to_device
        dst = dst_address if to_host else dst_address - DEVICE_OFFSET
        src = src_address if from_host else src_address - DEVICE_OFFSET
        ctypes.memmove(dst, src, nbytes)

    def copy_strided(
        self,
        dst_address: int,
        dst_strides: Sequence[int],
        src_address: int,
        src_strides: Sequence[int],
        shape: Sequence[int],
        itemsize: int,
    ) -> None:
        dst, src = dst_address - DEVICE_OFFSET, src_address - DEVICE_OFFSET
        self.cpu.copy_strided(dst, dst_strides, src, src_strides, shape, itemsize)

    def fill(self, address: int, byte: int, nbytes: int) -> None:
        ctypes.memset(address - DEVICE_OFFSET, byte, nbytes)

    def synchronize(self) -> None:
        self.waits += 1

    def capture(self, beside: Graph | None = None) -> AbstractContextManager[Graph]:
        raise DeviceError("nothing to capture")

    def record(self) -> Event:
        raise DeviceError("nothing to wait for")

    def pinned(self, shape: Any, dtype: Any) -> Any:
        raise DeviceError("nothing to share")

    @property
    def properties(self) -> Mapping[str, object]:
        return {}


class FarMemory(type(CpuBackend().source)):  # type: ignore[misc]
    def reserve(self, nbytes: int) -> int:
        return int(super().reserve(nbytes)) + DEVICE_OFFSET

    def release(self, address: int, nbytes: int) -> None:
        super().release(address - DEVICE_OFFSET, nbytes)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Device:
    module = ModuleType("kuiperllm.backends.cuda")
    module.create = FarBackend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(device, "_backend_names", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(Device, "_known", {"cpu": Device("cpu")})
    return Device("cuda:0")


def test_names_of_a_second_back_end(far: Device) -> None:
    assert (far.type, far.index, far.is_host, str(far)) == ("cuda", 0, False, "cuda:0")
    assert Device("cuda") is Device("cuda:0") is Device("auto") is far
    assert Device("cuda:1") is not far
    with pytest.raises(DeviceError, match='there is no device "cuda:2"'):
        Device("cuda:2")
    with pytest.raises(DeviceError, match='devices are "cpu", "cuda:0" and "auto"'):
        Device("tpu")
    assert isinstance(far.memory_info(), MemoryInfo)


def test_auto_falls_back_when_there_is_no_gpu(far: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int) -> Backend:
        raise DeviceError("no driver")

    monkeypatch.setattr(sys.modules["kuiperllm.backends.cuda"], "create", refuse)
    monkeypatch.setattr(Device, "_known", {"cpu": Device("cpu")})
    assert str(Device("auto")) == "cpu"
    with pytest.raises(DeviceError, match="no driver"):
        Device("cuda:0")


def test_there_and_back(far: Device) -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    here = Tensor.from_numpy(values)
    there = here.to(far)
    assert there.device is far
    assert there.to(far) is there
    assert np.array_equal(there.numpy(), values)
    assert np.array_equal(there.to("cpu").numpy(), values)
    assert there.tolist() == values.tolist()
    assert "device=cuda:0)\n[[[ 0." in repr(there)
    copied = there.numpy()
    copied[:] = 0
    assert np.array_equal(there.numpy(), values)  # from another device, numpy() is a copy
    assert far.backend.copies[:2] == [CopyKind.host_to_device, CopyKind.device_to_host]  # type: ignore[attr-defined]


def test_strided_copies_between_devices(far: Device) -> None:
    values = np.arange(24, dtype=np.int32).reshape(4, 6)
    here = Tensor.from_numpy(values)
    assert np.array_equal(here.T[::-2].to(far).numpy(), values.T[::-2])
    there = here.to(far)
    assert np.array_equal(there.T[1:].to("cpu").numpy(), values.T[1:])
    assert np.array_equal(there[:, ::-1].contiguous().numpy(), values[:, ::-1])
    target = Tensor.zeros((4, 6), "int32", far)
    target.T[::2].copy_(here.T[1::2])
    expected = np.zeros((4, 6), np.int32)
    expected.T[::2] = values.T[1::2]
    assert np.array_equal(target.numpy(), expected)
    back = np.zeros((6, 4), np.int32)
    Tensor.from_numpy(back).T.copy_(there)
    assert np.array_equal(back.T, values)


def test_device_to_device(far: Device) -> None:
    other = Device("cuda:1")
    values = np.arange(10, dtype=np.int64)
    there = Tensor.from_numpy(values).to(far)
    elsewhere = there[::3].to(other)
    assert elsewhere.device is other
    assert np.array_equal(elsewhere.numpy(), values[::3])
    assert other.backend.copies[0] is CopyKind.device_to_device  # type: ignore[attr-defined]


def test_values_are_made_on_the_device(far: Device) -> None:
    assert Tensor.zeros((2, 2), "int8", far).tolist() == [[0, 0], [0, 0]]
    assert Tensor.full((2, 2), 1.5, DType.bfloat16, "cuda:0").tolist() == [[1.5, 1.5], [1.5, 1.5]]
    stats = far.allocator.stats()
    assert stats.allocated_bytes == 0
    assert stats.num_allocations > 0


def test_dlpack_from_a_device_waits_for_it(far: Device) -> None:
    there = Tensor.from_numpy(np.arange(4, dtype=np.float32)).to(far)
    assert there.__dlpack_device__() == (2, 0)
    back = Tensor.from_dlpack(there)
    assert back.device is far
    assert back.address == there.address
    assert far.backend.waits == 1  # type: ignore[attr-defined]
    there.__dlpack__(stream=-1)
    assert far.backend.waits == 1  # type: ignore[attr-defined]
    host = np.from_dlpack(there, device="cpu")
    assert host.tolist() == [0.0, 1.0, 2.0, 3.0]
