"""A CUDA device, real or emulated: copies, fills, recording, collecting, host memory, events."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from kuiperllm.backends.cuda.backend import CudaBackend
from kuiperllm.backends.cuda.bandwidth import read_bandwidth
from kuiperllm.backends.cuda.launch import Kernel, collecting, compile_all, launch
from kuiperllm.backends.cuda.memory import SMALL_COPY_BYTES
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.errors import DeviceError

ADD_ONE = """\
#include "common.cuh"
extern "C" __global__ void __launch_bounds__(64) add_one(int* x, int n) {
    launch_next();
    wait_for_previous();
    int i = blockIdx.x * 64 + threadIdx.x;
    if (i < n) x[i] += 1;
}
"""


@pytest.fixture(scope="module")
def add_one(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    path = tmp_path_factory.mktemp("kernels") / "add_one.cu"
    path.write_text(ADD_ONE)
    return Kernel(path, "add_one")


def backend(device: Device) -> CudaBackend:
    return cast("CudaBackend", device.backend)


def put(values: object, device: Device) -> Tensor:
    return Tensor.from_numpy(np.asarray(values, np.int32)).to(device)


# --- copies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 65, SMALL_COPY_BYTES, SMALL_COPY_BYTES + 1, 4 << 20, (70 << 20) + 3])
def test_there_and_back(cuda: Device, size: int) -> None:
    values = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    source = values.copy()
    there = Tensor.from_numpy(source).to(cuda)
    source[:] = 0  # after a copy the source may be overwritten
    assert np.array_equal(there.numpy(), values)


def test_many_small_copies(cuda: Device) -> None:
    tensors = []
    scratch = np.empty(5000, np.int32)
    for i in range(300):  # the ring of page-locked memory goes round
        scratch[:] = i
        tensors.append(Tensor.from_numpy(scratch).to(cuda))
    assert all((tensor.numpy() == i).all() for i, tensor in enumerate(tensors))


@pytest.mark.parametrize(("dst", "src"), [(0, 10), (10, 0), (0, 40), (5, 5)])
def test_copies_within_a_buffer(cuda: Device, dst: int, src: int) -> None:
    values = np.arange(100, dtype=np.uint8)
    there = Tensor.from_numpy(values.copy()).to(cuda)
    there.buffer.copy_from(there.buffer, 50, dst, src)
    values[dst : dst + 50] = values[src : src + 50].copy()
    assert np.array_equal(there.numpy(), values)


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32", "int64"])
@pytest.mark.parametrize("shape", [(3,), (4, 5), (2, 3, 4), (2, 1, 3, 2, 2), (2, 3, 2, 2, 3, 2)])
def test_strided_copies(cuda: Device, shape: tuple[int, ...], dtype: str) -> None:
    rng = np.random.default_rng(len(shape))
    values = rng.integers(0, 100, shape).astype(dtype)
    there = Tensor.from_numpy(values).to(cuda)
    order = [int(axis) for axis in rng.permutation(len(shape))]
    assert np.array_equal(there.permute(*order).contiguous().numpy(), values.transpose(order))
    assert np.array_equal(there[::-2].contiguous().numpy(), values[::-2])
    there.copy_(there[::-1])  # they overlap
    assert np.array_equal(there.numpy(), values[::-1])


def test_repeated_elements_and_fills(cuda: Device) -> None:
    assert Tensor.full((3, 4), 1.5, DType.bfloat16, cuda).tolist() == [[1.5] * 4] * 3
    there = Tensor.empty((5,), "uint8", cuda)
    there.buffer.fill(7)
    assert there.tolist() == [7] * 5
    assert Tensor.empty((0, 4), "float32", cuda).clone().tolist() == []


def test_host_to_host_is_not_its_work(cuda: Device) -> None:
    from kuiperllm.core.device import CopyKind

    with pytest.raises(DeviceError, match="cannot copy host to host"):
        cuda.backend.copy(0, 0, 1, CopyKind.host_to_host)


# --- recording --------------------------------------------------------------------------------------------


def test_replay(cuda: Device, add_one: Kernel) -> None:
    x = put([1, 2, 3], cuda)
    with cuda.capture() as graph:
        y = x.T.clone()
        launch(add_one, 1, 64, y, 3)
    x.copy_(put([10, 20, 30], cuda))
    for _ in range(2):
        graph.replay()
    assert y.tolist() == [11, 21, 31]


def test_copies_from_the_host_are_not_recorded(cuda: Device, add_one: Kernel) -> None:
    x = put([0, 0], cuda)
    with cuda.capture() as graph:
        x.copy_(Tensor.from_numpy(np.array([5, 6], np.int32)))
        launch(add_one, 1, 64, x, 2)
    assert x.tolist() == [5, 6]
    graph.replay()
    graph.replay()
    assert x.tolist() == [7, 8]


def test_a_graph_keeps_the_memory_of_its_kernels(cuda: Device, add_one: Kernel) -> None:
    x = put([0] * 64, cuda)
    address = x.address
    with cuda.capture() as graph:
        launch(add_one, 1, 64, x, 64)
    del x
    others = [Tensor.empty((64,), "int32", cuda) for _ in range(50)]
    assert address not in [other.address for other in others]
    graph.replay()
    del graph
    again = [Tensor.empty((64,), "int32", cuda) for _ in range(2)]
    assert again


def test_threads_do_not_record_each_others_work(cuda: Device, add_one: Kernel) -> None:
    x, y = put([0], cuda), put([0], cuda)
    with cuda.capture() as graph:
        launch(add_one, 1, 64, x, 1)
        thread = threading.Thread(target=launch, args=(add_one, 1, 64, y, 1))
        thread.start()
        thread.join()
    assert (x.tolist(), y.tolist()) == ([0], [1])
    graph.replay()
    assert (x.tolist(), y.tolist()) == ([1], [1])


def test_a_capture_that_fails_leaves_no_trace(cuda: Device, add_one: Kernel) -> None:
    x = put([0], cuda)

    def fail() -> None:
        with cuda.capture():
            launch(add_one, 1, 64, x, 1)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    launch(add_one, 1, 64, x, 1)
    assert x.tolist() == [1]
    with cuda.capture(), pytest.raises(DeviceError, match="already being captured"), cuda.capture():
        pass


# --- collecting -------------------------------------------------------------------------------------------


def test_collecting_runs_nothing(cuda: Device, add_one: Kernel) -> None:
    x = put([1, 2], cuda)
    never = Kernel(Path("nowhere.cu"), "never")
    with collecting(cuda) as kernels:
        launch(add_one, 1, 64, x, 2)
        launch(never, 1, 64, x)
        launch(add_one, 1, 64, x, 2)
        x.buffer.fill(0)
        with cuda.capture() as graph:
            launch(never, 1, 64, x)
        graph.replay()
        assert x.tolist() == [0, 0], "copies to the host give zeros"
    assert list(kernels) == [add_one, never]
    assert x.tolist() == [1, 2]
    assert compile_all([add_one], cuda) in (0, 1)
    assert compile_all([add_one], cuda) == 0


def test_prepare(cuda: Device, add_one: Kernel) -> None:
    x = put([1], cuda)
    fresh = Kernel(add_one.source, "add_one", UNUSED=int(np.random.default_rng().integers(1 << 40)))
    cuda.backend.prepare(lambda: launch(fresh, 1, 64, x, 1))
    assert x.tolist() == [1]
    assert cuda in fresh.loaded


# --- host memory and events -------------------------------------------------------------------------------


def test_pinned_memory_is_seen_from_both_sides(cuda: Device, add_one: Kernel) -> None:
    array, tensor = cuda.backend.pinned((2, 3), "int32")
    assert (tensor.device, tensor.shape, array.shape, array.dtype) == (cuda, (2, 3), (2, 3), np.int32)
    assert not array.any()
    array[1] = 5
    launch(add_one, 1, 64, tensor, 6)
    cuda.backend.record().wait()
    assert array.tolist() == [[1, 1, 1], [6, 6, 6]]
    kept = array[1]
    del array, tensor
    cuda.backend.pinned((1,), "int32")
    assert kept.tolist() == [6, 6, 6]


def test_events(cuda: Device, add_one: Kernel) -> None:
    x = put([0], cuda)
    start = backend(cuda).record(timing=True)
    launch(add_one, 1, 64, x, 1)
    assert backend(cuda).record(timing=True).ms_since(start) >= 0
    for _ in range(3):
        backend(cuda).record().wait()


def test_facts(cuda: Device) -> None:
    assert {"name", "compute_capability", "multiprocessors", "memory"} <= cuda.backend.properties.keys()
    assert isinstance(cuda.backend.stream_handle, int)
    assert cuda.memory_info().free_bytes <= cuda.memory_info().total_bytes
    assert backend(cuda).peers() == ()
    assert read_bandwidth(backend(cuda), 1 << 20) > 0


# --- a real GPU -------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_torch_takes_our_memory_and_we_take_its() -> None:
    torch = pytest.importorskip("torch")
    cuda = Device("cuda:0")
    ours = put([1, 2, 3], cuda)
    theirs = torch.from_dlpack(ours)
    assert theirs.device.type == "cuda"
    theirs += 1
    torch.cuda.synchronize()
    assert ours.tolist() == [2, 3, 4]
    back = Tensor.from_dlpack(torch.arange(4, dtype=torch.float32, device="cuda") * 2)
    assert back.device is cuda
    assert back.tolist() == [0.0, 2.0, 4.0, 6.0]


@pytest.mark.gpu
def test_copies_reach_the_speed_of_the_bus() -> None:
    """PCIe 4 x16 moves 25 GB/s; a quarter of that shows that threads, ring and bus work side by side."""
    import time

    cuda = Device("cuda:0")
    here = Tensor.zeros((1 << 30,), "uint8")
    there = here.to(cuda)
    cuda.synchronize()
    started = time.perf_counter()
    there.copy_(here)
    cuda.synchronize()
    assert (1 << 30) / (time.perf_counter() - started) > 6e9
