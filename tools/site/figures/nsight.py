"""Draws the figures of chapter 5 from the newest results: roofline, times of versions, rows under way.

python tools/site/figures/nsight.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from canvas import COLOURS, GREY, Canvas, save_all

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
BLUE, ORANGE, GREEN, PURPLE, RED, TEAL = COLOURS[:6]
REGISTERS, PLACES = 65_536, 64  # of a multiprocessor: registers, and warps

WORDS = {
    "roofline": ("Roofline of an H200", "H200 的屋顶线"),
    "intensity": ("operations for each byte that must be moved", "每搬运一个字节所做的运算"),
    "rate": ("TFLOPS", "TFLOPS"),
    "bandwidth": ("reads {:,.0f} GB/s", "读带宽 {:,.0f} GB/s"),
    "peak": ("fastest product measured: {:.0f} TFLOPS", "实测最快的乘法：{:.0f} TFLOPS"),
    "norm": ("rms_norm, 4 versions", "rms_norm，四个版本"),
    "gemv": ("GEMV, 3 versions", "GEMV，三个版本"),
    "gemm": ("product, M x 4096 by 28672 rows", "矩阵乘法，M x 4096 乘 28672 行"),
    "attention decode": ("attention of one token", "单个词元的注意力"),
    "attention prefill": ("attention of prompts", "提示的注意力"),
    "times": ("rms_norm of 8192 rows of 4096", "8192 行、每行 4096 的 rms_norm"),
    "gate-up": ("gate and up, 16384 x 2048", "gate 与 up，16384 x 2048"),
    "qkv": ("queries, keys and values, 3072 x 2048", "查询、键和值，3072 x 2048"),
    "floor": ("floor {:.1f} µs", "下限 {:.1f} µs"),
    "rows": ("What fits into the registers of a multiprocessor", "一个多处理器的寄存器能放下什么"),
    "row": ("row", "行"),
    "free": ("free", "空闲"),
    "busy": ("{} rows fit, {:.1f} are there on average", "能放 {} 行，平均 {:.1f} 行在其中"),
}


def newest(kind: str) -> Any:
    """The latest result file of a kind."""
    return json.loads(sorted(RESULTS.glob(f"*-{kind}.json"))[-1].read_text(encoding="utf-8"))


def versions() -> dict[str, Any]:
    """What `profile_kernels.py` measured, by name."""
    return {version["name"]: version for version in newest("h200-profile-kernels")["results"]}


# --- roofline ---------------------------------------------------------------------------------------------


def points() -> list[tuple[str, float, float, str, str]]:
    """Series, operations a byte, operations a second, colour and label of each point."""
    found, known = [], versions()
    for label in ("scalars", "vectors", "8-warps", "4-warps"):
        version = known[f"norm-prefill/{label}"]
        operations = 4 * 8192 * 4096  # a square, a sum, two products
        found.append(("norm", operations / version["bytes"], operations / version["us"] * 1e6, BLUE, label))
    for label in ("plain", "ring", "planned"):
        version = known[f"gemv-gate-up/{label}"]
        operations = 2 * 16384 * 2048
        found.append(("gemv", operations / version["bytes"], operations / version["us"] * 1e6, ORANGE, label))
    for row in newest("h200-gemm")["results"]:
        if (row["n"], row["k"]) == (28672, 4096):
            m, n, k = row["m"], row["n"], row["k"]
            intensity = m * n * k / (n * k + m * k + m * n)
            found.append(("gemm", intensity, row["tflops"] * 1e12, GREEN, str(m)))
    for row in newest("h200-attention")["results"]:
        if row["model"] != "Llama-3.1-8B":
            continue
        heads, kv_heads, size, tokens = 32, 8, 128, row["tokens"]
        if row["kind"] == "prefill":
            operations, nbytes = (
                2 * heads * size * tokens * (tokens + 1),
                4 * (heads + kv_heads) * size * tokens,
            )
            found.append(
                ("attention prefill", operations / nbytes, operations / row["us"] * 1e6, PURPLE, str(tokens))
            )
        elif row["kind"] == "fused, tensor, 16 parts" and tokens == 32768:
            operations, nbytes = 4 * heads * size * tokens, 4 * kv_heads * size * tokens
            found.append(
                ("attention decode", operations / nbytes, operations / row["us"] * 1e6, RED, str(tokens))
            )
    return found


def roofline(say: dict[str, str]) -> Canvas:
    """Speed over intensity, both in powers of ten."""
    c = Canvas(720, 430, say["roofline"])
    left, right, top, bottom = 60.0, 700.0, 30.0, 380.0
    low_x, high_x, low_y, high_y = math.log10(0.3), math.log10(6000), math.log10(1), math.log10(1500)

    def x(intensity: float) -> float:
        return left + (math.log10(intensity) - low_x) / (high_x - low_x) * (right - left)

    def y(rate: float) -> float:
        return bottom - (math.log10(rate / 1e12) - low_y) / (high_y - low_y) * (bottom - top)

    bandwidth = newest("h200-profile-kernels")["read_bytes_per_s"]
    peak = max(row["tflops"] for row in newest("h200-gemm")["results"]) * 1e12
    for power in range(4):
        value = 10.0**power
        c.line(left, y(value * 1e12), right, y(value * 1e12), colour=GREY, width=0.5)
        c.text(left - 8, y(value * 1e12) + 4, f"{value:g}", anchor="end")
        c.line(x(value), top, x(value), bottom, colour=GREY, width=0.5)
        c.text(x(value), bottom + 18, f"{value:g}")
    ridge = peak / bandwidth
    start = 1e12 / bandwidth if 1e12 / bandwidth > 0.3 else 0.3
    c.line(x(start), y(start * bandwidth), x(ridge), y(peak), width=2)
    c.line(x(ridge), y(peak), right, y(peak), width=2)
    slope = math.degrees(math.atan2(y(peak) - y(start * bandwidth), x(ridge) - x(start)))
    c.text(x(9), y(9 * bandwidth) - 10, say["bandwidth"].format(bandwidth / 1e9), turn=slope)
    c.text(right, y(peak) - 8, say["peak"].format(peak / 1e12), anchor="end")
    c.text((left + right) / 2, 420, say["intensity"])
    c.text(18, (top + bottom) / 2, say["rate"], turn=-90)
    for series, intensity, rate, colour, label in points():
        shift = {"norm": -5, "gemv": 5}.get(series, 0)  # these have the same intensity
        c.circle(x(intensity) + shift, y(rate), 4.5, colour)
        if series == "gemm" and label in ("16", "64"):
            c.text(x(intensity) + 10, y(rate) + 14, f"M = {label}", size=11, anchor="start")
        if series == "gemm" and label == "256":
            c.text(x(intensity), y(rate) + 20, f"M = {label}", size=11)
        if series == "attention prefill":
            c.text(x(intensity), y(rate) + 20, label, size=11)
    c.text(x(0.98) - 12, y(2.0e12) + 28, say["norm"], size=11, anchor="start", colour=BLUE)
    c.text(x(1.35), y(3.3e12), say["gemv"], size=11, anchor="start", colour=ORANGE)
    c.text(x(5.5), y(14.5e12), say["attention decode"], size=11, anchor="start", colour=RED)
    c.text(x(20), y(30e12), say["gemm"], size=11, anchor="start", colour=GREEN)
    c.text(x(700), y(90e12), say["attention prefill"], size=11, anchor="start", colour=PURPLE)
    return c


# --- times of versions ------------------------------------------------------------------------------------


def bars(
    c: Canvas, say: dict[str, str], title: str, example: str, labels: tuple[str, ...], top: float
) -> None:
    """A bar for each version, and a line at the floor."""
    known = versions()
    chosen = [known[f"{example}/{label}"] for label in labels]
    longest = max(version["us"] for version in chosen)
    c.text(20, top, title, anchor="start", bold=True)
    for row, (label, version) in enumerate(zip(labels, chosen, strict=True)):
        y, width = top + 14 + row * 28, version["us"] / longest * 500
        c.text(92, y + 15, label, anchor="end")
        c.rect(100, y, width, 20, COLOURS[row % 4], opacity=0.55)
        c.text(106 + width, y + 15, f"{version['us']:.2f} µs", anchor="start")
    end, floor = top + 14 + len(labels) * 28, chosen[0]["floor_us"]
    at = 100 + floor / longest * 500
    c.line(at, top + 8, at, end, dash="4 3", width=1.5)
    c.text(at, end + 14, say["floor"].format(floor), size=11)


def norm_versions(say: dict[str, str]) -> Canvas:
    """The four versions of the long norm."""
    c = Canvas(720, 190, say["times"])
    bars(c, say, say["times"], "norm-prefill", ("scalars", "vectors", "8-warps", "4-warps"), 24)
    return c


def gemv_versions(say: dict[str, str]) -> Canvas:
    """Versions of both products."""
    c = Canvas(720, 360, say["gate-up"])
    labels = ("plain", "ring", "planned", "serial")
    bars(c, say, say["gate-up"], "gemv-gate-up", labels, 24)
    bars(c, say, say["qkv"], "gemv-qkv", labels, 204)
    return c


# --- rows under way ---------------------------------------------------------------------------------------


def warps_that_fit(registers: int) -> int:
    """Registers are given to warps in pieces of 256."""
    return min(PLACES, REGISTERS // (-(-registers * 32 // 256) * 256))


def rows_under_way(say: dict[str, str]) -> Canvas:
    """How many rows the registers of a multiprocessor hold."""
    c = Canvas(720, 250, say["rows"])
    c.text(20, 22, say["rows"], anchor="start", bold=True)
    known = versions()
    for line, label in enumerate(("scalars", "vectors", "8-warps", "4-warps")):
        counters = known[f"norm-prefill/{label}"]["kernels"][0]["counters"]
        registers, threads = (
            int(counters[f"launch__{name}"]) for name in ("registers_per_thread", "block_size")
        )
        warps = threads // 32
        fit = warps_that_fit(registers) // warps
        there = counters["sm__warps_active.avg.pct_of_peak_sustained_active"] / 100 * PLACES / warps
        share = -(-registers * 32 // 256) * 256 * warps / REGISTERS
        y = 40 + line * 52
        c.text(92, y + 20, label, anchor="end")
        c.rect(100, y, 600, 28, GREY, opacity=0.1)
        for row in range(fit):
            c.rect(100 + row * share * 600, y, share * 600, 28, BLUE, opacity=0.3 if row % 2 else 0.5)
            c.text(100 + (row + 0.5) * share * 600, y + 18, f"{say['row']} {row}", size=11)
        if 1 - fit * share > 0.06:
            c.text(100 + (1 + fit * share) * 300, y + 18, say["free"], size=11)
        c.text(100, y + 42, say["busy"].format(fit, there), size=11, anchor="start")
    return c


FIGURES = {
    "roofline": roofline,
    "norm-versions": norm_versions,
    "gemv-versions": gemv_versions,
    "rows-under-way": rows_under_way,
}


def main() -> None:
    save_all(FIGURES, WORDS)


if __name__ == "__main__":
    main()
