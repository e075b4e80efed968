"""The environment: the only place that reads `KUIPER_*` variables."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kuiperllm.errors import UsageError


@dataclass(frozen=True, slots=True)
class Settings:
    """The `KUIPER_*` environment variables."""

    cache_dir: Path
    """KUIPER_CACHE_DIR: where compiled kernels are kept (default: kuiperllm in the user's cache folder)."""
    cpu_level: str | None
    """KUIPER_CPU_LEVEL: use kernels of at most this level (generic, avx2, avx512, amx)."""
    num_threads: int | None
    """KUIPER_NUM_THREADS: threads of the CPU back end (default: the physical cores it may use)."""
    api_keys: tuple[str, ...]
    """KUIPER_API_KEY: what clients of the server must know, one or several with commas (default: nothing)."""


@lru_cache(maxsize=1)
def settings() -> Settings:
    """Read the environment; once per process (`settings.cache_clear()` makes it read again)."""
    env = os.environ
    if (cache := env.get("KUIPER_CACHE_DIR")) is not None:
        cache_dir = Path(cache).expanduser()
    elif sys.platform == "darwin":
        cache_dir = Path.home() / "Library" / "Caches" / "kuiperllm"
    else:
        cache_dir = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kuiperllm"
    threads = env.get("KUIPER_NUM_THREADS")
    if threads is not None and not (threads.isdecimal() and int(threads) > 0):
        raise UsageError(f"KUIPER_NUM_THREADS={threads!r}: set it to a whole number above 0")
    return Settings(
        cache_dir=cache_dir,
        cpu_level=env.get("KUIPER_CPU_LEVEL") or None,
        num_threads=int(threads) if threads else None,
        api_keys=tuple(key.strip() for key in env.get("KUIPER_API_KEY", "").split(",") if key.strip()),
    )
