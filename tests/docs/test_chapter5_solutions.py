"""The solutions of chapter 5, against the counters and times that were measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType

import pytest

from site_pages import ROOT

Load = Callable[[str], ModuleType]
MEASURED = json.loads((ROOT / "benchmarks/results/2026-11-23-h200-profile-kernels.json").read_text())
VERSIONS = {version["name"]: version for version in MEASURED["results"]}


def test_exercise1_price_of_a_row(solution: Load) -> None:
    module = solution("chapter5_exercise1")
    fixed, of_a_vector = module.instructions_of_a_warp()
    assert (round(fixed), round(of_a_vector)) == (127, 59)
    assert module.instructions_of_a_row(16) == pytest.approx(2976, rel=0.01)
    assert 1150 < module.instructions_of_a_row(2) < 1250


@pytest.mark.parametrize(
    ("name", "fits"),
    [("scalars", 3), ("vectors", 3), ("8-warps", 5), ("4-warps", 6)],
)
def test_exercise2_blocks_that_fit(solution: Load, name: str, fits: int) -> None:
    module = solution("chapter5_exercise2")
    counters = VERSIONS[f"norm-prefill/{name}"]["kernels"][0]["counters"]
    threads = int(counters["launch__block_size"])
    assert module.blocks_that_fit(int(counters["launch__registers_per_thread"]), threads) == fits
    there = counters["sm__warps_active.avg.pct_of_peak_sustained_active"] / 100 * 64 / (threads / 32)
    assert 0.8 * fits < there <= fits


@pytest.mark.parametrize("example", ["gemv-qkv", "gemv-gate-up"])
def test_exercise2_one_block_of_a_gemv(solution: Load, example: str) -> None:
    counters = VERSIONS[f"{example}/planned"]["kernels"][0]["counters"]
    facts = ("registers_per_thread", "block_size", "shared_mem_per_block_dynamic")
    operands = (int(counters[f"launch__{fact}"]) for fact in facts)
    assert solution("chapter5_exercise2").blocks_that_fit(*operands) == 1


def test_exercise3_where_a_product_leaves_the_slope(solution: Load) -> None:
    module = solution("chapter5_exercise3")
    gemm = json.loads((ROOT / "benchmarks/results/2026-11-23-h200-gemm.json").read_text())
    peak = max(row["tflops"] for row in gemm["results"]) * 1e12
    rows = module.ridge_rows(28672, 4096, peak, MEASURED["read_bytes_per_s"])
    assert 180 < rows < 200
    times = module.measured_times(28672, 4096)
    assert times[128] / times[16] < 1.2
    assert times[256] / times[16] > 1.5
