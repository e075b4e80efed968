"""`cuda.core` and `cuda.bindings` as this project calls them, against a driver library that has no GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PREAMBLE = """
import ctypes, struct
from kuiperllm.backends.cuda.discovery import survey
from kuiperllm.backends.cuda.nvidia import NvidiaDriver
from kuiperllm.errors import KuiperError
stub = ctypes.CDLL("libcuda.so.1")
def refused(call, *args, **named):
    try:
        call(*args, **named)
    except KuiperError as error:
        print(f"{type(error).__name__}: {error}")
    else:
        print("no error")
"""

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("cuda", "cuda.bindings", "cuda.core")),
    reason="cuda.core is not installed",
)


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the driver library without a GPU."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C compiler to make a driver library with")
    folder = tmp_path_factory.mktemp("stub")
    command = [compiler, "-O1", "-shared", "-fPIC", "-xc", str(HERE / "stub_driver.c")]
    subprocess.run([*command, "-o", str(folder / "libcuda.so.1"), "-ldl"], check=True, timeout=120)
    return folder


def run(folder: Path | None, script: str, **environment: object) -> list[str]:
    """The lines that a script prints, with the stub as the driver."""
    settings = {f"STUB_{name.upper()}": str(value) for name, value in environment.items()}
    library = {"LD_LIBRARY_PATH": str(folder)} if folder is not None else {}
    process = subprocess.run(
        [sys.executable, "-W", "error", "-X", "faulthandler", "-c", PREAMBLE + script if folder else script],
        env=os.environ | settings | library,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


OPEN = "refused(NvidiaDriver, 0)"


# --- opening ----------------------------------------------------------------------------------------------


def test_facts(stub: Path) -> None:
    script = """
driver = NvidiaDriver(1)
print(*survey()[1], sep=" | ")
print(driver.chip)
print(stub.stub_current_device(), driver.can_access_peer(0), driver.can_access_peer(1))
"""
    gpus, chip, rest = run(stub, script)
    assert "name='Stub 1', total_bytes=8589934592, compute_capability=(9, 0)" in gpus
    assert chip == (
        "Chip(name='Stub 1', compute_capability=(9, 0), arch='sm_90a', multiprocessors=132, "
        "max_shared_bytes=232448, shared_bytes_per_multiprocessor=233472, l2_bytes=52428800, "
        "total_bytes=8589934592, pci_bus_id='0000:01:00.0', driver_version='13.0')"
    )
    assert rest == "1 True False"


@pytest.mark.parametrize(("capability", "arch"), [(80, "sm_80"), (89, "sm_89"), (120, "sm_120")])
def test_arch(stub: Path, capability: int, arch: str) -> None:
    assert run(stub, "print(NvidiaDriver(0).chip.arch)", capability=capability) == [arch]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": 0}, "the NVIDIA driver shows no GPU"),
        (
            {"version": 12020},
            "the NVIDIA driver supports CUDA 12.2, the installed cuda-bindings are for CUDA 13.",
        ),
        ({"init": 803}, "the NVIDIA driver (CUDA 13.0) does not start (CUDA_ERROR_SYSTEM_DRIVER_MISMATCH)"),
        ({"capability": 75}, "Stub 0 has compute capability 7.5, and 8.0 or later is needed"),
    ],
)
def test_what_cannot_be_opened(stub: Path, settings: dict[str, int], message: str) -> None:
    [line] = run(stub, OPEN, **settings)
    assert line.startswith(f"DeviceError: {message}")


def test_index_out_of_range(stub: Path) -> None:
    lines = run(stub, 'from kuiperllm.core import Device\nrefused(Device, "cuda:2")')
    assert lines == [
        'DeviceError: device "cuda:2": there is no such GPU; there are "cuda:0" (Stub 0), "cuda:1" (Stub 1)'
    ]


def test_hidden_gpus_are_mentioned(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    [line] = run(stub, OPEN, devices=0)
    assert line == "DeviceError: the NVIDIA driver shows no GPU (CUDA_VISIBLE_DEVICES='7')"


def test_without_a_driver() -> None:
    script = """
import sys
from cuda.pathfinder import DynamicLibNotFoundError
from cuda.bindings import driver
from kuiperllm.core import Device
def missing(*args):
    raise DynamicLibNotFoundError("no libcuda")
driver.cuDriverGetVersion = missing
print(Device("auto"))
try:
    Device("cuda:0")
except Exception as error:
    print(type(error).__name__, error)
"""
    device, message = run(None, script)
    assert device == "cpu"
    assert message.startswith(
        'DeviceError device "cuda:0": there is no NVIDIA driver (libcuda is not found): '
    )


def test_without_the_packages() -> None:
    script = """
import sys
sys.modules["cuda.core"] = None
from kuiperllm.core import Device
try:
    Device("cuda:0")
