"""Draws the figures of chapter 8: a step that feeds itself, one step ahead, early starts of kernels.

python tools/site/figures/graphs.py
"""

from __future__ import annotations

from canvas import COLOURS, GREY, Canvas, save_all

BLUE, ORANGE, GREEN, PURPLE = COLOURS[:4]

WORDS = {
    "ring": ("A captured decode step", "捕获的解码步"),
    "graph": ("the graph", "图"),
    "network": ("network: ids, positions,", "网络：编号、位置、"),
    "network 2": ("slots, lengths to logits", "槽位、长度 → logit"),
    "choice": ("choice of the token", "选出词元"),
    "advance": ("advance_step: ids, positions,", "advance_step：编号、位置、"),
    "advance 2": ("lengths, slots of the next step", "长度、槽位，供下一步用"),
    "history": ("history: tokens", "history：词元"),
    "host": ("host", "主机"),
    "device": ("device", "设备"),
    "reads": ("reads", "读取"),
    "blocks": ("new blocks, other sequences", "新的块、别的序列"),
    "waits": ("waiting for each step", "每一步都等"),
    "ahead": ("one step ahead", "超前一步"),
    "step": ("step", "步"),
    "text": ("text of", "文本"),
    "queue": ("queue", "排队"),
    "plain": ("one after the other", "依次启动"),
    "early": ("early starts", "提前启动"),
    "fetch": ("comes up, fetches weights", "启动、取权重"),
    "work": ("works with the results of the kernel in front", "用前一个内核的结果计算"),
    "wait": ("waits for it", "等待"),
    "kernel": ("kernel", "内核"),
    "time": ("time", "时间"),
}  # fmt: skip
"""Words of the figures in English and Chinese."""


def ring(say: dict[str, str]) -> Canvas:
    """Network, choice, advance and back; the host beside it."""
    c = Canvas(720, 268, say["ring"])
    c.rect(16, 14, 470, 240, GREY, opacity=0.08, radius=6)
    c.text(30, 36, say["graph"], anchor="start", bold=True, size=13)
    c.rect(40, 56, 220, 60, BLUE, opacity=0.35)
    c.text(150, 82, say["network"], size=12)
    c.text(150, 100, say["network 2"], size=12)
    c.rect(320, 56, 150, 60, ORANGE, opacity=0.35)
    c.text(395, 91, say["choice"], size=12)
    c.rect(150, 170, 250, 60, GREEN, opacity=0.35)
    c.text(275, 196, say["advance"], size=12)
    c.text(275, 214, say["advance 2"], size=12)
    c.line(260, 86, 317, 86, arrow=True, width=1.6)
    c.line(395, 116, 350, 167, arrow=True, width=1.6)
    c.line(200, 170, 160, 119, arrow=True, width=1.6)
    c.rect(540, 20, 164, 40, PURPLE, opacity=0.3)
    c.text(622, 45, say["host"], size=13, bold=True)
    c.rect(540, 170, 164, 60, GREY, opacity=0.2)
    c.text(622, 205, say["history"], size=12)
    c.line(400, 200, 537, 200, arrow=True, width=1.6)
    c.line(622, 168, 622, 63, arrow=True, width=1.6)
    c.text(630, 120, say["reads"], anchor="start", size=12)
    c.line(540, 42, 220, 42, width=1.2, dash="5 4")
    c.line(220, 42, 220, 54, arrow=True, width=1.2)
    c.text(400, 36, say["blocks"], size=11)
    return c


def lookahead(say: dict[str, str]) -> Canvas:
    """Time lines with and without a step ahead."""
    c = Canvas(720, 300, say["ahead"])
    work, host = 120.0, 76.0

    def box(x: float, y: float, width: float, label: str, colour: str) -> None:
        c.rect(x, y, width, 28, colour, opacity=0.4)
        c.text(x + width / 2, y + 19, label, size=11)

    for number, title in enumerate(("waits", "ahead")):
        top = 24 + number * 146
        c.text(20, top, say[title], anchor="start", bold=True, size=13)
        c.text(20, top + 34, say["host"], anchor="start", size=12)
        c.text(20, top + 84, say["device"], anchor="start", size=12)
        x = 80.0
        if title == "waits":
            for step in range(1, 4):
                box(x, top + 64, work, f"{say['step']} {step}", BLUE)
                x += work
                box(x, top + 14, host, f"{say['text']} {step}", ORANGE)
                c.rect(x, top + 64, host, 28, GREY, opacity=0.1, line=0)
                x += host
        else:
            for step in range(1, 6):
                box(x, top + 64, work, f"{say['step']} {step}", BLUE)
                c.rect(x, top + 14, 26, 28, GREEN, opacity=0.5)
                c.text(x + 13, top + 33, f"q{step + 1}", size=11)
                if step > 1:
                    box(x + 28, top + 14, host, f"{say['text']} {step - 1}", ORANGE)
                x += work
    c.text(80, 288, f"q2: {say['queue']} {say['step']} 2", anchor="start", size=11)
    return c


def early(say: dict[str, str]) -> Canvas:
    """A chain of kernels, without and with early starts."""
    c = Canvas(720, 330, say["early"])
    fetch, work = 54.0, 92.0
    for number, title in enumerate(("plain", "early")):
        top = 24 + number * 148
        c.text(20, top, say[title], anchor="start", bold=True, size=13)
        end = 110.0
        start = end
        for kernel in range(4):
            y = top + 10 + kernel * 27
            c.text(20, y + 17, f"{say['kernel']} {kernel + 1}", anchor="start", size=12)
            start = end if title == "plain" or kernel == 0 else end - work + 14
            c.rect(start, y, fetch, 22, ORANGE, opacity=0.55)
            ready = start + fetch
            if ready < end:
                c.rect(ready, y, end - ready, 22, GREY, opacity=0.15, line=0.3)
            begin = max(ready, end)
            c.rect(begin, y, work, 22, BLUE, opacity=0.5)
            end = begin + work
        c.line(end, top + 4, end, top + 124, dash="3 3")
    for number, (name, colour, opacity) in enumerate(
        (("fetch", ORANGE, 0.55), ("wait", GREY, 0.15), ("work", BLUE, 0.5))
    ):
        x = (20, 230, 390)[number]
        c.rect(x, 306, 16, 14, colour, opacity=opacity)
        c.text(x + 22, 318, say[name], anchor="start", size=12)
    return c


def main() -> None:
    """Write each figure twice, with English and with Chinese words."""
    drawings = {"decode-ring": ring, "lookahead": lookahead, "early-start": early}
    save_all(drawings, WORDS)


if __name__ == "__main__":
    main()
