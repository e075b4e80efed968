"""Draws the figures of chapter 9: fragments, swizzles, tiles, a ring of stages, speeds of products.

Fragments are drawn from `place_in_a`, `place_in_b` and `place_in_c`, which a snippet of the chapter
checks against the emulated instruction.

python tools/site/figures/tensor_cores.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from canvas import COLOURS, GREY, Canvas, save_all

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
BLUE, ORANGE, GREEN, PURPLE, RED = COLOURS[:5]

Place = Callable[[int, int], tuple[int, int]]


def place_in_a(lane: int, i: int) -> tuple[int, int]:
    """Row and column of the 16x16 operand that is element i (0 ... 7) of a lane; two share a register."""
    return lane // 4 + (8 if i & 2 else 0), 2 * (lane % 4) + i % 2 + (8 if i >= 4 else 0)


def place_in_b(lane: int, i: int) -> tuple[int, int]:
    """The same of the 16x8 operand, elements 0 ... 3."""
    return 2 * (lane % 4) + i % 2 + (8 if i >= 2 else 0), lane // 4


def place_in_c(lane: int, i: int) -> tuple[int, int]:
    """The same of the 16x8 sums, 0 ... 3, a register each."""
    return lane // 4 + (8 if i >= 2 else 0), 2 * (lane % 4) + i % 2


WORDS = {
    "fragments": ("Which lane holds which element", "哪个元素在哪个通道"),
    "a": ("a: 16 x 16", "a：16 x 16"),
    "b": ("b: 16 x 8", "b：16 x 8"),
    "c": ("c: 16 x 8", "c：16 x 8"),
    "numbers": (
        "Numbers are lanes. Framed: lane 9 and its registers.",
        "数字是通道号。加框：通道 9 及其寄存器。",
    ),
    "swizzle": ("Eight rows of a stage, 128 bytes each", "一级缓冲中的八行，每行 128 字节"),
    "plain": (
        "as in memory: column 3 of all rows in the same banks",
        "与内存相同：各行的第 3 块在同一组存储体",
    ),
    "mixed": ("column ^ (row & 7): all in different banks", "块号 ^ (行 & 7)：各在不同的存储体"),
    "row": ("row", "行"),
    "banks": ("banks 4 i to 4 i + 3 below each other", "上下对齐的是同一组存储体 4 i 到 4 i + 3"),
    "tiles": ("From the product to one instruction", "从整个乘积到一条指令"),
    "product": ("Y: a tile for each block", "Y：每块一个分片"),
    "tile": ("tile 128 x 128: 8 warps", "分片 128 x 128：8 个线程束"),
    "warp": ("warp 64 x 32: 16 instructions", "线程束 64 x 32：16 条指令"),
    "ring": ("A ring of 4 stages", "四级缓冲的环"),
    "copies": ("copying", "复制"),
    "multiplies": ("multiplying", "相乘"),
    "time": ("time", "时间"),
    "full": ("full", "full"),
    "empty": ("empty", "empty"),
    "wgmma": ("Sums of wgmma: 64 rows, 4 warps", "wgmma 的和：64 行，4 个线程束"),
    "of warp": ("warp", "线程束"),
    "columns": ("columns 0 to 15 of N; numbers are lanes", "N 的第 0–15 列；数字是通道号"),
    "speed": ("Products of M rows by 28672 x 4096", "M 行与 28672 x 4096 的乘积"),
    "rows of x": ("M, rows of x", "M，x 的行数"),
    "ours": ("KuiperLLM", "KuiperLLM"),
}


# --- fragments --------------------------------------------------------------------------------------------


def grid(
    c: Canvas, left: float, top: float, shape: tuple[int, int], place: Place, count: int, name: str
) -> None:
    """A matrix whose cells name the lane that holds them; the registers of lane 9 are framed."""
    side = 19.0
    for lane in range(32):
        for i in range(count):
            row, column = place(lane, i)
            x, y = left + column * side, top + row * side
            c.rect(x, y, side, side, COLOURS[lane % 4], opacity=0.14 + 0.09 * (lane // 4), line=0.3, radius=0)
            if lane != 9:
                c.text(x + side / 2, y + 13, str(lane), size=10)
    for i in range(0, count, 2):
        row, column = place(9, i)
        tall = place(9, i + 1)[0] > row
        x, y = left + column * side, top + row * side
        c.rect(x, y, side if tall else 2 * side, 2 * side if tall else side, line=2.4, radius=0)
        if name == "c":
            c.text(x + side / 2, y + 13, f"c{i}", size=10, bold=True)
            c.text(x + 1.5 * side, y + 13, f"c{i + 1}", size=10, bold=True)
        else:
            middle = (x + side / 2, y + side + 4) if tall else (x + side, y + 13)
            c.text(*middle, f"{name}{i // 2}", size=11, bold=True)


def fragments(say: dict[str, str]) -> Canvas:
    """The operands and the sums of mma.m16n8k16."""
    c = Canvas(720, 390, say["fragments"])
    for left, title in ((20, "a"), (352, "b"), (536, "c")):
        c.text(left, 24, say[title], anchor="start", bold=True)
    grid(c, 20, 36, (16, 16), place_in_a, 8, "a")
    grid(c, 352, 36, (16, 8), place_in_b, 4, "b")
    grid(c, 536, 36, (16, 8), place_in_c, 4, "c")
    c.text(20, 368, say["numbers"], anchor="start")
    return c


def wgmma(say: dict[str, str]) -> Canvas:
    """The sums of a warpgroup."""
    c = Canvas(720, 330, say["wgmma"])
    c.text(20, 22, say["wgmma"], anchor="start", bold=True)
    wide, high = 34.0, 14.0
    for warp in range(4):
        top = 36 + warp * 66
        c.text(92, top + 34, f"{say['of warp']} {warp}", anchor="end")
        for row, shown in enumerate((0, 1, None, 15)):
            label = "…" if shown is None else f"{16 * warp + shown}"
            c.text(122, top + row * high + 11, label, size=10, anchor="end")
            for column in range(16):
                x, y = 130 + column * wide, top + row * high
                if shown is None:
                    continue
                lane = shown % 8 * 4 + column % 8 // 2
                number = column % 2 + (2 if shown >= 8 else 0) + 4 * (column // 8)
                c.rect(x, y, wide, high, COLOURS[warp], opacity=0.15 + 0.12 * (lane % 4), line=0.3, radius=0)
                c.text(x + wide / 2, y + 11, f"{lane}·d{number}", size=9)
    c.text(130, 316, say["columns"], anchor="start", size=11)
    return c


# --- shared memory ----------------------------------------------------------------------------------------


def swizzle(say: dict[str, str]) -> Canvas:
    """Where 16 bytes of each row lie."""
    c = Canvas(720, 260, say["swizzle"])
    for side, title in enumerate(("plain", "mixed")):
        left = 20 + side * 355
        c.text(left, 22, say[title], anchor="start", bold=True, size=11)
        for row in range(8):
            c.text(left + 36, 36 + row * 24 + 16, f"{say['row']} {row}", size=10, anchor="end")
            for chunk in range(8):
                at = chunk ^ row if side else chunk
                chosen = chunk == 3
                hue = RED if chosen else GREY
                x = left + 42 + at * 36
                c.rect(x, 36 + row * 24, 36, 22, hue, opacity=0.6 if chosen else 0.12, line=0.4, radius=0)
                c.text(x + 18, 36 + row * 24 + 15, str(chunk), size=11)
    c.text(20, 250, say["banks"], anchor="start", size=11)
    return c


# --- tiles and stages -------------------------------------------------------------------------------------


def tiles(say: dict[str, str]) -> Canvas:
    """Product, tile of a block, part of a warp, instruction."""
    c = Canvas(720, 260, say["tiles"])
    c.text(20, 22, say["product"], anchor="start", bold=True, size=12)
    for row in range(4):
        for column in range(5):
            chosen = (row, column) == (1, 3)
            c.rect(20 + column * 38, 36 + row * 46, 38, 46, BLUE, opacity=0.6 if chosen else 0.12, radius=0)
    c.line(172, 82, 262, 36, dash="3 3")
    c.line(172, 128, 262, 220, dash="3 3")
    c.text(262, 22, say["tile"], anchor="start", bold=True, size=12)
    for row in range(2):
        for column in range(4):
            warp = row + 2 * column
            c.rect(
                262 + column * 46, 36 + row * 92, 46, 92, ORANGE, opacity=0.6 if warp == 5 else 0.12, radius=0
            )
            c.text(262 + column * 46 + 23, 36 + row * 92 + 50, str(warp))
    c.line(400, 128, 506, 36, dash="3 3")
    c.line(400, 220, 506, 220, dash="3 3")
    c.text(506, 22, say["warp"], anchor="start", bold=True, size=12)
    for row in range(4):
        for column in range(4):
            c.rect(
                506 + column * 46,
                36 + row * 46,
                46,
                46,
                GREEN,
                opacity=0.12 + 0.1 * ((row + column) % 2),
                radius=0,
            )
            c.text(506 + column * 46 + 23, 36 + row * 46 + 27, "16 x 8", size=11)
    return c


def ring(say: dict[str, str]) -> Canvas:
    """Who works at which stage, over time."""
    c = Canvas(720, 220, say["ring"])
    c.text(20, 22, say["ring"], anchor="start", bold=True)
    c.text(110, 62, say["copies"], anchor="end")
    c.text(110, 142, say["multiplies"], anchor="end")
    step = 62.0
    begin = [0.0, 0.25, 0.5, 0.75, 2.0, 3.0, 4.0, 5.0, 6.0]
    for number, start in enumerate(begin):
        x = 120 + start * step
        hue = COLOURS[number % 4]
        wide = 0.25 * step if number < 4 else 0.9 * step
        c.rect(x, 44, wide, 30, hue, opacity=0.5)
        c.text(x + wide / 2, 63, str(number), size=11)
    for number in range(8):
        x = 120 + (1 + number) * step
        hue = COLOURS[number % 4]
        c.rect(x, 124, 0.95 * step, 30, hue, opacity=0.5)
        c.text(x + 0.48 * step, 143, str(number), size=11)
        if number >= 4:
            c.line(120 + (begin[number] + 0.9) * step, 76, x + 4, 122, colour="currentColor", arrow=True)
        if number < 5:
            c.line(
                x + 0.93 * step,
                122,
                120 + begin[number + 4] * step + 4,
                76,
                colour=GREY,
                width=1.3,
                arrow=True,
            )
    c.text(120 + 7.7 * step, 104, say["full"], size=11, anchor="start")
    c.text(120 + 1.85 * step, 104, say["empty"], size=11, anchor="end")
    c.line(120, 186, 690, 186, arrow=True)
    c.text(690, 206, say["time"], anchor="end")
    return c


# --- speed ------------------------------------------------------------------------------------------------


def newest(kind: str) -> Any:
    """The latest result file of a kind."""
    return json.loads(sorted(RESULTS.glob(f"*-{kind}.json"))[-1].read_text(encoding="utf-8"))


def speed(say: dict[str, str]) -> Canvas:
    """TFLOPS over rows of x, beside cuBLAS."""
    c = Canvas(720, 320, say["speed"])
    rows = [row for row in newest("h200-gemm")["results"] if (row["n"], row["k"]) == (28672, 4096)]
    left, right, top, bottom = 60.0, 690.0, 56.0, 260.0
    c.text(20, 22, say["speed"], anchor="start", bold=True)
    for value in (0, 200, 400, 600, 800):
        y = bottom - value / 800 * (bottom - top)
        c.line(left, y, right, y, colour=GREY, width=0.5)
        c.text(left - 8, y + 4, str(value), anchor="end")
    c.text(left - 8, top - 12, "TFLOPS", anchor="middle", size=11)

    def at(m: int, tflops: float) -> tuple[float, float]:
        x = left + 20 + (math.log2(m) - 4) / 9 * (right - left - 40)
        return x, bottom - tflops / 800 * (bottom - top)

    ours = [at(row["m"], row["tflops"]) for row in rows]
    others = [at(row["m"], row["tflops"] * row["us"] / row["cublas_us"]) for row in rows]
    for series, hue, dash in ((others, GREY, "5 4"), (ours, GREEN, "")):
        c.path("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in series), colour=hue, width=2, dash=dash)
        for x, y in series:
            c.circle(x, y, 3.5, hue)
    for row in rows:
        c.text(at(row["m"], 0)[0], bottom + 18, str(row["m"]))
    c.text((left + right) / 2, 302, say["rows of x"])
    c.rect(470, 196, 14, 8, GREEN, opacity=0.9)
    c.text(492, 205, say["ours"], anchor="start")
    c.rect(470, 216, 14, 8, GREY, opacity=0.9)
    c.text(492, 225, "cuBLAS", anchor="start")
    return c


FIGURES = {
    "fragments": fragments,
    "wgmma": wgmma,
    "swizzle": swizzle,
    "tiles": tiles,
    "stage-ring": ring,
    "gemm-speed": speed,
}


def main() -> None:
    save_all(FIGURES, WORDS)


if __name__ == "__main__":
    main()
