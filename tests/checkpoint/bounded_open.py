"""Opens hostile files in a process whose address space is bounded, so that a parser that believes a size
field fails there, at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

PROGRAM = """
import json, resource, sys, time
import numpy, ml_dtypes
from kuiperllm.checkpoint import open_checkpoint
from kuiperllm.errors import KuiperError
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
limit = used + (300 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
outcomes = {}
for path in sys.argv[1:]:
    start = time.process_time()
    try:
        with open_checkpoint(path) as checkpoint:
            for name in checkpoint.tensors:
                checkpoint.load(name)
        outcome = ["opened", ""]
    except BaseException as error:
        kind = type(error).__name__ if isinstance(error, KuiperError) else "BUG " + repr(error)
        outcome = [kind, str(error)]
    outcomes[path] = [*outcome, time.process_time() - start]
print(json.dumps(outcomes))
"""

Outcome = tuple[str, str, float]
"""The exception's class or `opened`, its message, and seconds."""


def open_all(paths: Iterable[Path]) -> list[Outcome]:
    """What becomes of each path."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("bounds memory through /proc")
    names = [str(path) for path in paths]
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, *names],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert time.perf_counter() - start < 60
    outcomes = json.loads(run.stdout)
    return [tuple(outcomes[name]) for name in names]


def complaint(name: str, outcome: Outcome, kinds: str, message: str) -> str | None:
    """What is wrong about an outcome; `kinds` are the classes that are right, with `|` between them."""
    kind, text, seconds = outcome
    right = kind in kinds.split("|") and message in text
    if right and "\n" not in text and len(text) <= 600 and seconds <= 1:
        return None
    return f"{name}: {kind} after {seconds:.2f} s: {text}"
