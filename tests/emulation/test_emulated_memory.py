"""What the emulated device notices about memory, copies, dependent launches and graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kuiperllm.core import Device, DType, Tensor
from kuiperllm.errors import DeviceError, OutOfMemoryError

ONES = np.ones(100, np.float32)


@pytest.mark.parametrize(("index", "side"), [(100, "behind"), (-1, "in front of")])
def test_writes_beside_a_buffer(run: Any, index: int, side: str) -> None:
    with pytest.raises(
        DeviceError, match=f"kernel probe: wrote outside its memory: just {side} a piece of 400 bytes"
    ):
        run(f"a[{index}] = 3.f;", 1, ONES)


def test_a_copy_that_goes_too_far(run: Any) -> None:
    with pytest.raises(DeviceError, match="wrote outside its memory: just behind"):
        run("for (int i = 0; i <= 100; i++) b[i] = a[i];", 1, ONES, ONES)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("a[0] = *(volatile float*)64;", "accessed memory that is not there, at 0x40"),
        ("float4 v = *(float4*)(a + 1);\na[0] = v.x;", r"probe0.cu:5: accessed 0x\w+, which is not aligned"),
        ("float v[4] = {};\nv[b] = 1;\na[0] = v[b];", r"probe0.cu:6: index 7 is outside its array"),
        ("__shared__ int v[4];\nv[b] = 1;\na[0] = v[b];", r"probe0.cu:6: index 7 is outside its array"),
        ("a[0] = 1 / (b - 7);", r"probe0.cu:5: division by zero"),
        ("__trap();", r"probe0.cu:5: __trap\(\)"),
        ("shared_memory[1024] = 1;", "wrote behind its dynamic shared memory"),
        ("char* p = shared_memory;\np[-b] = 1;", "wrote in front of its dynamic shared memory"),
        ("copy_async(shared_memory + 8, a);", "not 16-byte aligned"),
        ("copy_async(shared_memory + 1024, a);", "is not shared memory of this block"),
        ("unsigned r[4];\nload_matrices(r, a);", "load_matrices from .* not 16-byte aligned shared memory"),
    ],
)  # fmt: skip
def test_bad_accesses(run: Any, body: str, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        run(body, 1, ONES, 7, shared=1024)
    np.testing.assert_array_equal(run("a[0] = 2;", 1, ONES)[0][:2], [2, 1])


def test_new_freed_and_shared_memory_is_nan(run: Any, emulated_cuda: Device) -> None:
    assert np.isnan(Tensor.empty((7,), DType.float32, device="cuda:0").numpy()).all()
    body = """
    __shared__ float s[2];
    float* d = (float*)shared_memory;
    a[blockIdx.x] = s[1];
    a[2 + blockIdx.x] = d[7];
    s[1] = d[7] = 1;
    """
    (found,) = run(body, 1, np.zeros(4, np.float32), grid=2, shared=32)
    assert np.isnan(found).all()
    address = emulated_cuda.allocator.allocate(64).address
    again = emulated_cuda.allocator.allocate(64)
    assert again.address == address
    assert np.isnan(Tensor(again, DType.float32, (16,), (1,)).numpy()).all()


def test_more_memory_than_there_is(emulated_cuda: Device) -> None:
    with pytest.raises(OutOfMemoryError, match=r"needs 16\.00 GiB"):
        emulated_cuda.allocator.allocate(16 << 30)


# --- asynchronous copies ----------------------------------------------------------------------------------

RING = """
    float* ring = (float*)shared_memory;
    for (int i = 0; i < 3; i++) { copy_async(ring + i * 4, a + i * 4); commit_copies(); }
    for (int i = 0; i < 20; i++) {
        WAIT
        for (int j = 0; j < 4; j++) b[i * 4 + j] = ring[i % 4 * 4 + j];
        if (i + 3 < 20) copy_async_or_zero(ring + (i + 3) % SLOTS * 4, a + (i + 3) * 4, i % 2 == 0);
        commit_copies();
    }
    wait_for_copies<0>();
