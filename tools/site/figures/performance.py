"""Draws the plots of docs/performance.md from the files in benchmarks/results.

python tools/site/figures/performance.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, exp, log, log2
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from canvas import Canvas  # noqa: E402

import site_results  # noqa: E402

FIGURES = HERE.parents[2] / "docs" / "figures"
BLUE, ORANGE, GREEN, VIOLET, GREY = (
    f"var(--c{number},{colour})"
    for number, colour in enumerate(("#3f6fd8", "#d9662b", "#2f9e64", "#a457c9", "#8a8f98"), start=1)
)
NAMES = {
    "llama-3.2-1b": "Llama-3.2-1B",
    "llama-3.1-8b": "Llama-3.1-8B",
    "qwen2.5-0.5b": "Qwen2.5-0.5B",
    "qwen3-0.6b": "Qwen3-0.6B",
}
VLLM = "vLLM 0.26"
VLLM_MS: dict[str, float] = {
    row["model"]: row["token_ms"] for row in site_results.find("peers", "results")[1] if row["engine"] == VLLM
}
"""Milliseconds per token of vLLM on such a GPU."""
FORMATS = {"bf16": ("", "F16"), "q8": (", q8 g64", "Q8_0"), "q4": (", q4 g64", "Q4_0")}
"""Of quantized decoding: what follows the name of a model in the results, and the format of llama.cpp."""
WIDTH = 720


@dataclass(frozen=True)
class Axis:
    """Where values lie on a drawing."""

    start: float
    end: float
    low: float
    high: float
    scale: Callable[[float], float] = float

    def at(self, value: float) -> float:
        low, high = self.scale(self.low), self.scale(self.high)
        return self.start + (self.scale(value) - low) / (high - low) * (self.end - self.start)


# --- one prompt at a time ---------------------------------------------------------------------------------


def decode_latency() -> Canvas:
    """Bars of ms per token beside vLLM's, with the floor that the memory sets."""
    rows = [(model, site_results.find("latency", f"results[model={model}]")[1]) for model in VLLM_MS]
    canvas = Canvas(WIDTH, 62 * len(rows) + 74, "Milliseconds per token, vLLM's, and the floor of the memory")
    axis, bottom = Axis(140, 660, 0, 5), 62 * len(rows) + 16
    _grid(canvas, axis, range(6), 14, bottom, "ms per token, greedy")
    for row, (model, facts) in enumerate(rows):
        y, taken, floor = 22 + 62 * row, facts["token_ms"]["greedy"]["median"], facts["floor_ms"]
        canvas.text(130, y + 26, NAMES[model], size=14, anchor="end")
        for place, (value, colour) in enumerate(((taken, BLUE), (VLLM_MS[model], GREY))):
            top = y + 23 * place
            canvas.rect(140, top, axis.at(value) - 140, 20, colour, opacity=0.75, line=0)
            canvas.text(axis.at(value) + 8, top + 14, f"{value:.3f}", size=12.5, anchor="start")
        canvas.line(axis.at(floor), y - 3, axis.at(floor), y + 23, colour=ORANGE, width=3)
    floor_of = "floor: bytes of the weights / read bandwidth"
    _legend(canvas, bottom + 50, [(BLUE, "KuiperLLM"), (GREY, VLLM), (ORANGE, floor_of)])
    return canvas


def quantized_decode() -> Canvas:
    """Bars of ms per token with weights of 16, 8 and 4 bits beside llama.cpp's, with the floor of each."""
    rows = [(model, bits) for model in ("llama-3.2-1b", "llama-3.1-8b") for bits in FORMATS]
    canvas = Canvas(WIDTH, 56 * len(rows) + 74, "Milliseconds per token with quantized weights")
    axis, bottom = Axis(170, 660, 0, 5), 56 * len(rows) + 16
    _grid(canvas, axis, range(6), 14, bottom, "ms per token, greedy")
    for row, (model, bits) in enumerate(rows):
        suffix, theirs = FORMATS[bits]
        facts = site_results.find("latency", f"results[model={model}{suffix}]")[1]
        peer = _peer("llama.cpp", model)["token_ms_by_format"][theirs]
        y, floor = 22 + 56 * row, facts["floor_ms"]
        canvas.text(160, y + 25, f"{NAMES[model]}, {bits}", size=14, anchor="end")
        for place, (value, colour, name) in enumerate(
            ((facts["token_ms"]["greedy"]["median"], BLUE, ""), (peer, GREY, f" {theirs}"))
        ):
            top = y + 21 * place
            canvas.rect(170, top, axis.at(value) - 170, 18, colour, opacity=0.75, line=0)
            canvas.text(axis.at(value) + 8, top + 13, f"{value:.3f}{name}", size=12, anchor="start")
        canvas.line(axis.at(floor), y - 3, axis.at(floor), y + 20, colour=ORANGE, width=3)
    floor_of = "floor: bytes of the weights / read bandwidth"
    _legend(canvas, bottom + 50, [(BLUE, "KuiperLLM"), (GREY, "llama.cpp"), (ORANGE, floor_of)])
    return canvas


