"""Draws the figures of chapter 6: groups, codings, blocks of GGUF, the way of weights to kernels.

python tools/site/figures/quantization.py
"""

from __future__ import annotations

from canvas import COLOURS, GREY, Canvas, save_all

BLUE, ORANGE, GREEN, PURPLE = COLOURS[:4]

WORDS = {
    "row": ("one row of W, 96 weights", "W 的一行，96 个权重"),
    "group": ("group", "组"),
    "codes": ("32 codes", "32 个编码"),
    "scale": ("scale, 16 bits", "缩放系数，16 位"),
    "spike": ("a large weight makes only its own group coarse", "一个大权重只会让它所在的组变粗"),
    "number line": ("Which numbers 16 codes stand for", "16 个编码各代表哪些数"),
    "weights": ("weights of a group", "一组权重"),
    "q7": ("-7 to 7", "-7 到 7"),
    "q8": ("-8 to 7, the farthest weight near -8", "-8 到 7，最远的权重靠近 -8"),
    "zeros": ("zero point: zero stays a number of the grid", "零点：0 仍落在格点上"),
    "minimum": ("minimum: from the smallest to the largest weight", "最小值：从最小到最大的权重"),
    "bytes": ("bytes", "字节"),
    "weights of": ("weights", "个权重"),
    "int8": ("32 int8 values", "32 个 int8 值"),
    "nibbles": ("16 bytes: column i low, column i + 16 high", "16 字节：低半第 i 列，高半第 i + 16 列"),
    "packed": ("8 scales, 8 minimums of 6 bits", "8 个缩放系数与 8 个最小值，各 6 位"),
    "nibbles256": ("128 bytes of codes, 4 bits each", "128 字节编码，每个 4 位"),
    "bits": ("bits a weight", "位/权重"),
    "float file": ("file: floating point", "文件：浮点"),
    "quant file": ("file: codes and scales", "文件：编码与缩放系数"),
    "array": ("array", "数组"),
    "loader": ("WeightLoader", "WeightLoader"),
    "rounds": ("rounds, if asked to", "按需取整"),
    "keeps": ("keeps codes", "保留编码"),
    "packs": ("LinearWeight: layout of the device", "LinearWeight：设备的布局"),
    "kernel": ("linear: codes to registers", "linear：编码直到寄存器"),
    "never": ("no weight in floating point in memory", "内存里没有浮点权重"),
}  # fmt: skip
"""Words of the figures in English and Chinese."""


def groups(say: dict[str, str]) -> Canvas:
    """A row in groups."""
    c = Canvas(720, 190, say["row"])
    c.text(20, 24, say["row"], anchor="start", bold=True, size=13)
    for g in range(3):
        left = 20 + g * 232
        coarse = g == 1
        c.rect(left, 96, 216, 30, BLUE, opacity=0.3)
        for i in range(1, 32):
            c.line(left + i * 6.75, 96, left + i * 6.75, 126, width=0.4)
        for i in range(32):
            height = 4 + (i * 7 + g * 5) % 11 * 1.6 if not coarse else 2 + (i * 7) % 5
            if coarse and i == 12:
                height = 52
            c.rect(
                left + i * 6.75 + 1.4,
                92 - height,
                4,
                height,
                ORANGE if height > 40 else GREY,
                opacity=0.8,
                line=0,
                radius=0,
            )
        c.text(left + 108, 116, say["codes"], size=12)
        c.rect(left + 68, 136, 80, 24, GREEN, opacity=0.4)
        c.text(left + 108, 152, say["scale"], size=11)
        c.text(left + 4, 40, f"{say['group']} {g}", anchor="start", size=12)
    c.text(20, 182, say["spike"], anchor="start", size=12)
    return c


