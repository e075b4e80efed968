"""Draws the figures of chapter 4: threads, sectors of loads, pieces of a row, fusing.

python tools/site/figures/rms_norm.py
"""

from __future__ import annotations

from canvas import COLOURS, GREY, Canvas, save_all

BLUE, ORANGE, GREEN, PURPLE = COLOURS[:4]

WORDS = {
    "grid": ("grid: 4 blocks", "网格：4 个线程块"),
    "block": ("block", "线程块"),
    "one block": ("block 2: 2 warps of 32 threads", "线程块 2：2 个线程束，各 32 个线程"),
    "warp": ("warp", "线程束"),
    "lanes": ("warp 1: lanes 0 to 31", "线程束 1：通道 0 到 31"),
    "this": ("block 2, warp 1, lane 5: threadIdx.x = 37", "线程块 2、线程束 1、通道 5：threadIdx.x = 37"),
    "row": ("row", "行"),
    "thread a row": (
        "A thread for each row: 32 sectors, 4 bytes used of each",
        "每行一个线程：32 个扇区，每个只用 4 字节",
    ),
    "warp a row": (
        "A warp for each row: 4 sectors, all bytes used",
        "每行一个线程束：4 个扇区，字节全部用上",
    ),
    "sector": ("a cell is a sector of 32 bytes", "一格是一个 32 字节的扇区"),
    "more": ("... 32 rows", "……共 32 行"),
    "columns": ("columns of the row", "行的列"),
    "thread": ("thread", "线程"),
    "item": ("piece", "片"),
    "holds": ("thread 2 holds columns 16 to 23 and 1040 to 1047", "线程 2 持有第 16–23 列和第 1040–1047 列"),
    "load": (
        "one load of a warp: 32 pieces of 16 bytes, 512 bytes in one stretch",
        "线程束的一次加载：32 片，每片 16 字节，连续 512 字节",
    ),
    "apart": ("two kernels: 5 times the rows", "两个内核：搬运 5 份"),
    "fused": ("one kernel: 4 times the rows", "一个内核：搬运 4 份"),
    "memory": ("memory", "显存"),
    "stream": ("residual", "残差"),
    "reduction": ("What 32 lanes hold, step by step", "32 个通道逐步持有的值"),
    "start": ("start", "开始"),
    "offset": ("offset", "偏移"),
}
"""Words of the figures in English and Chinese."""


def threads(say: dict[str, str]) -> Canvas:
    """Grid, block and warp."""
    c = Canvas(680, 250, say["grid"])
    c.text(20, 22, say["grid"], anchor="start", bold=True)
    for b in range(4):
        c.rect(20 + 162 * b, 32, 150, 40, BLUE, opacity=0.5 if b == 2 else 0.18)
        c.text(95 + 162 * b, 57, f"{say['block']} {b}")
    c.line(344, 72, 20, 110, dash="3 3")
    c.line(494, 72, 656, 110, dash="3 3")
    c.text(340, 104, say["one block"], bold=True)
    for w in range(2):
        c.rect(20 + 322 * w, 112, 314, 36, ORANGE, opacity=0.5 if w == 1 else 0.18)
        c.text(177 + 322 * w, 135, f"{say['warp']} {w}")
    c.line(342, 148, 20, 190, dash="3 3")
    c.line(656, 148, 660, 190, dash="3 3")
    c.text(400, 184, say["lanes"], bold=True)
    for lane in range(32):
        c.rect(20 + 20 * lane, 192, 20, 26, GREEN, opacity=0.7 if lane == 5 else 0.18)
        c.text(30 + 20 * lane, 209, str(lane), size=10)
    c.line(130, 236, 130, 221, arrow=True)
    c.text(140, 240, say["this"], anchor="start")
    return c


def sectors(say: dict[str, str]) -> Canvas:
    """What one load of a warp touches."""
    c = Canvas(680, 240, say["thread a row"])
    for side, title in enumerate(("thread a row", "warp a row")):
        left = 20 + side * 340
        c.text(left, 20, say[title], anchor="start", bold=True, size=11)
        for row in range(6):
            y = 32 + row * 27
            c.text(left + 26, y + 15, f"{say['row']} {row}", size=10, anchor="end")
            for cell in range(12):
                touched = cell == 0 if side == 0 else row == 0 and cell < 4
                hue = (ORANGE, GREEN)[side] if touched else GREY
                c.rect(left + 32 + cell * 23, y, 23, 20, hue, opacity=0.3 if touched else 0.08, radius=0)
                if not touched:
                    continue
                used = 1 if side == 0 else 8
                for i in range(used):
                    c.rect(left + 32 + cell * 23 + i * 23 / 8, y, 23 / 8, 20, ORANGE if side == 0 else GREEN,
                           opacity=0.9, line=0.3, radius=0)  # fmt: skip
        c.text(left + 32, 32 + 6 * 27 + 12, say["more"], anchor="start", size=11)
    c.text(20, 232, say["sector"], anchor="start", size=11)
    return c


