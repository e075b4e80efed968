"""The number of rows from which on a matrix product is limited by arithmetic."""

import json
from pathlib import Path

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def ridge_rows(n: int, k: int, peak: float, bandwidth: float) -> float:
    """Rows M of x at which 2 M N K / (2 (M K + N K + M N)) operations a byte are peak / bandwidth."""
    ridge = peak / bandwidth
    return ridge * n * k / (n * k - ridge * (n + k))


def measured_times(n: int, k: int) -> dict[int, float]:
    """Microseconds by rows of x."""
    results = json.loads((RESULTS / "2026-11-23-h200-gemm.json").read_text())["results"]
    return {row["m"]: row["us"] for row in results if (row["n"], row["k"]) == (n, k)}