except Exception as error:
    print(type(error).__name__, error)
"""
    [message] = run(None, script)
    assert message.startswith('DeviceError device "cuda:0": GPUs need packages that are missing (')
    assert message.endswith("): pip install 'kuiperllm[cuda]'")


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pools", [0, 1])
def test_memory(stub: Path, pools: int) -> None:
    script = """
driver = NvidiaDriver(0)
before = driver.memory_info()
address, host = driver.allocate(3 << 20), driver.allocate_host(1000)
print(address % 512, before[0] - driver.memory_info()[0] - (3 << 20))
stream = driver.create_stream()
driver.fill(address, 7, 100, stream)
driver.copy(host, address, 100, stream)
driver.synchronize_stream(stream)
print(set(ctypes.string_at(host, 100)))
driver.free(address)
driver.free_host(host)
print(driver.memory_info() == before, ctypes.c_int.in_dll(stub, "stub_blocks").value)
refused(driver.allocate, 5 << 30)
"""
    first, second, third, refusal = run(stub, script, pools=pools)
    assert first == "0 1000"
    assert second == "{7}"
    assert third == "True 0"
    assert refusal.startswith(
        "OutOfMemoryError: cuda:0 memory: needs 5.00 GiB, has 4.00 GiB free of 8.00 GiB; "
    )


def test_host_memory_that_cannot_be_locked(stub: Path) -> None:
    [line] = run(stub, "refused(NvidiaDriver(0).allocate_host, 1 << 20)", host=1)
    assert line.startswith(
        "DeviceError: cannot page-lock 1.0 MiB of the host's memory for cuda:0 (CUDA_ERROR"
    )


def test_sharing_with_a_peer(stub: Path) -> None:
    script = """
driver = NvidiaDriver(0)
driver.share_with(1)
driver.share_with(1)
print(ctypes.c_int.in_dll(stub, "stub_shared").value)
"""
    assert run(stub, script) == ["1"]


# --- queues and failures ----------------------------------------------------------------------------------


def test_events_and_graphs(stub: Path) -> None:
    script = """
driver = NvidiaDriver(0)
stream = driver.create_stream()
start, end = driver.create_event(timing=True), driver.create_event()
driver.record_event(start, stream)
driver.wait_event(stream, start)
driver.synchronize_event(end)
print(driver.elapsed_ms(start, end))
driver.destroy_event(start)
driver.begin_capture(stream)
graph = driver.end_capture(stream)
for _ in range(3):
    driver.launch_graph(graph, stream)
driver.destroy_graph(graph)
print(ctypes.c_int.in_dll(stub, "stub_graph_launches").value)
"""
    assert run(stub, script) == ["2.0", "3"]


def test_a_kernel_that_failed(stub: Path) -> None:
    script = "driver = NvidiaDriver(0)\nrefused(driver.synchronize_stream, driver.create_stream())"
    assert run(stub, script, sync=700) == [
        "DeviceError: cuda:0: a kernel failed (CUDA_ERROR_ILLEGAL_ADDRESS); "
        "the GPU is lost to this process, restart it"
    ]


def test_code_that_the_driver_refuses(stub: Path) -> None:
    [line] = run(stub, 'refused(NvidiaDriver(0).load, b"code")', load=222)
    assert line.startswith(
        "KernelError: cuda:0: the driver (CUDA 13.0) refuses code for sm_90a compiled with CUDA 13."
    )
    assert line.endswith("(CUDA_ERROR_UNSUPPORTED_PTX_VERSION): update the driver")


# --- launches ---------------------------------------------------------------------------------------------


def test_launch_as_the_driver_sees_it(stub: Path) -> None:
    script = """
driver = NvidiaDriver(0)
function = driver.function(driver.load(b"code"), "k")
driver.allow_shared(function, 200_000)
print(list((ctypes.c_int * 16).in_dll(stub, "stub_function_attributes"))[8:10], driver.resources(function))
refused(driver.function, 1, "absent")
refused(driver.allow_shared, function, 300_000)
seen = (ctypes.c_uint * 10).in_dll(stub, "stub_launch")
for cluster, overlap in ((1, False), (1, True), (4, True), (2, False), (1, False)):
    driver.launch(function, (5, 6, 7), 128, 4096, cluster, overlap, driver.create_stream(), 0)
    print(list(seen))
