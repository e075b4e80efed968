"""Every case of every operator, and the vector vocabulary, at the lower levels that this host can run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kuiperllm.backends.cpu.features import host_levels

TESTS = Path(__file__).resolve().parents[1]

RUN_CASES = """
import sys
from kuiperllm.backends.cpu.features import target
from kuiperllm.backends.cpu.team import set_num_threads
from kuiperllm.ops.cases import all_cases
import simd_checks

assert target().level == sys.argv[1]
set_num_threads(1)
for check in simd_checks.CHECKS:
    check()
count = 0
cases = [case for case in all_cases() if (case.op == "linear") == (sys.argv[2] == "linear")]
for case in cases:
    arguments = case.arguments()
    try:
        case.compare(case.run(case.tensors(arguments)), case.expected(arguments))
    except Exception as error:
        raise SystemExit(f"{case.id}: {error}")
    count += 1
print(count)
"""


@pytest.mark.parametrize("which", ["linear", "others"])
@pytest.mark.parametrize("level", host_levels()[:-1])
def test_cases_at(level: str, which: str) -> None:
    path = os.pathsep.join([str(TESTS / "backends"), *sys.path[1:]])  # the same package as here
    environment = os.environ | {"KUIPER_CPU_LEVEL": level, "PYTHONPATH": path}
    command = [sys.executable, "-W", "error", "-c", RUN_CASES, level, which]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > 100
