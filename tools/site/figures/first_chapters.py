"""Draws the figures of chapters 1 to 3, memory, operators, tensors, and the map of the course.

python tools/site/figures/first_chapters.py
"""

from __future__ import annotations

from collections.abc import Callable

from canvas import COLOURS, GREY, Canvas

BLUE, ORANGE, GREEN, PURPLE, RED, TEAL = COLOURS[:6]

Say = Callable[[str, str], str]
"""Takes a text in English and in Chinese, gives the one of the figure."""


def box(
    c: Canvas, x: float, y: float, w: float, h: float, colour: str, head: str, *more: str, size: float = 13
) -> None:
    """A box with a bold first line and further lines beneath it."""
    c.rect(x, y, w, h, colour, opacity=0.22, radius=5)
    first = y + h / 2 + 4.5 - 8 * len(more)
    c.text(x + w / 2, first, head, bold=True, size=size)
    for row, words in enumerate(more, start=1):
        c.text(x + w / 2, first + 17 * row, words, size=size - 1)


# --- chapter 1 ----------------------------------------------------------------------------------------------


def memory_layers(say: Say) -> Canvas:
    """From a tensor down to the memory of a device."""
    c = Canvas(720, 380, say("From a tensor down to the memory of the device", "从张量到设备内存"))
    left, width = 40, 380
    rows = (
        (BLUE, "Tensor", say("type, shape, strides, offset", "类型、形状、步长、偏移")),
        (TEAL, "Buffer", say("the right to use some bytes", "使用一段字节的权利")),
        (GREEN, say("lease", "租约"), say("ends when nobody refers to it", "没有引用时结束")),
        (ORANGE, "Allocator", say("size classes, slabs, statistics", "尺寸类、slab、统计")),
    )
    for i, (colour, head, words) in enumerate(rows):
        box(c, left, 14 + i * 74, width, 50, colour, head, words)
        if i:
            c.line(left + width / 2, i * 74 - 9, left + width / 2, 13 + i * 74, arrow=True)
    for i, (head, words) in enumerate(
        (
            ("HostMemory", say("memory maps", "内存映射")),
            ("DeviceMemory", say("the driver of the GPU", "GPU 驱动")),
        )
    ):
        box(c, left + i * 195, 316, 185, 50, PURPLE, head, words)
        c.line(left + width / 2, 287, left + 92 + i * 195, 315, arrow=True)
    holders = (
        (say("another view", "另一个视图"), 111),
        (say("NumPy array", "NumPy 数组"), 185),
        (say("DLPack consumer", "DLPack 使用方"), 214),
    )
    for words, to in holders:
        y = {111: 113, 185: 173, 214: 214}[to]
        c.rect(520, y - 15, 170, 30, GREY, opacity=0.2, radius=5)
        c.text(605, y + 4.5, words, size=12.5)
        c.line(519, y, left + width + 1, 113 if to == 111 else 187, arrow=True)
    c.text(605, 80, say("who else holds the memory", "还有谁持有这段内存"), size=12)
    c.text(480, 344, say("reserves, releases", "预留与归还"), size=12, anchor="start")
    c.text(480, 264, say("hands out, caches", "分发与缓存"), size=12, anchor="start")
    return c


def size_classes(say: Say) -> Canvas:
    """Eight steps between two powers of two."""
    c = Canvas(720, 190, say("Eight classes between two powers of two", "两个 2 的幂之间有八个尺寸类"))

    def at(nbytes: float) -> float:
        return 40 + (nbytes - 512) / (2048 - 512) * 640

    c.line(at(512), 90, at(2048), 90, width=1.4)
    for low, step, colour in ((512, 64, BLUE), (1024, 128, ORANGE)):
        c.rect(at(low), 96, at(2 * low) - at(low), 10, colour, opacity=0.4, line=0)
        c.text(
            (at(low) + at(2 * low)) / 2,
            124,
            say(f"step {step}, an eighth of {low}", f"步长 {step}，即 {low} 的八分之一"),
        )
        for i in range(9):
            c.line(at(low + i * step), 82, at(low + i * step), 90, width=1.2)
    for nbytes in (512, 1024, 1536, 2048):
        c.text(at(nbytes), 76, f"{nbytes:,}", size=12)
    for asked, given, y, left in (
        (1000, 1024, 168, True),
        (1025, 1152, 148, False),
        (1793, 1920, 148, False),
    ):
        c.circle(at(asked), 90, 3.5, RED)
        words, side = f"{asked:,} → {given:,}", "end" if left else "start"
        c.text(at(asked) + (-8 if left else 8), y, words, anchor=side, size=12.5)
        c.line(at(asked), 94, at(asked), y - 4, dash="3 3")
    c.text(40, 28, say("What is set aside, in bytes", "实际分配的字节数"), anchor="start", bold=True, size=13)
    c.text(
        40,
        48,
        say("a request takes the next mark to its right", "请求取它右边最近的刻度"),
        anchor="start",
        size=12,
    )
    return c


