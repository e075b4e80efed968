"""Draws SVG figures for the course: rectangles, lines and words, legible on light and dark pages.

Words and outlines take the colour of the page's text (`currentColor`); areas have mid-tone colours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from xml.sax.saxutils import escape

FIGURES = Path(__file__).resolve().parents[3] / "docs" / "course" / "figures"
COLOURS = ("#4c8bf5", "#e8833a", "#3fa45b", "#9a66d0", "#d1495b", "#2a9d9d", "#b8912b", "#8a8f98")
GREY = COLOURS[7]


class Canvas:
    """A figure of a size in pixels; `title` is what a screen reader says."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.size = width, height
        self.title = title
        self.parts: list[str] = []

    def rect(
        self, x: float, y: float, w: float, h: float, fill: str = "none", *,
        opacity: float = 0.35, stroke: str = "currentColor", line: float = 0.8, radius: float = 2,
    ) -> None:  # fmt: skip
        """A rectangle; `opacity` is that of its area."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}" fill="{fill}" '
            f'fill-opacity="{opacity:g}" stroke="{stroke}" stroke-width="{line:g}" stroke-opacity="0.7"/>'
        )

    def text(
        self, x: float, y: float, words: str, *, size: float = 12, anchor: str = "middle", bold: bool = False,
        colour: str = "currentColor", turn: float = 0,
    ) -> None:  # fmt: skip
        """Words whose base line is at y; `turn` in degrees."""
        extra = ' font-weight="600"' if bold else ""
        extra += f' transform="rotate({turn:g} {x:g} {y:g})"' if turn else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" fill="{colour}"{extra}>'
            f"{escape(words)}</text>"
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, *, colour: str = "currentColor", width: float = 1,
        dash: str = "", arrow: bool = False,
    ) -> None:  # fmt: skip
        """A line, with an arrow head at its end if wanted."""
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        extra += ' marker-end="url(#arrow)"' if arrow else ""
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" '
            f'stroke-width="{width:g}"{extra}/>'
        )

    def path(self, d: str, *, colour: str = "currentColor", width: float = 1, dash: str = "") -> None:
        """An open path."""
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="{width:g}"{extra}/>')

    def circle(self, x: float, y: float, r: float, fill: str) -> None:
        """A dot."""
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{r:g}" fill="{fill}" stroke="currentColor"/>')

    def save(self, name: str) -> None:
        """As a file of the course's figures."""
        FIGURES.mkdir(parents=True, exist_ok=True)
        (FIGURES / name).write_text(self.svg(), encoding="utf-8")

    def svg(self) -> str:
        """The whole document."""
        w, h = self.size
        marker = (
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0L8 4L0 8z" fill="currentColor"/></marker></defs>'
        )
        body = "\n".join(([marker] if any("#arrow" in part for part in self.parts) else []) + self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w:g} {h:g}" width="{w:g}" height="{h:g}" '
            f'font-family="system-ui, sans-serif">\n'
            f"<title>{escape(self.title)}</title>\n{body}\n</svg>\n"
        )


def save_all(
    figures: Mapping[str, Callable[[dict[str, str]], Canvas]], words: Mapping[str, tuple[str, str]]
) -> None:
    """Write each figure twice: with the English words, and with the Chinese ones as `<name>.zh.svg`."""
    for name, draw in figures.items():
        for index, ending in enumerate((".svg", ".zh.svg")):
            draw({key: both[index] for key, both in words.items()}).save(name + ending)
