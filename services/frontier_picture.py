"""The frontier as a picture: accuracy over calls, one curve per set of weights, operating points as stars."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from services.charts import PALETTE, ticks
from services.frontier import FrontierPoint, Quality
from services.pictures import FAINT, FRAME, INK, PAPER, Colour, fit, typeface
from services.sheet import GREY, Sheet, rgb

WIDTH, HEIGHT = 1240, 720
_LEFT, _RIGHT, _TOP, _BOTTOM = 96, 344, 104, 84
_LOG_FROM = 4.0
"""Calls are on a logarithmic axis where the most are this many times the fewest."""
_LOG_TICKS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_FEW = 3
"""With more curves than this, a label that would cross a line is left out: another curve has one there."""
_PIECE = 6
"""Pixels of a line that a label avoids at a time."""
_SPOTS = ((0, -18), (0, 18), (1, -11), (-1, -11), (1, 11), (-1, 11), (1, 0), (-1, 0), (0, -24), (0, 24))
"""Where a label may lie about its point: widths across, pixels down."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Curve:
    """A swept set of weights. `seeds` are drawn faintly behind the curve, of which it is the mean."""

    name: str
    points: Sequence[FrontierPoint]
    own: FrontierPoint | None = None
    seeds: Sequence[Sequence[FrontierPoint]] = ()
    base: bool = False
    """The model before training, in grey."""


@dataclass(slots=True)
class _Sheet(Sheet):
    """A sheet that knows where labels must not lie, or rather not."""

    taken: list[Box] = field(default_factory=list[Box])
    crossed: list[Box] = field(default_factory=list[Box])


