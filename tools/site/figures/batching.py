"""Draws the figures of chapter 7: a paged cache, static and continuous batches, steps with pieces of prompts.

python tools/site/figures/batching.py
"""

from __future__ import annotations

from canvas import COLOURS, GREY, Canvas, save_all

BLUE, ORANGE, GREEN, PURPLE = COLOURS[:4]

WORDS = {
    "paged": ("A paged cache", "分页的缓存"),
    "sequence": ("sequence", "序列"),
    "table": ("block table", "块表"),
    "cache": ("blocks of the cache", "缓存中的块"),
    "shared": ("shared", "共享"),
    "free": ("free", "空闲"),
    "static": ("static: a batch ends with its longest request", "静态批处理：一批要等最长的请求"),
    "continuous": ("continuous: the next request takes a free place", "连续批处理：空位立刻给下一个请求"),
    "steps": ("steps", "步"),
    "budget": ("tokens of a step, at most 8", "每步的词元，至多 8 个"),
    "step": ("step", "第"),
    "step end": ("", "步"),
    "decode": ("one token each: decoding", "每个序列一个词元：解码"),
    "piece": ("pieces of prompts", "提示的片段"),
}  # fmt: skip
"""Words of the figures in English and Chinese."""


def paged(say: dict[str, str]) -> Canvas:
    """Two sequences, their tables, and physical blocks."""
    c = Canvas(720, 300, say["paged"])
    colours = {"A": BLUE, "B": ORANGE}
    tables = {"A": [6, 1, 4], "B": [6, 3]}
    c.text(20, 22, say["table"], anchor="start", size=12)
    at: dict[str, float] = {}
    for number, (name, blocks) in enumerate(tables.items()):
        y = 40 + number * 190
        c.text(20, y + 21, f"{say['sequence']} {name}", anchor="start", bold=True, size=13)
        for index, block in enumerate(blocks):
            x = 130 + index * 76
            c.rect(x, y, 76, 32, GREEN if block == 6 else colours[name], opacity=0.4)
            c.text(x + 38, y + 21, str(block), size=13)
            c.text(x + 38, y + (-6 if number == 0 else 46), f"{index * 32}–{index * 32 + 31}", size=10)
            at[f"{name}{index}"] = x + 38
    owner = {6: GREEN, 1: BLUE, 4: BLUE, 3: ORANGE}
    for block in range(8):
        x = 20 + block * 86
        c.rect(x, 134, 78, 44, owner.get(block, GREY), opacity=0.45 if block in owner else 0.08)
        c.text(x + 39, 153, str(block), size=13)
        c.text(x + 39, 170, say["shared"] if block == 6 else "" if block in owner else say["free"], size=10)
    for name, blocks in tables.items():
        for index, block in enumerate(blocks):
            start, end = (72, 132) if name == "A" else (230, 180)
            c.line(at[f"{name}{index}"], start, 59 + block * 86, end, arrow=True, width=1.2)
    c.text(700, 200, say["cache"], anchor="end", size=12)
    return c


def batching(say: dict[str, str]) -> Canvas:
    """Seven requests in three places."""
    lengths = [9, 3, 5, 8, 2, 4, 6]
    c = Canvas(720, 262, say["continuous"])
    unit = 28.0

    def bar(place: int, top: float, start: int, length: int, request: int) -> None:
        c.rect(60 + start * unit, top + place * 26, length * unit, 22, COLOURS[request], opacity=0.5)
        c.text(60 + (start + length / 2) * unit, top + place * 26 + 16, "ABCDEFG"[request], size=12)

    c.text(20, 20, say["static"], anchor="start", bold=True, size=12)
    start, request = 0, 0
    while request < len(lengths):
        batch = range(request, min(request + 3, len(lengths)))
        longest = max(lengths[i] for i in batch)
        for place, i in enumerate(batch):
            bar(place, 30, start, lengths[i], i)
            if longest > lengths[i]:
                c.rect(
                    60 + (start + lengths[i]) * unit,
                    30 + place * 26,
                    (longest - lengths[i]) * unit,
                    22,
                    GREY,
                    opacity=0.15,
                    line=0,
                )
        for place in range(len(batch), 3):
            c.rect(60 + start * unit, 30 + place * 26, longest * unit, 22, GREY, opacity=0.15, line=0)
        start, request = start + longest, request + 3
    c.text(64 + start * unit, 122, f"{start} {say['steps']}", anchor="end", size=11)
    c.text(20, 142, say["continuous"], anchor="start", bold=True, size=12)
    until = [0, 0, 0]
    for i, length in enumerate(lengths):
        place = until.index(min(until))
        bar(place, 152, until[place], length, i)
        until[place] += length
    for place in range(3):
        if until[place] < max(until):
            c.rect(
                60 + until[place] * unit,
                152 + place * 26,
                (max(until) - until[place]) * unit,
                22,
                GREY,
                opacity=0.15,
                line=0,
            )
    c.text(64 + max(until) * unit, 248, f"{max(until)} {say['steps']}", anchor="end", size=11)
    return c


def pieces(say: dict[str, str]) -> Canvas:
    """The steps of the chapter's example."""
    all_decode = ("A", 1, 0), ("B", 1, 0), ("C", 1, 0)
    steps = (
        (("A", 3, 1), ("B", 5, 1)), (("A", 1, 0), ("B", 7, 1)), (("A", 1, 0), ("B", 7, 1)),
        (("A", 1, 0), ("B", 1, 1), ("C", 5, 1)), all_decode, all_decode,
    )  # fmt: skip
    colours = {"A": BLUE, "B": ORANGE, "C": GREEN}
    c = Canvas(720, 262, say["budget"])
    c.text(20, 22, say["budget"], anchor="start", bold=True, size=12)
    for number, work in enumerate(steps):
        x, y = 40 + number * 112, 200.0
        c.rect(x, 40, 70, 160, "none", stroke=GREY)
        for name, count, is_piece in work:
            for _ in range(count):
                y -= 20
                c.rect(x, y, 70, 20, colours[name], opacity=0.25 if is_piece else 0.75)
                c.text(x + 35, y + 15, name, size=12)
        c.text(x + 35, 220, f"{say['step']} {number + 1} {say['step end']}".strip(), size=12)
    c.rect(40, 236, 16, 14, BLUE, opacity=0.75)
    c.text(62, 248, say["decode"], anchor="start", size=12)
    c.rect(300, 236, 16, 14, BLUE, opacity=0.25)
    c.text(322, 248, say["piece"], anchor="start", size=12)
    return c


def main() -> None:
    """Write each figure twice, with English and with Chinese words."""
    drawings = {"paged-cache": paged, "batching": batching, "chunked-prefill": pieces}
    save_all(drawings, WORDS)


if __name__ == "__main__":
    main()
