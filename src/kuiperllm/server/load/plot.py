"""A picture of a load: how times are distributed, and how many tokens came when. SVG, written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from kuiperllm.server.load.run import LoadResult

_WIDTH, _HEIGHT = 300, 190
_LEFT, _BOTTOM, _TOP = 52, 40, 34
_STEPS = 60

Points = list[tuple[float, float]]


def svg(result: LoadResult) -> str:
    """The picture, as a document."""
    good = [sample for sample in result.samples if sample.error is None]
    panels = [
        (
            "time to first token, ms",
            _shares([1e3 * sample.first_token_s for sample in good]),
            "% of requests",
        ),
        (
            "time per output token, ms",
            _shares([1e3 * s.per_token_s for s in good if s.per_token_s is not None]),
            "% of requests",
        ),
        ("whole request, s", _shares([sample.total_s for sample in good]), "% of requests"),
        ("seconds since the begin", _throughput(result), "output tokens/s"),
    ]
    parts = [_panel(index, *panel) for index, panel in enumerate(panels)]
    width, height = 2 * (_LEFT + _WIDTH + 24), 2 * (_TOP + _HEIGHT + _BOTTOM) + 26
    figures = result.to_dict()
    title = (
        f"{result.model}: {figures['answered']} of {figures['requests']} requests, "
        f"{figures['output_tokens_per_s']:,.0f} output tokens/s"
    )
    heading = f'<text x="12" y="20" font-size="14" font-weight="bold">{escape(title)}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        f"{heading}{''.join(parts)}</svg>\n"
    )


def _shares(values: Sequence[float]) -> Points:
    """(value, percent of values up to it)"""
    ordered = sorted(values)
    return [(value, 100 * (index + 1) / len(ordered)) for index, value in enumerate(ordered)]


def _throughput(result: LoadResult) -> Points:
    """(seconds, tokens a second around then)"""
    times = sorted(time for sample in result.samples for time in sample.token_times_s)
    step = max(result.duration_s, 1e-9) / _STEPS
    counts = [0] * (_STEPS + 1)
    for time in times:
        counts[min(_STEPS, int(time / step))] += 1
    return [((index + 0.5) * step, count / step) for index, count in enumerate(counts[:_STEPS])]


def _panel(index: int, across: str, points: Points, up: str) -> str:
    x0 = _LEFT + (index % 2) * (_LEFT + _WIDTH + 12)
    y0 = 26 + _TOP + (index // 2) * (_TOP + _HEIGHT + _BOTTOM)
    right = max((x for x, _ in points), default=1) or 1
    top = max((y for _, y in points), default=1) or 1
    line = " ".join(f"{x0 + _WIDTH * x / right:.1f},{y0 + _HEIGHT * (1 - y / top):.1f}" for x, y in points)
    parts = [f'<text x="{x0}" y="{y0 - 8}" fill="#555">{escape(up)}</text>']
    parts.append(f'<text x="{x0 + _WIDTH}" y="{y0 + _HEIGHT + 32}" text-anchor="end">{escape(across)}</text>')
    for part in (0, 0.25, 0.5, 0.75, 1):
        x, y = x0 + _WIDTH * part, y0 + _HEIGHT * (1 - part)
        parts.append(f'<path d="M{x0} {y}h{_WIDTH}M{x} {y0}v{_HEIGHT}" stroke="#e3e3e3"/>')
        parts.append(
            f'<text x="{x0 - 6}" y="{y + 4}" text-anchor="end" fill="#555">{_short(top * part)}</text>'
        )
        parts.append(
            f'<text x="{x}" y="{y0 + _HEIGHT + 16}" text-anchor="middle" fill="#555">'
            f"{_short(right * part)}</text>"
        )
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1d4ed8" stroke-width="2"/>')
    return "".join(parts)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.3g}"
