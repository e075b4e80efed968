"""The benchmark of operators runs and writes what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "ops.py"


def test_one_operator(tmp_path: Path) -> None:
    output = tmp_path / "ops.json"
    command = [sys.executable, "-W", "error", str(SCRIPT), "--only", "add-decode", "--json", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "add-decode" in done.stdout
    document = json.loads(output.read_text())
    assert document["read_bytes_per_s"] > 1e8
    (result,) = document["results"]
    assert result["case"] == "add-decode"
    assert result["kilobytes"] == 3 * 2048 * 4 / 1e3
    assert 0 < result["us"] < 1e5
