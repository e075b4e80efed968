"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kuiperllm.config import settings

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
