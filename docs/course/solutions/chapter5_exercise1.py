"""Instructions of a warp of rms_norm, as a straight line through what was counted."""

import json
from pathlib import Path

import numpy as np

RESULT = Path(__file__).parents[3] / "benchmarks" / "results" / "2026-11-23-h200-profile-kernels.json"
ROWS, WIDTH, VECTOR = 8192, 4096, 8


def instructions_of_a_warp() -> tuple[float, float]:
    """What a warp issues for its part of a row: a fixed number, and one for each vector of a lane."""
    versions = {version["name"]: version for version in json.loads(RESULT.read_text())["results"]}
    vectors, issued = [], []
    for label in ("vectors", "8-warps", "4-warps"):
        counters = versions[f"norm-prefill/{label}"]["kernels"][0]["counters"]
        warps = counters["launch__block_size"] / 32
        vectors.append(WIDTH / VECTOR / 32 / warps)
        issued.append(counters["smsp__inst_executed.sum"] / ROWS / warps)
    of_a_vector, fixed = np.polyfit(vectors, issued, 1)
    return float(fixed), float(of_a_vector)


def instructions_of_a_row(warps: int) -> float:
    """Of all its warps."""
    fixed, of_a_vector = instructions_of_a_warp()
    return warps * fixed + WIDTH / VECTOR / 32 * of_a_vector