def long_context() -> Canvas:
    """Microseconds that a context adds to a token, and what reading its keys and values alone takes."""
    models = ("llama-3.2-1b", "llama-3.1-8b")
    rows = site_results.find("long-context", "results")[1]
    canvas = Canvas(WIDTH, 330, "What a long context adds to each token")
    x, y = Axis(70, 690, 128, 32_000, log2), Axis(260, 20, 0, 1200)
    _frame(
        canvas, x, y, (128, 1024, 8192, 32_000), range(0, 1201, 200), "tokens of context", "µs more per token"
    )
    for model, colour in zip(models, (BLUE, VIOLET), strict=True):
        own = [row for row in rows if row["model"] == model]
        for key, dash in (
            ("us_more_than_at_128", ""),
            ("us_of_keys_and_values_at_full_bandwidth", "5 4"),
        ):
            _curve(canvas, [(x.at(row["context"]), y.at(row[key])) for row in own], colour, dash)
    _legend(
        canvas, 322, [(BLUE, NAMES[models[0]]), (VIOLET, NAMES[models[1]]), (GREY, "dashed: the bytes alone")]
    )
    return canvas


# --- many sequences ---------------------------------------------------------------------------------------


def throughput() -> Canvas:
    """Bars of output tokens per second of 256 requests, beside vLLM's."""
    models = ("qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b")
    canvas = Canvas(WIDTH, 62 * len(models) + 74, "Output tokens per second of many requests, and vLLM's")
    axis, bottom = Axis(140, 640, 0, 50_000), 62 * len(models) + 16
    _grid(canvas, axis, range(0, 50_001, 10_000), 14, bottom, "output tokens per second")
    for row, model in enumerate(models):
        y = 22 + 62 * row
        runs = site_results.find("throughput", f"results[model={model}].runs")[1]
        ours = max(run["output_tokens_per_s"] for run in runs)
        canvas.text(130, y + 26, NAMES[model], size=14, anchor="end")
        bars = (ours, BLUE), (_peer(VLLM, model)["output_tokens_per_s"], GREY)
        for place, (value, colour) in enumerate(bars):
            top = y + 23 * place
            canvas.rect(140, top, axis.at(value) - 140, 20, colour, opacity=0.75, line=0)
            canvas.text(axis.at(value) + 8, top + 14, f"{value:,.0f}", size=12.5, anchor="start")
    _legend(canvas, bottom + 50, [(BLUE, "KuiperLLM"), (GREY, VLLM)])
    return canvas


def batch_decode() -> Canvas:
    """Tokens per second by the number of sequences that decode together, and vLLM's."""
    canvas = Canvas(WIDTH, 330, "Tokens per second by the number of sequences that decode together")
    x, y = Axis(90, 670, 1, 256, log2), Axis(260, 20, 250, 100_000, log2)
    sizes = (1, 8, 32, 64, 128, 256)
    ticks = (250, 1000, 4000, 16_000, 64_000)
    _frame(canvas, x, y, sizes, ticks, "sequences", "tokens per second")
    for model, colour in (("llama-3.2-1b", BLUE), ("llama-3.1-8b", VIOLET)):
        batches = site_results.find("batch-decode", f"results[model={model}].batches")[1]
        points = [(x.at(size), y.at(batches[str(size)]["whole_tokens_per_s"])) for size in sizes]
        _curve(canvas, points, colour)
        peer = y.at(_peer(VLLM, model)["batch_32_tokens_per_s"])
        canvas.circle(round(x.at(32), 1), round(peer, 1), 5, GREY)
    _legend(
        canvas,
        322,
        [(BLUE, NAMES["llama-3.2-1b"]), (VIOLET, NAMES["llama-3.1-8b"]), (GREY, f"{VLLM}, 32 sequences")],
    )
    return canvas