"""


def _ring(run: Any, emulator: Any, wait: str, slots: int) -> list[bool]:
    right = []
    source = np.arange(80, dtype=np.float32)
    expected = np.where((np.arange(20) < 3) | (np.arange(20) % 2 == 1), 1, 0).repeat(4) * source
    for emulator.seed in (0, 1):
        body = RING.replace("WAIT", wait).replace("SLOTS", str(slots))
        _, found = run(body, 1, source, np.zeros(80, np.float32), shared=64)
        right.append(np.array_equal(found, expected))
    return right


def test_a_ring_of_asynchronous_copies(run: Any, emulator: Any) -> None:
    assert _ring(run, emulator, "wait_for_copies<2>();", 4) == [True, True]


@pytest.mark.parametrize(
    ("wait", "slots"), [("", 4), ("wait_for_copies<3>();", 4), ("wait_for_copies<2>();", 3)]
)
def test_a_ring_with_a_mistake(run: Any, emulator: Any, wait: str, slots: int) -> None:
    assert not all(_ring(run, emulator, wait, slots))


def test_a_copy_that_nobody_waits_for(run: Any, emulator: Any) -> None:
    """It may arrive after what the thread writes there later."""
    body, said = "copy_async(shared_memory, a); commit_copies();", []
    for emulator.seed in (0, 1):
        try:
            run(body, 1, np.zeros(4, np.float32), shared=16)
        except DeviceError as error:
            said.append(str(error))
    assert len(said) == 1  # with one of the two seeds, copies are done at once
    assert "a copy that it did not wait for" in said[0]


# --- dependent launch -------------------------------------------------------------------------------------

CHAIN = """#include "common.cuh"
extern "C" __global__ void first(float* x) { wait_for_previous(); x[threadIdx.x] = 5; }
extern "C" __global__ void good(const float* w, const float* x, float* y) {
    float weight = w[threadIdx.x];
    wait_for_previous();
    y[blockIdx.x * 32 + threadIdx.x] = weight * x[threadIdx.x];
}
extern "C" __global__ void early_read(const float* w, const float* x, float* y) {
    float value = x[threadIdx.x];
    wait_for_previous();
    y[blockIdx.x * 32 + threadIdx.x] = w[threadIdx.x] * value;
}
extern "C" __global__ void early_write(const float* w, const float* x, float* y) {
    y[blockIdx.x * 32 + threadIdx.x] = 0;
    wait_for_previous();
    y[blockIdx.x * 32 + threadIdx.x] = w[threadIdx.x] * x[threadIdx.x];
}
extern "C" __global__ void never(const float* w, const float* x, float* y) {
    y[blockIdx.x * 32 + threadIdx.x] = w[threadIdx.x] * x[threadIdx.x];
}
extern "C" __global__ void sometimes(const float* w, const float* x, float* y) {
    if (threadIdx.x == 9) return;
    wait_for_previous();
}
"""


@pytest.fixture
def chain(emulator: Any, tmp_path: Path) -> Any:
    from kuiperllm.backends.cuda.launch import Kernel, launch

    source = tmp_path / "chain.cu"
    source.write_text(CHAIN)

    def call(second: str) -> np.ndarray[Any, Any]:
        w, x, y = (Tensor.full((n,), 2.0, DType.float32, "cuda:0") for n in (32, 32, 96))
        launch(Kernel(source, "first"), 1, 32, x)
        launch(Kernel(source, second), 3, 32, w, x, y)
        return y.numpy()

    return call


@pytest.mark.parametrize("seed", [0, 1])
def test_waiting_for_the_kernel_in_front(chain: Any, emulator: Any, seed: int) -> None:
    emulator.seed = seed
    assert (chain("good") == 10).all()
    assert np.isnan(chain("early_read")).all()
    with pytest.raises(
        DeviceError, match=r"kernel early_write.*: wrote to memory before wait_for_previous\(\)"
    ):
        chain("early_write")
    with pytest.raises(
        DeviceError, match=r"kernel never.* thread \(\d+, 0, 0\) ended without wait_for_previous\(\)"
    ):
        chain("never")
    with pytest.raises(DeviceError, match=r"thread \(9, 0, 0\) ended without wait_for_previous\(\)"):
        chain("sometimes")
    emulator.overlaps = False
    assert (chain("early_read") == 10).all()


def test_what_was_waited_for_may_be_read_early(emulator: Any, tmp_path: Path, emulated_cuda: Device) -> None:
    from kuiperllm.backends.cuda.launch import Kernel, launch

    source = tmp_path / "chain.cu"
    source.write_text(CHAIN)
    w, x, y = (Tensor.full((n,), 2.0, DType.float32, "cuda:0") for n in (32, 32, 96))
    launch(Kernel(source, "first"), 1, 32, x)
    emulated_cuda.synchronize()
    launch(Kernel(source, "early_read"), 3, 32, w, x, y)
    assert (y.numpy() == 10).all()


# --- graphs -----------------------------------------------------------------------------------------------


def test_graphs_replay_on_the_same_memory(emulated_cuda: Device, emulator: Any, tmp_path: Path) -> None:
    from kuiperllm.backends.cuda.launch import Kernel, launch

    source = tmp_path / "count.cu"
    source.write_text(
        '#include "common.cuh"\nextern "C" __global__ void count(float* x, int n, float by) '
        "{ wait_for_previous(); if ((int)threadIdx.x < n) x[threadIdx.x] += by; }\n"
    )
    kernel = Kernel(source, "count")
    x = Tensor.full((8,), 0.0, DType.float32, "cuda:0")
    with emulated_cuda.capture() as graph:
        launch(kernel, 1, 32, x, 8, 1.0)
        launch(kernel, 1, 32, x, 4, 0.5)
    assert (x.numpy() == 0).all()
    for _ in range(3):
        graph.replay()
    np.testing.assert_array_equal(x.numpy(), [4.5] * 4 + [3] * 4)