def pieces(say: dict[str, str]) -> Canvas:
    """Which thread holds which columns: 128 threads, 2 pieces of 8."""
    c = Canvas(680, 190, say["columns"])
    shown = (0, 1, 2, 3, None, 31, None, 127)
    x = 40.0
    centres = []
    for item in range(2):
        c.text(x, 24, f"{say['item']} {item}", anchor="start", bold=True)
        for thread in shown:
            if thread is None:
                c.text(x + 8, 60, "…")
                x += 16
                continue
            first = (item * 128 + thread) * 8
            c.rect(
                x,
                40,
                42,
                30,
                COLOURS[thread % 7] if thread < 4 else GREY,
                opacity=0.75 if thread == 2 else 0.25,
            )
            c.text(x + 21, 59, f"{first}–{first + 7}" if first < 1000 else f"{first}–", size=9)
            c.text(x + 21, 84, f"{thread}", size=10)
            if thread == 2:
                centres.append(x + 21)
            x += 44
        x += 24
    c.text(40, 102, "↑ " + say["thread"], anchor="start", size=10)
    for centre in centres:
        c.line(340, 128, centre, 90, colour=GREEN, width=1.5)
    c.text(340, 142, say["holds"])
    c.text(340, 170, say["load"], size=11)
    return c


def fusing(say: dict[str, str]) -> Canvas:
    """Rows that move, apart and fused."""
    c = Canvas(680, 210, say["fused"])
    for side, title in enumerate(("apart", "fused")):
        left = 20 + side * 340
        c.text(left, 20, say[title], anchor="start", bold=True)
        c.rect(left, 150, 310, 34, GREY, opacity=0.25)
        c.text(left + 155, 172, say["memory"])
        kernels = (("add", 5, 175), ("rms_norm", 200, 110)) if side == 0 else (("add_rms_norm", 20, 270),)
        for name, x, wide in kernels:
            c.rect(left + x, 48, wide, 34, BLUE if side == 0 else GREEN, opacity=0.4)
            c.text(left + x + wide / 2, 70, name)
        if side == 0:
            arrows = ((15, 1, "x"), (55, 1, say["stream"]), (120, 0, say["stream"]))
            arrows += ((205, 1, say["stream"]), (270, 0, "out"))
        else:
            arrows = ((40, 1, "x"), (90, 1, say["stream"]), (165, 0, say["stream"]), (240, 0, "out"))
        for number, (x, up, name) in enumerate(arrows, 1):
            y1, y2 = (148, 84) if up else (84, 148)
            c.line(left + x, y1, left + x, y2, colour="currentColor", width=1.6, arrow=True)
            c.text(left + x + 4, 120, f"{number} {name}", size=10, anchor="start")
    return c


def reduction(say: dict[str, str]) -> Canvas:
    """The sum over a warp by exclusive-or shuffles: a row for each step, a colour for each value."""
    c = Canvas(720, 210, say["reduction"])
    c.text(20, 20, say["reduction"], anchor="start", bold=True)
    held = list(range(32))
    for step, offset in enumerate((0, 16, 8, 4, 2, 1)):
        if offset:
            held = [value + held[lane ^ offset] for lane, value in enumerate(held)]
        y = 34 + step * 28
        c.text(70, y + 16, f"{say['offset']} {offset}" if offset else say["start"], anchor="end", size=11)
        different = list(dict.fromkeys(held))
        for lane, value in enumerate(held):
            hue = COLOURS[different.index(value) % 8]
            c.rect(76 + lane * 20, y, 20, 22, hue, opacity=0.3, line=0.4, radius=0)
            c.text(86 + lane * 20, y + 15, str(value), size=9)
    return c


FIGURES = {
    "threads": threads,
    "sectors": sectors,
    "warp-reduction": reduction,
    "pieces": pieces,
    "fusing": fusing,
}


def main() -> None:
    save_all(FIGURES, WORDS)


if __name__ == "__main__":
    main()