refused(driver.launch, function, (5, -1, 1), 128, 0, 1, False, 0, 0)
"""
    shared, absent, too_much, *launches, impossible = run(stub, script)
    assert shared == "[200000, 100] Resources(registers=64, spill_bytes=48, shared_bytes=16)"
    assert absent == "DeviceError: cuda:0: no kernel absent (CUDA_ERROR_NOT_FOUND)"
    assert too_much == (
        "KernelError: a kernel wants 293 KiB of shared memory, a block on cuda:0 can have 227 KiB"
    )
    common = [5, 6, 7, 128, 1, 1, 4096]
    attributes = ([0, 0, 0], [1, 0, 1], [2, 4, 1], [1, 2, 0], [0, 0, 0])
    assert launches == [str(common + more) for more in attributes]
    assert impossible.startswith("KernelError: cannot launch (5, -1, 1) blocks of 128 threads")


def test_a_launch_that_is_refused(stub: Path) -> None:
    script = "refused(NvidiaDriver(0).launch, 1, (1, 1, 1), 2048, 0, 1, True, 0, 0)"
    [line] = run(stub, script, launch=1)
    assert line.startswith("KernelError: cuda:0: cannot launch (1, 1, 1) blocks of 2048 threads with 0 bytes")
    assert line.endswith("(CUDA_ERROR_INVALID_VALUE)")


def test_arguments_of_a_launch(stub: Path, tmp_path: Path) -> None:
    """All the way down: what `launch` is given lies where the driver looks for it."""
    (tmp_path / "k.cu").write_text(
        'extern "C" __global__ void k(int a, const float* x, float b, const __grid_constant__ TensorMap m,'
        " long long c, float* y) {}"
    )
    script = f"""
from pathlib import Path
from kuiperllm.backends import cuda
from kuiperllm.backends.cuda.driver import Compiler
from kuiperllm.backends.cuda.launch import Kernel, launch, tensor_map
from kuiperllm.core import Device, Tensor
class Anything(Compiler):
    version = "1"
    def compile(self, source, name, arch):
        return b"code", ""
cuda.platform.open_compiler = Anything
device = Device("cuda:0")
x = Tensor.zeros((64, 64), "bfloat16", device)
kernel = Kernel(Path({str(tmp_path / "k.cu")!r}), "k")
map = tensor_map(x, "bfloat16", (64, 64), (128,), (64, 8), 128)
assert map is tensor_map(x, "bfloat16", (64, 64), (128,), (64, 8), 128)
sizes = (ctypes.c_int * 32).in_dll(stub, "stub_argument_sizes")
for i, size in enumerate((4, 8, 4, 128, 8, 8)):
    sizes[i] = size
launch(kernel, 3, 64, -5, x[1:], 0.25, map, 1 << 40, None, shared=60_000)
seen = bytes((ctypes.c_ubyte * 160).in_dll(stub, "stub_arguments"))
a, address, b, found, c, y = struct.unpack("=iQf128sqQ", seen)
print(a, address - x.address, b, found == map, c, y)
print(struct.unpack("=7Q", map[:56])[1] == x.address, struct.unpack("=7Q", map[:56])[2:])
print(list((ctypes.c_uint * 10).in_dll(stub, "stub_launch")))
good = (1, x, 1.0, map, 1, x)
for index, wrong in ((0, 1 << 31), (0, 1.5), (1, -1), (2, "x"), (3, 4), (4, 1 << 63)):
    refused(launch, kernel, 1, 64, *(*good[:index], wrong, *good[index + 1:]))
refused(launch, kernel, 1, 64, *good[:-1])
refused(launch, kernel, 1, 64, 1, 2)
"""
    values, described, launched, *errors = run(stub, script)
    assert values == "-5 128 0.25 True 1099511627776 0"
    assert described == "True (3, 64, 128, 64, 1)"
    assert launched == "[3, 1, 1, 64, 1, 1, 60000, 1, 0, 1]"
    assert errors == [
        "KernelError: Kernel(k): argument 1 is 2147483648, which is no int",
        "KernelError: Kernel(k): argument 1 is 1.5, which is no int",
        "KernelError: Kernel(k): argument 2 is -1, which is no pointer",
        "KernelError: Kernel(k): argument 3 is 'x', which is no float",
        "KernelError: Kernel(k): argument 4 is 4, which is no TensorMap",
        "KernelError: Kernel(k): argument 5 is 9223372036854775808, which is no long long",
        "KernelError: Kernel(k) takes 6 arguments, not 5",
        "UsageError: Kernel(k): launch() needs a tensor among the arguments, to know the device",
    ]


def test_calls_from_another_thread(stub: Path) -> None:
    script = """
import threading
import numpy
from kuiperllm.core import Device, Tensor
one, two = Device("cuda:0"), Device("cuda:1")
found = []
def work():
    for device in (one, two, one):
        Tensor.zeros((4,), device=device).numpy()
        found.append(stub.stub_current_device())
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(found, one.backend.peers(), two.backend.peers())
there = Tensor.from_numpy(numpy.full(4, 2.0, "float32")).to(one).to(two)
print(there.device, there.tolist())
"""
    assert run(stub, script) == ["[0, 1, 0] (1,) (0,)", "cuda:1 [2.0, 2.0, 2.0, 2.0]"]
