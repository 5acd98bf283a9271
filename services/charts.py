"""Line and stacked charts as inline SVG: pure functions from numbers to text, no plotting library.

A report is one HTML file that must open anywhere, years later; an SVG of a few kilobytes does that, stays sharp
when printed, and shows its values when pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
"""(step, value) pairs in step order."""

PALETTE = ("#3b6fd4", "#d9772b", "#2a9d6f", "#b5476f", "#7a5cc2", "#8a8f3c", "#4aa3b8", "#8d6e63")
_WIDTH, _HEIGHT = 560, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 24
_EQUAL = 1e-9
"""Values that differ by less than this share of their size are drawn as equal."""
_TINY = 1e-10
"""Smaller values are drawn as zero."""
_MAX_POINTS = 400
_MAX_MARKED = 40
_MAX_TOLD = 100
"""Points of a long curve that tell their value when pointed at."""
_NO_BANDS: Mapping[str, Points] = {}


def line_chart(series: Mapping[str, Points], floor_zero: bool = False, bands: Mapping[str, Points] = _NO_BANDS) -> str:
    """Curves over steps, with a legend. `floor_zero` starts the value axis at 0.

    `bands` are half-widths of intervals by the name of their curve, shaded where a step has both.
    """
    shaded = {name: _band(points, bands[name]) for name, points in series.items() if name in bands}
    series = {name: _thin(_finite(points)) for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    edges = [y for name, pair in shaded.items() if name in series for edge in pair for _, y in edge]
    low, high = min(*ys, *edges, math.inf), max(*ys, *edges, -math.inf)
    frame = _Frame(min(xs), max(xs), min(0.0, low) if floor_zero else low, high)
    body = [frame.axes()]
    for index, name in enumerate(series):
        lower, upper = shaded.get(name, ((), ()))
        if len(lower) > 1:
            outline = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in (*upper, *reversed(lower)))
            body.append(f'<polygon points="{outline}" fill="{PALETTE[index % len(PALETTE)]}" fill-opacity="0.15"/>')
    for index, (name, points) in enumerate(series.items()):
        colour = PALETTE[index % len(PALETTE)]
        path = " ".join(f"{'M' if i == 0 else 'L'}{frame.x(x):.1f} {frame.y(y):.1f}" for i, (x, y) in enumerate(points))
        body.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>')
        radius = 3 if len(points) <= _MAX_MARKED else 6
        shown = colour if len(points) <= _MAX_MARKED else "transparent"
        told = points[:: max(1, len(points) // _MAX_TOLD)]
        body.extend(
            f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{radius}" fill="{shown}">'
            f"<title>{escape(name)}, step {x:g}: {y:.4g}</title></circle>"
            for x, y in (told if told[-1] == points[-1] else (*told, points[-1]))
        )
    return _svg(body) + _legend(list(series))


def stacked_chart(series: Mapping[str, Points]) -> str:
    """Shares of a whole over steps, such as seconds per phase: areas on top of each other."""
    series = {name: _thin(_finite(points)) for name, points in series.items()}
    series = {name: points for name, points in series.items() if any(y > 0 for _, y in points)}
    steps = sorted({x for points in series.values() for x, _ in points})
    if len(steps) < 2:
        return ""
    values = {name: dict(points) for name, points in series.items()}
    totals = [sum(by_step.get(step, 0.0) for by_step in values.values()) for step in steps]
    frame = _Frame(steps[0], steps[-1], 0.0, max(totals))
    body = [frame.axes()]
    base = [0.0] * len(steps)
    for index, (name, by_step) in enumerate(values.items()):
        top = [low + max(0.0, by_step.get(step, 0.0)) for low, step in zip(base, steps, strict=True)]
        corners = [(step, high) for step, high in zip(steps, top, strict=True)]
        corners += [(step, low) for step, low in zip(reversed(steps), reversed(base), strict=True)]
        outline = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in corners)
        mean = sum(by_step.values()) / len(steps)
        body.append(
            f'<polygon points="{outline}" fill="{PALETTE[index % len(PALETTE)]}" fill-opacity="0.85">'
            f"<title>{escape(name)}: {mean:.3g} s per step on average</title></polygon>"
        )
        base = top
    return _svg(body) + _legend([f"{name} {sum(v.values()) / len(steps):.2g} s" for name, v in values.items()])


class _Frame:
    """From data to pixels, with room for the axes."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float) -> None:
        if x_high == x_low:
            x_low, x_high = x_low - 0.5, x_high + 0.5
        size = max(abs(y_low), abs(y_high))
        if size < _TINY:
            y_low, y_high = 0.0, 0.5
        elif y_high - y_low <= _EQUAL * size:
            y_low, y_high = y_low - size * 0.1, y_high + size * 0.1
        self.x_ticks = [tick for tick in ticks(x_low, x_high, 6) if x_low <= tick <= x_high and tick == int(tick)]
        self.y_ticks = ticks(y_low, y_high, 4)
        self._x_low, self._x_span = x_low, x_high - x_low
        self._y_low, self._y_span = self.y_ticks[0], self.y_ticks[-1] - self.y_ticks[0]

    def x(self, value: float) -> float:
        return _LEFT + (value - self._x_low) / self._x_span * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self._y_low) / self._y_span * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self) -> str:
        """Grid lines with their values."""
        lines: list[str] = []
        for tick in self.y_ticks:
            y = self.y(tick)
            lines.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
            lines.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_label(tick)}</text>')
        lines.extend(
            f'<text x="{self.x(tick):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{tick:g}</text>'
            for tick in self.x_ticks
        )
        return "".join(lines)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values that cover [low, high], about `count` steps of them."""
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _label(value: float) -> str:
    return "0" if value == 0 else f"{value:.3g}"


def _band(points: Points, widths: Points) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """The lower and the upper edge of a curve's band, at the steps that have both."""
    width_at = dict(_finite(widths))
    both = [(x, y, width_at[x]) for x, y in _finite(points) if x in width_at]
    return _thin([(x, y - width) for x, y, width in both]), _thin([(x, y + width) for x, y, width in both])


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most a few hundred points, each the mean of its neighbours; the first and last stay as they are."""
    if len(points) <= _MAX_POINTS:
        return points
    size = math.ceil(len(points) / _MAX_POINTS)
    inner = points[1:-1]
    chunks = [inner[start : start + size] for start in range(0, len(inner), size)]
    means = [(chunk[len(chunk) // 2][0], sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]
    return [points[0], *means, points[-1]]


def _svg(body: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(body)}</svg>'


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<span><i style="background:{PALETTE[index % len(PALETTE)]}"></i>{escape(name)}</span>'
        for index, name in enumerate(names)
    )
    return f'<div class="legend">{items}</div>'