def lease(say: Say) -> Canvas:
    """Who holds a block, and how it comes back."""
    c = Canvas(
        720, 270, say("The view and the NumPy array both hold the lease", "视图和 NumPy 数组都持有租约")
    )
    box(c, 20, 20, 150, 44, BLUE, "x", "[1024, 1024]")
    box(c, 20, 88, 150, 44, BLUE, "row = x[3]", "[1024]")
    box(c, 20, 156, 150, 44, GREY, "array", "numpy.ndarray")
    box(c, 250, 54, 130, 44, TEAL, "Buffer", "4 MiB")
    box(c, 450, 88, 110, 44, GREEN, say("lease", "租约"), "__del__")
    box(c, 610, 88, 96, 44, ORANGE, say("block", "块"))
    c.line(171, 42, 249, 68, arrow=True)
    c.line(171, 110, 249, 84, arrow=True)
    c.line(381, 78, 449, 102, arrow=True)
    c.line(171, 178, 449, 120, arrow=True)
    c.line(561, 110, 609, 110, arrow=True)
    c.rect(372, 206, 230, 46, "none", radius=5)
    c.text(487, 226, say("queue of returned blocks", "归还块的队列"), size=12.5, bold=True)
    c.text(487, 243, say("no lock: appended by the finalizer", "无锁：由终结器追加"), size=11.5)
    c.line(505, 133, 497, 205, arrow=True, dash="4 3")
    c.text(512, 172, say("last holder gone", "最后的持有者消失"), anchor="start", size=12)
    box(c, 20, 214, 200, 42, ORANGE, "Allocator", say("collects before it decides", "做决定之前先回收"))
    c.line(371, 234, 221, 234, arrow=True, dash="4 3")
    return c


def staging(say: Say) -> Canvas:
    """Threads fill pieces while earlier ones cross the bus."""
    c = Canvas(720, 250, say("Filling pieces and sending them overlap", "填充与传输相互重叠"))
    unit, first = 17.0, 130
    rows = [say(f"thread {i}", f"线程 {i}") for i in range(1, 5)] + [say("bus", "总线")]
    for row, name in enumerate(rows):
        c.text(118, 55 + row * 34, name, anchor="end", size=12.5, bold=row == 4)
        c.line(first, 64 + row * 34, 700, 64 + row * 34, width=0.4)
    busy, bus = [0.0] * 4, 0.0
    for piece in range(12):
        thread = piece % 4
        start, busy[thread] = busy[thread], busy[thread] + 8
        colour = COLOURS[piece % 4]
        c.rect(first + start * unit, 38 + thread * 34, 8 * unit - 2, 24, colour, opacity=0.35)
        c.text(first + (start + 4) * unit, 54 + thread * 34, str(piece + 1), size=12)
        bus = max(bus, busy[thread])
        c.rect(first + bus * unit, 38 + 4 * 34, 2 * unit - 2, 24, colour, opacity=0.6)
        c.text(first + (bus + 1) * unit, 54 + 4 * 34, str(piece + 1), size=12)
        bus += 2
    c.line(first, 222, 690, 222, arrow=True)
    c.text(first, 240, say("time", "时间"), anchor="start", size=12)
    c.text(first, 24, say("copied into page-locked pieces", "复制到锁页的小块"), anchor="start", size=12.5)
    c.text(410, 240, say("after the first piece, the bus never waits", "第一块之后，总线不再等待"), size=12)
    return c


# --- chapter 2 ----------------------------------------------------------------------------------------------