# --- parts ------------------------------------------------------------------------------------------------


def gemm() -> Canvas:
    """Speed of matrix products as a multiple of cuBLAS's, each shape a dot, the geometric mean a line."""
    rows = site_results.find("gemm", "results")[1]
    sizes = sorted({row["m"] for row in rows})
    canvas = Canvas(WIDTH, 330, "Speed of matrix products over that of cuBLAS")
    x, y = Axis(90, 670, sizes[0], sizes[-1], log2), Axis(260, 20, 0.8, 1.8)
    ticks = [0.8, 1.0, 1.2, 1.4, 1.6, 1.8]
    _frame(canvas, x, y, sizes, ticks, "rows (M)", "times cuBLAS")
    canvas.line(70, y.at(1), 690, y.at(1), width=1.4)
    means = []
    for size in sizes:
        ratios = [row["ratio"] for row in rows if row["m"] == size]
        means.append((x.at(size), y.at(exp(fmean(map(log, ratios))))))
        for ratio in ratios:
            canvas.circle(x.at(size), y.at(min(ratio, y.high)), 3, BLUE)
    _curve(canvas, means, ORANGE)
    _legend(canvas, 322, [(BLUE, "a shape of a Llama model"), (ORANGE, "geometric mean")])
    return canvas


def gemm_codes() -> Canvas:
    """Speed of matrix products with quantized weights over that with bfloat16 weights."""
    rows = site_results.find("gemm-codes", "results")[1]
    groups = [(m, form) for m in sorted({row["m"] for row in rows}) for form in ("q4", "q8", "Q4_K")]
    canvas = Canvas(WIDTH, 40 * len(groups) + 84, "Products with quantized weights over those with bfloat16")
    axis, bottom = Axis(170, 680, 0.5, 1.3), 40 * len(groups) + 20
    ticks = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3]
    _grid(canvas, axis, ticks, 14, bottom, "times bfloat16")
    canvas.line(axis.at(1), 14, axis.at(1), bottom, width=1.6)
    for row, (m, form) in enumerate(groups):
        y = 36 + 40 * row
        own = [each for each in rows if (each["m"], each["format"]) == (m, form)]
        ratios = [each["bf16_us"] / each["us"][each["tiling"]] for each in own]
        canvas.text(160, y + 5, f"{m:,} rows, {form}", size=14, anchor="end")
        for ratio in ratios:
            canvas.circle(round(axis.at(ratio), 1), y, 3.5, BLUE)
        mean = axis.at(exp(fmean(map(log, ratios))))
        canvas.line(round(mean, 1), y - 13, round(mean, 1), y + 13, colour=ORANGE, width=3)
    _legend(canvas, bottom + 50, [(BLUE, "a shape of a Llama model"), (ORANGE, "geometric mean")])
    return canvas


def attention() -> Canvas:
    """TFLOPS of attention over a prompt."""
    rows = [row for row in site_results.find("attention", "results")[1] if row["kind"] == "prefill"]
    canvas = Canvas(WIDTH, 330, "Speed of attention over a prompt")
    x, y = Axis(90, 670, 512, 8192, log2), Axis(260, 20, 0, 700)
    _frame(canvas, x, y, (512, 2048, 8192), range(0, 701, 100), "tokens of the prompt", "TFLOPS")
    models = list(dict.fromkeys(row["model"] for row in rows))
    for model, colour in zip(models, (BLUE, VIOLET, GREEN), strict=True):
        points = [(x.at(row["tokens"]), y.at(row["score"])) for row in rows if row["model"] == model]
        _curve(canvas, points, colour)
    _legend(canvas, 322, list(zip((BLUE, VIOLET, GREEN), models, strict=True)))
    return canvas