class Axes:
    """From calls and accuracy to pixels; `log` where calls range widely."""

    def __init__(self, points: Sequence[FrontierPoint]) -> None:
        calls = [max(point.nfe, 1e-3) for point in points]
        fewest, most = min(calls), max(calls)
        self.log = most / fewest >= _LOG_FROM
        if self.log:
            self._x_low, self._x_high = math.log(fewest) - 0.12, math.log(most) + 0.12
            self.x_ticks = [tick for tick in _LOG_TICKS if self._x_low <= math.log(tick) <= self._x_high]
        else:
            pad = max((most - fewest) * 0.08, 0.1)
            self._x_low, self._x_high = fewest - pad, most + pad
            self.x_ticks = [tick for tick in ticks(fewest - pad, most + pad, 7) if self._x_low <= tick <= self._x_high]
        accuracies = [point.accuracy for point in points]
        self.y_ticks = ticks(min(0.0, *accuracies), max(0.1, *accuracies), 5)

    def x(self, nfe: float) -> float:
        value = math.log(max(nfe, 1e-3)) if self.log else nfe
        return _LEFT + (value - self._x_low) / (self._x_high - self._x_low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, accuracy: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - _BOTTOM - (accuracy - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    def place(self, point: FrontierPoint) -> tuple[float, float]:
        return self.x(point.nfe), self.y(point.accuracy)


def draw_frontier(
    curves: Sequence[Curve], quality: Quality, title: str = "Accuracy against calls of the network"
) -> np.ndarray:
    """The picture as an RGB uint8 array, (HEIGHT, WIDTH, 3). Raises ValueError if there is no point at all."""
    everything = [point for curve in curves for point in _all_points(curve)]
    if not everything:
        raise ValueError("draw_frontier needs at least one point, got none")
    sheet, axes = _Sheet.blank(WIDTH, HEIGHT), Axes(everything)
    _draw_axes(sheet, axes, quality, title)
    colours = _colours(curves)
    for curve, colour in zip(curves, colours, strict=True):
        for seed in curve.seeds:
            _draw_line(sheet, axes, seed, _pale(colour), 1.5)
    for curve, colour in zip(curves, colours, strict=True):
        _draw_line(sheet, axes, curve.points, colour, 3)
        for point in curve.points:
            sheet.dot(*axes.place(point), 6, colour)
            sheet.taken.append(_around(*axes.place(point), 7))
    for curve, colour in zip(curves, colours, strict=True):
        if curve.own is not None:
            _draw_own(sheet, axes, curve.own, colour)
    for curve, colour in zip(curves, colours, strict=True):
        _label_budgets(sheet, axes, curve.points, colour, strict=len(curves) > _FEW)
    _draw_legend(sheet, curves, colours, quality)
    return sheet.reduced()


def _draw_axes(sheet: _Sheet, axes: Axes, quality: Quality, title: str) -> None:
    right, floor = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    sheet.text(_LEFT - 58, 38, title, INK, 26)
    what = "share of held-out prompts solved exactly" if quality == "exact" else "mean held-out reward"
    sheet.text(_LEFT - 58, 72, what, FAINT, 17)
    for tick in axes.y_ticks:
        y = axes.y(tick)
        sheet.line([(_LEFT, y), (right, y)], FRAME, 1)
        sheet.text(_LEFT - 12, y, f"{tick:.3g}", FAINT, 16, "rm")
    for tick in axes.x_ticks:
        x = axes.x(tick)
        sheet.line([(x, floor), (x, floor + 6)], FAINT, 1)
        sheet.text(x, floor + 20, f"{tick:g}", FAINT, 16, "mm")
    sheet.line([(_LEFT, floor), (right, floor)], FAINT, 1.5)
    scale = ", logarithmic" if axes.log else ""
    sheet.text((_LEFT + right) / 2, floor + 52, f"mean calls of the network per answer (NFE{scale})", FAINT, 17, "mm")
    _draw_better(sheet, right)


def _draw_better(sheet: _Sheet, right: float) -> None:
    """An arrow towards many solved prompts and few calls, above the plot, where no dot can lie."""
    x, y = right - 86, 62
    sheet.line([(x + 24, y + 24), (x + 3, y + 3)], FAINT, 2)
    sheet.polygon([(x, y), (x + 11, y + 3), (x + 3, y + 11)], FAINT)
    sheet.text(x + 32, y + 4, "better", FAINT, 15)


def _draw_line(sheet: _Sheet, axes: Axes, points: Sequence[FrontierPoint], colour: Colour, width: float) -> None:
    places = [axes.place(point) for point in sorted(points, key=lambda one: one.nfe)]
    if len(places) > 1:
        sheet.line(places, colour, width)
    for (x, y), (next_x, next_y) in itertools.pairwise(places):
        pieces = max(1, round(math.dist((x, y), (next_x, next_y)) / _PIECE))
        shares = [piece / pieces for piece in range(pieces + 1)]
        sheet.crossed += [_around(x + (next_x - x) * share, y + (next_y - y) * share, width) for share in shares]


def _draw_own(sheet: _Sheet, axes: Axes, own: FrontierPoint, colour: Colour) -> None:
    x, y = axes.place(own)
    if own.error:
        low, high = axes.y(own.accuracy - own.error), axes.y(own.accuracy + own.error)
        sheet.line([(x, low), (x, high)], colour, 2)
        sheet.crossed.append((x - 2, high, x + 2, low))
    sheet.polygon(_star(x, y, 17), PAPER)
    sheet.polygon(_star(x, y, 14), colour)
    sheet.taken.append(_around(x, y, 12))


def _label_budgets(sheet: _Sheet, axes: Axes, points: Sequence[FrontierPoint], colour: Colour, *, strict: bool) -> None:
    """The budget beside each point: off the lines if there is room, over one if not (or `strict`ly never)."""
    for point in points:
        if point.gamma is None:
            continue
        text = f"{point.gamma:g}"
        free = [box for box in _label_boxes(axes.place(point), text) if not _hits(box, sheet.taken)]
        box = next((box for box in free if not _hits(box, sheet.crossed)), free[0] if free and not strict else None)
        if box is not None:
            sheet.text((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, text, colour, 14, "mm")
            sheet.taken.append(box)


def _label_boxes(place: tuple[float, float], text: str) -> list[Box]:
    """Where a label may lie about its point, the best first; above the axis."""
    half_width, half_height = typeface(14).getlength(text) / 2 + 2, 8
    middles = [(place[0] + across * (half_width + 10), place[1] + down) for across, down in _SPOTS]
    boxes = [(x - half_width, y - half_height, x + half_width, y + half_height) for x, y in middles]
    return [box for box in boxes if box[3] < HEIGHT - _BOTTOM]


def _draw_legend(sheet: _Sheet, curves: Sequence[Curve], colours: Sequence[Colour], quality: Quality) -> None:
    """Names with their operating points, at the right."""
    x, y = WIDTH - _RIGHT + 32, _TOP + 12
    word = "solved" if quality == "exact" else "reward"
    for curve, colour in zip(curves, colours, strict=True):
        if curve.points:
            sheet.line([(x, y), (x + 28, y)], colour, 3)
        sheet.dot(x + 14, y, 6, colour)
        sheet.text(x + 40, y, fit(curve.name, typeface(18), _RIGHT - 90), INK, 18)
        if curve.own is not None:
            sheet.polygon(_star(x + 48, y + 27, 9), colour)
            sheet.text(x + 64, y + 27, f"{curve.own.accuracy:.2f} {word} at {curve.own.nfe:.2f} calls", FAINT, 16)
        y += 66 if curve.own is not None else 38
    y += 8
    sheet.polygon(_star(x + 8, y, 9), FAINT)
    sheet.text(x + 26, y, "as the run itself draws answers", FAINT, 15)
    sheet.dot(x + 8, y + 26, 5, FAINT)
    sheet.text(x + 26, y + 26, "swept over the entropy budget,", FAINT, 15)
    sheet.text(x + 26, y + 46, "which is written beside the dot", FAINT, 15)


def _all_points(curve: Curve) -> list[FrontierPoint]:
    own = [] if curve.own is None else [curve.own]
    return [*curve.points, *own, *itertools.chain.from_iterable(curve.seeds)]


def _colours(curves: Sequence[Curve]) -> list[Colour]:
    """Grey for the base, the palette in order for the others."""
    palette = itertools.cycle(PALETTE)
    return [GREY if curve.base else rgb(next(palette)) for curve in curves]


def _pale(colour: Colour) -> Colour:
    red, green, blue = (round(part + (255 - part) * 0.62) for part in colour)
    return red, green, blue


def _star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Ten corners, the first on top."""
    return [
        (
            x + math.sin(math.pi * corner / 5) * radius * (1 if corner % 2 == 0 else 0.45),
            y - math.cos(math.pi * corner / 5) * radius * (1 if corner % 2 == 0 else 0.45),
        )
        for corner in range(10)
    ]


def _around(x: float, y: float, radius: float) -> Box:
    return x - radius, y - radius, x + radius, y + radius


def _hits(box: Box, others: Sequence[Box]) -> bool:
    """Whether a box overlaps any of others."""
    return any(box[0] < one[2] and one[0] < box[2] and box[1] < one[3] and one[1] < box[3] for one in others)
