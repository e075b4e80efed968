"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from kuiperllm.config import settings
from kuiperllm.core import Device
from kuiperllm.errors import DeviceError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "fixtures"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real weights, tokenizers and golden vectors that may lie beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared/fixtures is not there")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests and the processes they start keep compiled kernels: not in the user's cache.

    Entries are named by all they depend on, so pytest's own cache keeps them from run to run.
    """
    given = os.environ.get("KUIPER_CACHE_DIR")
    if given is not None:
        return Path(given)
    cache = getattr(request.config, "cache", None)
    path = cache.mkdir("kernels") if cache is not None else tmp_path_factory.mktemp("kernels")
    os.environ["KUIPER_CACHE_DIR"] = str(path)
    settings.cache_clear()
    return Path(path)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let Ctrl-C reach the processes that tests start, also when the tests are a job in the background.

    Shells start such jobs with the signal ignored, and children inherit that.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@lru_cache(maxsize=1)
def real_gpu() -> Device | None:
    """The first GPU of this machine; None if there is none that can be used."""
    try:
        return Device("cuda:0")
    except DeviceError:
        return None


@pytest.fixture(autouse=True)
def _gpu_for_marked_tests(request: pytest.FixtureRequest) -> None:
    """Skip what needs a real GPU where there is none."""
    if request.node.get_closest_marker("gpu") is not None and real_gpu() is None:
        pytest.skip("no GPU")


@pytest.fixture
def cuda(kernel_cache: Path) -> Iterator[Device]:
    """The device "cuda:0": the GPU of this machine, or else one emulated on the processor."""
    gpu = real_gpu()
    if gpu is not None:
        yield gpu
        return
    import emulation

    if emulation.gxx() is None:
        pytest.skip("neither a GPU nor g++ to emulate one")
    yield emulation.install()
    emulation.uninstall()


@pytest.fixture
def emulated_cuda(kernel_cache: Path) -> Iterator[Device]:
    """The emulated device, whether or not there is a GPU."""
    import emulation

    if emulation.gxx() is None:
        pytest.skip("no g++ to emulate a GPU with")
    yield emulation.install()
    emulation.uninstall()


@pytest.fixture(params=["cpu", "cuda"])
def any_device(request: pytest.FixtureRequest) -> Device:
    """Each device in turn; see `cuda` for what stands for a GPU."""
    device: Device = Device("cpu") if request.param == "cpu" else request.getfixturevalue("cuda")
    return device