def beside_llama_cpp() -> Canvas:
    """Speed over llama.cpp's on a processor: medians of the rounds, with the least and the most."""
    cells = [
        (
            f"{NAMES[model]}, {form}",
            site_results.find(f"llama-cpp-{form}", f"cells[config={model},format={form}].ratio")[1],
        )
        for form in ("q8", "q4", "q4_k_m", "bf16")
        for model in ("llama-3.2-1b", "qwen2.5-0.5b")
    ]
    canvas = Canvas(WIDTH, 56 * len(cells) + 74, "Speed over that of llama.cpp on two cores")
    most = ceil(max(ratios[what]["max"] for _, ratios in cells for what in ratios) + 0.1)
    axis, bottom = Axis(190, 680, 0, most), 56 * len(cells) + 20
    _grid(canvas, axis, range(most + 1), 14, bottom, "times llama.cpp")
    canvas.line(axis.at(1), 14, axis.at(1), bottom, width=1.6)
    for row, (name, ratios) in enumerate(cells):
        canvas.text(180, 50 + 56 * row, name, size=14, anchor="end")
        for part, (what, colour) in enumerate((("prefill", BLUE), ("decode", GREEN))):
            y, ratio = 22 + 56 * row + 22 * part, ratios[what]
            canvas.rect(190, y, axis.at(ratio["median"]) - 190, 19, colour, opacity=0.75, line=0)
            canvas.line(axis.at(ratio["min"]), y + 9.5, axis.at(ratio["max"]), y + 9.5, width=1.2)
            canvas.text(axis.at(ratio["max"]) + 8, y + 14, f"{ratio['median']:.2f}", size=12, anchor="start")
    _legend(canvas, bottom + 44, [(BLUE, "prefill of 512 tokens"), (GREEN, "decode")])
    return canvas


# --- pieces of plots --------------------------------------------------------------------------------------


def _peer(engine: str, model: str) -> dict[str, Any]:
    """What was measured of another engine."""
    facts: dict[str, Any] = site_results.find("peers", f"results[engine={engine},model={model}]")[1]
    return facts


def _grid(canvas: Canvas, x: Axis, ticks: Sequence[float], top: float, bottom: float, label: str) -> None:
    for tick in ticks:
        canvas.line(x.at(tick), top, x.at(tick), bottom, colour=GREY, width=0.5)
        canvas.text(x.at(tick), bottom + 16, f"{tick:,g}")
    canvas.text(x.end, bottom + 32, label, anchor="end")


def _frame(
    canvas: Canvas, x: Axis, y: Axis, columns: Sequence[float], rows: Sequence[float], below: str, beside: str
) -> None:
    left, right = x.start - 20, x.end + 20
    for tick in columns:
        canvas.text(x.at(tick), y.start + 18, f"{tick:,}")
        canvas.line(x.at(tick), y.start, x.at(tick), y.start + 4)
    for tick in rows:
        canvas.line(left, y.at(tick), right, y.at(tick), colour=GREY, width=0.5)
        canvas.text(left - 6, y.at(tick) + 4, f"{tick:,g}", anchor="end")
    canvas.text((left + right) / 2, y.start + 36, below)
    canvas.text(14, (y.start + y.end) / 2, beside, turn=-90)


def _curve(canvas: Canvas, points: Sequence[tuple[float, float]], colour: str, dash: str = "") -> None:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    canvas.path(path, colour=colour, width=2.2, dash=dash)
    for x, y in points:
        canvas.circle(round(x, 1), round(y, 1), 3, colour)


def _legend(canvas: Canvas, y: float, entries: Sequence[tuple[str, str]]) -> None:
    x = 70.0
    for colour, words in entries:
        canvas.rect(x, y - 10, 14, 11, colour, opacity=0.85, line=0)
        canvas.text(x + 20, y, words, size=12.5, anchor="start")
        x += 44 + 6.9 * len(words)


PLOTS: dict[str, Callable[[], Canvas]] = {
    "decode-latency.svg": decode_latency,
    "quantized-decode.svg": quantized_decode,
    "long-context.svg": long_context,
    "throughput.svg": throughput,
    "batch-decode.svg": batch_decode,
    "gemm.svg": gemm,
    "gemm-codes.svg": gemm_codes,
    "attention.svg": attention,
    "beside-llama-cpp.svg": beside_llama_cpp,
}


def drawings() -> dict[str, str]:
    """Every plot by the name of its file."""
    return {name: draw().svg() for name, draw in PLOTS.items()}


if __name__ == "__main__":
    for name, drawing in drawings().items():
        (FIGURES / name).write_text(drawing, encoding="utf-8")