def operator_call(say: Say) -> Canvas:
    """What happens in one call of an operator."""
    c = Canvas(720, 300, say("What happens in one call", "一次调用中发生的事"))
    box(c, 250, 10, 220, 34, BLUE, "silu_mul(gate_up)")
    steps = (
        (TEAL, "CONTRACT.check", say("shapes, types, device", "形状、类型、设备")),
        (TEAL, "Tensor.empty", say("room for the result", "为结果留出空间")),
        (TEAL, "implementation", say("finds ops.silu_mul.cpu", "找到 ops.silu_mul.cpu")),
    )
    for i, (colour, head, words) in enumerate(steps):
        box(c, 24 + i * 232, 72, 208, 48, colour, head, words)
        if i:
            c.line(24 + i * 232 - 23, 96, 24 + i * 232 - 1, 96, arrow=True)
    c.path("M250 27 H128 V71")
    c.line(128, 66, 128, 71, arrow=True)
    box(
        c,
        488,
        148,
        208,
        48,
        ORANGE,
        "cpu.silu_mul",
        say("launcher: sizes, strides, items", "启动器：尺寸、步长、工作项"),
    )
    c.line(592, 121, 592, 147, arrow=True)
    box(c, 256, 148, 208, 48, ORANGE, "launch", say("kernel, arguments, items", "内核、参数、工作项"))
    c.line(487, 172, 465, 172, arrow=True)
    box(c, 24, 240, 300, 48, GREEN, say("threads run the kernel", "线程运行内核"), "begin ≤ item < end")
    box(c, 396, 240, 300, 48, PURPLE, say("a graph records it", "图把它记录下来"),
        say("replay() runs it, without all of the above", "replay() 直接运行，略过以上各步"))  # fmt: skip
    c.line(330, 197, 190, 239, arrow=True)
    c.line(390, 197, 530, 239, arrow=True)
    c.text(226, 216, say("usually", "通常"), size=12, anchor="end")
    c.text(494, 216, say("inside capture()", "在 capture() 之内"), size=12, anchor="start")
    return c