def codings(say: dict[str, str]) -> Canvas:
    """Four number lines beneath the weights of one group."""
    c = Canvas(720, 300, say["number line"])
    c.text(20, 24, say["number line"], anchor="start", bold=True, size=13)
    weights = [-0.62, -0.4, -0.31, -0.18, -0.1, 0.02, 0.08, 0.15, 0.22, 0.3, 0.41, 0.55, 0.7, 0.86, 1.0, 1.3]
    low, high = min(weights), max(weights)

    def at(value: float) -> float:
        return 350 + value * 170

    c.text(20, 62, say["weights"], anchor="start", size=12)
    for weight in weights:
        c.circle(at(weight), 58, 3.5, ORANGE)
    c.line(at(0), 40, at(0), 285, dash="3 4", width=0.8)
    c.text(at(0), 297, "0", size=12)
    scale4, scale_zero, scale_minimum = high / -8.25, (high - low) / 15.5, (high - low) / 15
    zero = round((15 - (high + low) / scale_zero) / 2)
    lines = (
        ("q7", [code * high / 7 for code in range(-7, 8)]),
        ("q8", [code * scale4 for code in range(-8, 8)]),
        ("zeros", [(code - zero) * scale_zero for code in range(16)]),
        ("minimum", [code * scale_minimum + low for code in range(16)]),
    )
    for number, (name, points) in enumerate(lines):
        y = 106 + number * 48
        c.text(20, y - 14, say[name], anchor="start", size=12)
        c.line(at(min(points)), y + 6, at(max(points)), y + 6, width=0.8)
        for point in points:
            c.line(at(point), y - 1, at(point), y + 13, colour=COLOURS[number], width=2)
    return c


def blocks(say: dict[str, str]) -> Canvas:
    """Three blocks of GGUF; lengths are not to scale."""
    c = Canvas(720, 240, "GGUF: Q8_0, Q4_0, Q4_K")
    of_super = ("d", 2, GREEN), ("m", 2, PURPLE)
    rows = (
        ("Q8_0", 34, 32, "8.5", (("d", 2, GREEN), (say["int8"], 32, BLUE))),
        ("Q4_0", 18, 32, "4.5", (("d", 2, GREEN), (say["nibbles"], 16, BLUE))),
        ("Q4_K", 144, 256, "4.5", (*of_super, (say["packed"], 12, ORANGE), (say["nibbles256"], 128, BLUE))),
    )  # fmt: skip
    for number, (name, nbytes, weights, bits, parts) in enumerate(rows):
        y = 38 + number * 72
        c.text(20, y - 10, name, anchor="start", bold=True, size=13)
        note = f"{nbytes} {say['bytes']}, {weights} {say['weights of']}, {bits} {say['bits']}"
        c.text(70, y - 10, note, anchor="start", size=12)
        x, unit = 20.0, 680 / nbytes
        if name == "Q4_K":
            widths = [40.0, 40.0, 220.0, 380.0]
        else:
            widths = [max(44.0, size * unit) for _, size, _ in parts]
            widths[-1] = 680 - sum(widths[:-1])
        for (label, _, colour), width in zip(parts, widths, strict=True):
            c.rect(x, y, width, 34, colour, opacity=0.4)
            c.text(x + width / 2, y + 21, label, size=12)
            x += width
    return c


def loading(say: dict[str, str]) -> Canvas:
    """Two kinds of files, one kind of product."""
    c = Canvas(720, 210, say["loader"])
    for number, (name, kind, colour) in enumerate(
        (("float file", "array", GREY), ("quant file", "QuantTensor", BLUE))
    ):
        y = 24 + number * 92
        c.rect(16, y, 150, 56, colour, opacity=0.3)
        c.text(91, y + 25, say[name], size=12)
        c.text(91, y + 43, say.get(kind, kind), size=11)
        c.line(166, y + 28, 218, 98 - 14 + number * 28, arrow=True, width=1.4)
    c.rect(222, 62, 150, 76, ORANGE, opacity=0.3)
    c.text(297, 84, say["loader"], size=13, bold=True)
    c.text(297, 104, say["rounds"], size=11)
    c.text(297, 122, say["keeps"], size=11)
    c.line(372, 100, 396, 100, arrow=True, width=1.4)
    c.rect(400, 66, 304, 30, BLUE, opacity=0.4)
    c.text(552, 86, say["packs"], size=12)
    c.line(552, 96, 552, 118, arrow=True, width=1.4)
    c.rect(400, 120, 304, 30, GREEN, opacity=0.4)
    c.text(552, 140, say["kernel"], size=12)
    c.text(552, 176, say["never"], size=12)
    return c


def main() -> None:
    """Write each figure twice, with English and with Chinese words."""
    drawings = {
        "quant-groups": groups,
        "quant-codings": codings,
        "quant-blocks": blocks,
        "quant-loading": loading,
    }
    save_all(drawings, WORDS)


if __name__ == "__main__":
    main()
