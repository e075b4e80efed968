"""Draws the layers of the package for docs/architecture.md.

python tools/site/figures/architecture.py
"""

from __future__ import annotations

from pathlib import Path

from canvas import Canvas

OUTPUT = Path(__file__).resolve().parents[3] / "docs" / "figures" / "layers.svg"

LAYERS = (
    (("cli", "options, output"), ("server", "OpenAI's API over HTTP")),
    (("engine", "requests, scheduling, key/value cache, choosing tokens"),),
    (("models", "families: the decoder, and how each differs"),),
    (("layers", "hold weights, call operators"),),
    (("ops", "what is computed"), ("checkpoint", "files as tensors"), ("text", "tokenizers, templates")),
    (("backends", "devices and their kernels"), ("quant", "blocks: pack, unpack")),
    (("core", "device, allocator, buffer, tensor"),),
    (("config", "what may be set, read once"),),
    (("errors", "every exception raised on purpose"),),
)
COLOURS = (
    *("var(--c4,#a457c9)",) * 1,
    *("var(--c1,#3f6fd8)",) * 3,
    "var(--c3,#2f9e64)",
    "var(--c2,#d9662b)",
    *("var(--c5,#8a8f98)",) * 3,
)
LEFT, RIGHT, STEP = 20, 660, 50


def drawing() -> str:
    """The layers from top to bottom, with an arrow for the direction of imports."""
    canvas = Canvas(720, STEP * len(LAYERS) + 20, "The layers of the package; imports point down only")
    for row, (packages, colour) in enumerate(zip(LAYERS, COLOURS, strict=True)):
        width = (RIGHT - LEFT - 10 * (len(packages) - 1)) / len(packages)
        for column, (name, what) in enumerate(packages):
            x, y = LEFT + column * (width + 10), 10 + STEP * row
            canvas.rect(x, y, width, STEP - 8, colour, opacity=0.3)
            canvas.text(x + width / 2, y + 18, name, size=14, bold=True)
            canvas.text(x + width / 2, y + 34, what, size=12)
    canvas.line(690, 14, 690, STEP * len(LAYERS), width=1.6, arrow=True)
    canvas.text(710, STEP * len(LAYERS) / 2, "imports", size=13, turn=90)
    return canvas.svg()


if __name__ == "__main__":
    OUTPUT.write_text(drawing(), encoding="utf-8")