def work_items(say: Say) -> Canvas:
    """Rows cut into blocks, blocks handed to threads."""
    c = Canvas(720, 240, say("Rows, blocks, items and threads", "行、块、工作项与线程"))
    colours = (BLUE, ORANGE)
    prompt = say(
        "a prompt: 3 rows of 3 blocks, 9 items, 2 threads, grain 2",
        "提示词：3 行 × 3 块，9 个工作项，2 个线程，粒度 2",
    )
    c.text(20, 26, prompt, anchor="start", bold=True, size=13)
    claimed = (0, 0, 1, 1, 1, 1, 0, 0, 1)
    for row in range(3):
        c.text(70, 57 + row * 34, say(f"row {row}", f"第 {row} 行"), anchor="end", size=12)
        for block in range(3):
            item = row * 3 + block
            width = (220, 220, 120)[block]
            left = 80 + block * 224
            c.rect(left, 40 + row * 34, width, 26, colours[claimed[item]], opacity=0.3)
            c.text(left + width / 2, 57 + row * 34, say(f"item {item}", f"工作项 {item}"), size=12)
    step = say("a decode step: 1 row of 8 blocks, shared all the same", "解码步：1 行 × 8 块，同样分给各线程")
    c.text(20, 172, step, anchor="start", bold=True, size=13)
    for item in range(8):
        c.rect(80 + item * 76, 186, 72, 26, colours[(item // 2) % 2], opacity=0.3)
        c.text(116 + item * 76, 203, str(item), size=12)
    for i, name in enumerate((say("thread 1", "线程 1"), say("thread 2", "线程 2"))):
        c.rect(500 + i * 100, 222, 12, 12, colours[i], opacity=0.4)
        c.text(518 + i * 100, 232, name, anchor="start", size=12)
    return c


def decoder_layer(say: Say) -> Canvas:
    """The operators of one decoder layer along the residual stream."""
    c = Canvas(720, 210, say("One decoder layer as operators", "由算子构成的一个解码层"))
    c.rect(20, 150, 680, 30, GREY, opacity=0.25, radius=5)
    c.text(
        360,
        170,
        say("residual stream [T, D], changed in place", "残差流 [T, D]，原地更新"),
        size=13,
        bold=True,
    )
    ops = (
        (BLUE, "norm_linear", say("norm, q k v", "归一化，q k v"), 40, True, False),
        (
            ORANGE,
            "self_attention",
            say("rope, cache, attention, o", "rope、缓存、注意力、o"),
            205,
            False,
            True,
        ),
        (GREEN, "norm_swiglu", say("norm, gate, up, silu", "归一化，gate、up、silu"), 390, True, False),
        (PURPLE, "linear", say("down, added", "down，累加"), 555, False, True),
    )
    widths = (145, 165, 145, 125)
    for (colour, head, words, left, reads, adds), width in zip(ops, widths, strict=True):
        box(c, left, 50, width, 50, colour, head, words)
        middle = left + width / 2
        if reads:
            c.line(middle, 149, middle, 101, arrow=True)
            c.line(left + width, 75, left + width + 19, 75, arrow=True)
        if adds:
            c.line(middle, 101, middle, 149, arrow=True)
            c.text(middle + 8, 130, "+", anchor="start", size=16, bold=True)
    c.text(205, 32, "SelfAttention", size=13, bold=True)
    c.text(535, 32, "SwiGLU", size=13, bold=True)
    c.text(
        20,
        201,
        say("reads: arrows up; adds its result: arrows down", "向上的箭头：读取；向下的箭头：把结果加回去"),
        anchor="start",
        size=12,
    )
    return c


# --- chapter 3 ----------------------------------------------------------------------------------------------


def cells(c: Canvas, x: float, y: float, values: list[str], colours: list[str], side: float = 40) -> None:
    """A row of memory cells."""
    for i, (value, colour) in enumerate(zip(values, colours, strict=True)):
        c.rect(x + i * side, y, side, side * 0.75, colour, opacity=0.35 if colour != "none" else 0)
        c.text(x + (i + 0.5) * side, y + side * 0.375 + 4.5, value, size=12.5)


def strides(say: Say) -> Canvas:
    """Six numbers in memory, as [2, 3] and as [3, 2]."""
    c = Canvas(
        720, 260, say("One memory, seen as a matrix and as its transpose", "同一段内存，看作矩阵和它的转置")
    )
    numbers = ["10", "11", "12", "13", "14", "15"]
    rows = [BLUE] * 3 + [ORANGE] * 3
    c.text(240, 30, say("memory", "内存"), size=13, bold=True)
    cells(c, 120, 40, numbers, rows)
    c.path("M140 76 V90 H260 V76", colour="currentColor")
    c.text(200, 106, say("one row on: 3 elements", "下一行：3 个元素"), size=12)
    c.path("M300 76 V90 H340 V76", colour="currentColor")
    c.text(330, 106, say("one column on: 1", "下一列：1 个"), size=12, anchor="start")
    c.text(160, 138, "x: shape (2, 3), strides (3, 1)", size=12.5, bold=True)
    for i in range(2):
        cells(c, 100, 150 + i * 32, numbers[3 * i : 3 * i + 3], rows[3 * i : 3 * i + 3])
    c.text(520, 138, "x.T: shape (3, 2), strides (1, 3)", size=12.5, bold=True)
    for i in range(3):
        cells(c, 480, 150 + i * 32, [numbers[i], numbers[i + 3]], [BLUE, ORANGE])
    c.text(360, 196, say("same memory", "同一段内存"), size=12)
    c.line(300, 180, 420, 180, arrow=True)
    c.line(420, 180, 300, 180, arrow=True)
    return c


def view(say: Say) -> Canvas:
    """base[1:3, 2:5] on the memory of base."""
    c = Canvas(720, 250, say("A slice of a tensor on its buffer", "张量的切片在缓冲区上的位置"))
    chosen = {(i, j) for i in (1, 2) for j in (2, 3, 4)}
    c.text(40, 26, "base: shape (4, 6), strides (6, 1), offset 0", anchor="start", size=12.5, bold=True)
    for i in range(4):
        cells(c, 40, 36 + i * 27, [str(6 * i + j) for j in range(6)],
              [ORANGE if (i, j) in chosen else "none" for j in range(6)], side=36)  # fmt: skip
    c.text(400, 26, "base[1:3, 2:5]: shape (2, 3), strides (6, 1)", anchor="start", size=12.5, bold=True)
    for i in range(2):
        cells(c, 400, 36 + i * 27, [str(6 * (i + 1) + 2 + j) for j in range(3)], [ORANGE] * 3, side=36)
    c.text(
        400,
        116,
        say("offset 32 = (1 · 6 + 2) · 4 bytes", "偏移 32 = (1 · 6 + 2) · 4 字节"),
        anchor="start",
        size=12.5,
    )
    c.text(
        40,
        172,
        say("the buffer, element by element", "缓冲区，逐个元素"),
        anchor="start",
        size=12.5,
        bold=True,
    )
    for n in range(24):
        i, j = divmod(n, 6)
        c.rect(40 + n * 26, 182, 26, 24, ORANGE if (i, j) in chosen else "none", opacity=0.35)
        c.text(53 + n * 26, 198, str(n), size=11)
    c.line(40 + 8 * 26, 232, 40 + 8 * 26, 208, arrow=True)
    c.text(
        40 + 8 * 26 + 6, 232, say("element (0, 0) of the view", "视图的元素 (0, 0)"), anchor="start", size=12
    )
    c.path(f"M{53 + 8 * 26} 180 V174 H{53 + 14 * 26} V180")
    c.text(53 + 11 * 26, 170, say("stride 6", "步长 6"), size=12)
    return c


def runs(say: Say) -> Canvas:
    """Which reshapes of [4, 8] in rows of 24 are views."""
    c = Canvas(720, 250, say("Two runs: which shapes are views", "两段连续区：哪些形状可以是视图"))
    c.text(
        20,
        24,
        say("fused[:, 8:16]: rows of 8, 24 apart", "fused[:, 8:16]：每行 8 个元素，行距 24"),
        anchor="start",
        bold=True,
        size=13,
    )
    for row in range(4):
        left = 20 + row * 172
        c.rect(left, 36, 164, 26, "none", line=0.5)
        c.rect(left + 54, 36, 55, 26, COLOURS[row], opacity=0.4)
        c.text(left + 81, 53, f"{8 * row}–{8 * row + 7}", size=11.5)
    c.text(
        102 + 86,
        80,
        say("the distance changes here: a border between runs", "此处距离改变：两段之间的边界"),
        size=12,
        anchor="start",
    )
    c.line(186, 76, 160, 65, arrow=True)
    yes, no = say("a view", "可以是视图"), say("no view", "不能是视图")
    cases = (
        ("(4, 2, 4)", "(24, 4, 1)", say("cuts the inner run", "切开内层"), True),
        ("(2, 2, 8)", "(48, 24, 1)", say("cuts the outer run", "切开外层"), True),
        ("(8, 4)", "—", say("steps by 4, then by 20", "先隔 4，再隔 20"), False),
        ("(32,)", "—", say("would join what has gaps", "要把有空隙的连起来"), False),
    )
    for i, (shape, found, why, possible) in enumerate(cases):
        y = 120 + i * 32
        c.rect(20, y - 19, 680, 28, GREEN if possible else RED, opacity=0.15, line=0)
        c.text(36, y, shape, anchor="start", size=13, bold=True)
        c.text(170, y, say("strides ", "步长 ") + found, anchor="start", size=13)
        c.text(360, y, why, anchor="start", size=13)
        c.text(684, y, yes if possible else no, anchor="end", size=13, bold=True)
    return c


def heads(say: Say) -> Canvas:
    """The heads of k inside the fused product."""
    c = Canvas(720, 230, say("Heads as views of the fused product", "各个头是融合结果上的视图"))
    c.text(
        20,
        24,
        say("qkv: [5, 128], one row for each token", "qkv：[5, 128]，每个 token 一行"),
        anchor="start",
        bold=True,
        size=13,
    )
    parts = (("q", 4, BLUE), ("k", 2, ORANGE), ("v", 2, GREEN))
    side = 80
    for row in range(5):
        left = 40.0
        for name, count, colour in parts:
            for head in range(count):
                c.rect(left, 34 + row * 22, side, 20, colour, opacity=0.45 if name == "k" else 0.18)
                if row == 0:
                    c.text(left + side / 2, 48, f"{name}{head}", size=12)
                left += side
    c.path("M360 148 V160 H440 V148")
    c.text(400, 176, say("stride 16: next head", "步长 16：下一个头"), size=12)
    c.path("M30 44 H20 V66 H30")
    c.text(20, 168, say("stride 128: next token", "步长 128：下一个 token"), size=12, anchor="start")
    c.line(24, 156, 22, 70, dash="3 3")
    words = say(
        "k.reshape(5, 2, 16): shape (5, 2, 16), strides (128, 16, 1), no copy",
        "k.reshape(5, 2, 16)：形状 (5, 2, 16)，步长 (128, 16, 1)，不复制",
    )
    c.text(20, 212, words, anchor="start", size=13, bold=True)
    return c


def dlpack(say: Say) -> Canvas:
    """Producer, capsule, consumer."""
    c = Canvas(
        720, 270, say("A capsule hands memory from one library to another", "胶囊把内存从一个库交给另一个库")
    )
    c.text(110, 24, say("producer", "生产方"), bold=True, size=13)
    c.text(360, 24, say("capsule", "胶囊"), bold=True, size=13)
    c.text(610, 24, say("consumer", "消费方"), bold=True, size=13)
    box(c, 20, 40, 180, 46, BLUE, "Tensor", say("shape, strides", "形状、步长"))
    box(c, 20, 120, 180, 46, TEAL, "_Export", say("holds the lease", "持有租约"))
    box(c, 20, 204, 180, 46, GREEN, say("memory", "内存"))
    c.line(110, 87, 110, 119, arrow=True)
    c.line(110, 167, 110, 203, arrow=True)
    c.rect(250, 40, 220, 150, ORANGE, opacity=0.18, radius=5)
    c.text(360, 62, "“dltensor_versioned”", size=12.5, bold=True)
    for i, words in enumerate(
        ("data, device, dtype", "ndim, shape, strides", "flags", "manager_ctx", "deleter")
    ):
        c.text(268, 86 + i * 22, words, anchor="start", size=12.5)
    c.line(262, 148, 201, 144, arrow=True)
    c.path("M262 82 H228 V226 H206")
    c.line(212, 226, 201, 226, arrow=True)
    box(
        c,
        520,
        40,
        180,
        46,
        PURPLE,
        say("its own tensor", "它自己的张量"),
        say("on the same memory", "在同一段内存上"),
    )
    c.line(519, 64, 471, 64, arrow=True)
    c.text(520, 112, say("1. reads the structure", "1. 读取结构体"), anchor="start", size=12.5)
    c.text(520, 134, say("2. renames to “used_…”", "2. 改名为 “used_…”"), anchor="start", size=12.5)
    c.text(520, 156, say("3. later: calls deleter", "3. 用完后：调用 deleter"), anchor="start", size=12.5)
    c.line(516, 170, 330, 176, arrow=True, dash="4 3")
    c.text(
        250,
        214,
        say("if nobody takes it, the capsule's destructor", "若无人取用，由胶囊的析构函数"),
        anchor="start",
        size=12,
    )
    c.text(
        250,
        232,
        say("calls the deleter; either way, once", "调用 deleter；总之只调用一次"),
        anchor="start",
        size=12,
    )
    return c


# --- the whole course -------------------------------------------------------------------------------------


def course_map(say: Say) -> Canvas:
    """The layers of the framework, and the chapters that are about them."""
    c = Canvas(
        720, 330, say("The layers of the framework and the chapters about them", "框架的各层与对应的章节")
    )
    c.text(20, 24, say("imports point down only", "导入只向下"), anchor="start", size=12)
    c.text(470, 24, say("chapter", "章"), anchor="start", size=12)
    rows = (
        (("cli", "server"), ()),
        (("engine",), (7, 8)),
        (("models",), (2,)),
        (("layers",), (2,)),
        (("ops", "checkpoint", "text"), (2, 4, 6, 9)),
        (("backends", "quant"), (1, 4, 5, 6, 8, 9)),
        (("core",), (1, 3)),
    )
    for row, (names, chapters) in enumerate(rows):
        y = 36 + row * 41
        width = (430 - 8 * (len(names) - 1)) / len(names)
        for i, name in enumerate(names):
            c.rect(20 + i * (width + 8), y, width, 33, BLUE if chapters else GREY, opacity=0.2, radius=5)
            c.text(20 + i * (width + 8) + width / 2, y + 21, name, size=13, bold=True)
        for i, chapter in enumerate(chapters):
            c.rect(470 + i * 38, y + 2, 30, 29, COLOURS[(chapter - 1) % 7], opacity=0.35, radius=14)
            c.text(485 + i * 38, y + 21, str(chapter), size=13, bold=True)
    return c


FIGURES = {
    "course-map": course_map,
    "memory-layers": memory_layers,
    "size-classes": size_classes,
    "lease": lease,
    "staging": staging,
    "operator-call": operator_call,
    "work-items": work_items,
    "decoder-layer": decoder_layer,
    "strides": strides,
    "view": view,
    "runs": runs,
    "heads": heads,
    "dlpack": dlpack,
}


def main() -> None:
    """Write every figure in both languages."""
    for name, draw in FIGURES.items():
        draw(lambda english, _: english).save(f"{name}.svg")
        draw(lambda _, chinese: chinese).save(f"{name}.zh.svg")


if __name__ == "__main__":
    main()
