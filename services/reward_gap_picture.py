"""The reward gap as a picture: panels of lines whose dots carry confidence intervals. PIL only.

The panels of a run: the gap over learner steps, one line per stochasticity, and the reward over stochasticity before
training and after. An evaluation of one set of weights has stochasticity on both axes, and RLG's weight on a third.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from services.charts import PALETTE, ticks
from services.pictures import FAINT, FRAME, INK, Colour, fit, typeface
from services.reward_gap import GapPoint, Interval
from services.sheet import GREY, Sheet, rgb

PANEL_WIDTH, HEIGHT = 640, 600
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 36, 132, 148
_APART = 7
"""Pixels between the dots of two lines at one place, so that their intervals do not hide each other."""
_MAX_X_TICKS = 9
_LEGEND_ROWS = 3
_WHISKERS = "bars: 95 % confidence"


@dataclass(frozen=True, slots=True)
class Line:
    """Means over x, with their intervals. `base`, drawn in grey, is what there was before training."""

    name: str
    points: Sequence[tuple[float, Interval]]
    base: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes. `zero` draws the line of no difference and keeps it in sight."""

    title: str
    x_label: str
    lines: Sequence[Line]
    zero: bool = False


def draw_panels(title: str, panels: Sequence[Panel], note: str = _WHISKERS) -> np.ndarray:
    """Panels side by side as an RGB uint8 array, (HEIGHT, PANEL_WIDTH x panels, 3).

    Panels without points are left out; raises ValueError if no other is left.
    """
    drawn = [panel for panel in panels if any(line.points for line in panel.lines)]
    if not drawn:
        raise ValueError("draw_panels needs at least one point, got none")
    sheet = Sheet.blank(PANEL_WIDTH * len(drawn), HEIGHT)
    sheet.text(_LEFT - 58, 38, fit(title, typeface(26), PANEL_WIDTH * len(drawn) - 60), INK, 26)
    sheet.text(_LEFT - 58, 70, note, FAINT, 15)
    for place, panel in enumerate(drawn):
        _draw_panel(sheet, _Axes(panel, place * PANEL_WIDTH), panel)
    return sheet.reduced()


def run_panels(points: Sequence[GapPoint]) -> list[Panel]:
    """A run's gaps over its steps, and its rewards over stochasticity before training and at the newest step."""
    kinds = dict.fromkeys((point.eta, point.num_steps) for point in sorted(points, key=lambda one: one.eta))
    several = len({num_steps for _, num_steps in kinds}) > 1
    over_steps = [
        Line(
            _kind(f"eta {eta:g}", num_steps, several),
            [(point.step, point.gap) for point in points if (point.eta, point.num_steps) == (eta, num_steps)],
        )
        for eta, num_steps in kinds
    ]
    first, last = min(point.step for point in points), max(point.step for point in points)
    over_eta = [
        Line(
            _kind(f"after step {step}" if step else "before training", num_steps, several),
            rewards_over_eta(points, step, num_steps),
            base=step == 0,
        )
        for step in dict.fromkeys((first, last))
        for num_steps in dict.fromkeys(num_steps for _, num_steps in kinds)
    ]
    return [
        Panel("noisy minus noiseless reward", "learner step", over_steps, zero=True),
        Panel("held-out reward", "stochasticity eta (0: the ODE)", over_eta),
    ]


def evaluation_panels(
    points: Sequence[GapPoint], over_rlg: Mapping[int, Sequence[tuple[float, Interval]]]
) -> list[Panel]:
    """One set of weights: reward and gap over stochasticity, and reward over RLG's weight, by number of steps."""
    all_steps = dict.fromkeys([*(point.num_steps for point in points), *over_rlg])
    names = {num_steps: f"{num_steps} steps" for num_steps in all_steps}
    rewards = [Line(name, rewards_over_eta(points, None, steps)) for steps, name in names.items()]
    gaps = [
        Line(name, [(point.eta, point.gap) for point in points if point.num_steps == steps])
        for steps, name in names.items()
    ]
    return [
        Panel("held-out reward", "stochasticity eta (0: the ODE)", rewards),
        Panel("noisy minus noiseless reward", "stochasticity eta", gaps, zero=True),
        Panel(
            "held-out reward, ODE",
            "RLG weight (0: base, 1: tuned)",
            [Line(names[n], over_rlg.get(n, ())) for n in names],
        ),
    ]


def rewards_over_eta(points: Sequence[GapPoint], step: int | None, num_steps: int) -> list[tuple[float, Interval]]:
    """The noiseless reward at 0 and the noisy ones, of one learner step (of all, for None) and number of steps."""
    mine = [point for point in points if step in (None, point.step) and point.num_steps == num_steps]
    rewards = {0.0: mine[0].ode} if mine else {}
    return sorted((rewards | {point.eta: point.reward for point in mine}).items())


class _Axes:
    """From values to pixels of one panel, whose left edge is at `left`."""

    def __init__(self, panel: Panel, left: float) -> None:
        points = [point for line in panel.lines for point in line.points]
        xs = sorted({x for x, _ in points})
        self.left, self.right = left + _LEFT, left + PANEL_WIDTH - _RIGHT
        pad = (xs[-1] - xs[0]) * 0.06 or 0.5
        self._x_low, self._x_high = xs[0] - pad, xs[-1] + pad
        self.x_ticks = xs if len(xs) <= _MAX_X_TICKS else [t for t in ticks(xs[0], xs[-1], 6) if xs[0] <= t <= xs[-1]]
        low, high = min(one.low for _, one in points), max(one.high for _, one in points)
        if panel.zero:
            low, high = min(low, 0.0), max(high, 0.0)
        spread = high - low or 0.1
        self.y_ticks = ticks(low - spread * 0.03, high + spread * 0.03, 5)

    def x(self, value: float) -> float:
        return self.left + (value - self._x_low) / (self._x_high - self._x_low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _BOTTOM - _TOP)


def _draw_panel(sheet: Sheet, axes: _Axes, panel: Panel) -> None:
    _draw_axes(sheet, axes, panel)
    lines = [line for line in panel.lines if line.points]
    palette = itertools.cycle(PALETTE)
    colours = [GREY if line.base else rgb(next(palette)) for line in lines]
    middle = (len(lines) - 1) / 2
    for place, (line, colour) in enumerate(zip(lines, colours, strict=True)):
        _draw_line(sheet, axes, line, colour, (place - middle) * _APART)
    columns = max(2, math.ceil(len(lines) / _LEGEND_ROWS))
    width = (axes.right - axes.left) / columns
    for place, (line, colour) in enumerate(zip(lines, colours, strict=True)):
        x = axes.left + place % columns * width
        y = HEIGHT - 66 + place // columns * 24
        sheet.line([(x, y), (x + 26, y)], colour, 3)
        sheet.dot(x + 13, y, 5, colour)
        sheet.text(x + 36, y, fit(line.name, typeface(16), width - 42), INK, 16)


def _draw_axes(sheet: Sheet, axes: _Axes, panel: Panel) -> None:
    floor = HEIGHT - _BOTTOM
    sheet.text(axes.left, _TOP - 26, panel.title, INK, 18)
    for tick in axes.y_ticks:
        y = axes.y(tick)
        sheet.line([(axes.left, y), (axes.right, y)], FRAME, 1)
        shown = f"{tick:+.3g}" if panel.zero and tick else f"{tick:.3g}"
        sheet.text(axes.left - 10, y, shown, FAINT, 15, "rm")
    for tick in axes.x_ticks:
        x = axes.x(tick)
        sheet.line([(x, floor), (x, floor + 6)], FAINT, 1)
        sheet.text(x, floor + 19, f"{tick:g}", FAINT, 15, "mm")
    if panel.zero:
        sheet.line([(axes.left, axes.y(0.0)), (axes.right, axes.y(0.0))], FAINT, 1.5)
    sheet.text((axes.left + axes.right) / 2, floor + 46, panel.x_label, FAINT, 16, "mm")


def _draw_line(sheet: Sheet, axes: _Axes, line: Line, colour: Colour, aside: float) -> None:
    places = [(axes.x(x) + aside, one) for x, one in sorted(line.points, key=lambda point: point[0])]
    if len(places) > 1:
        sheet.line([(x, axes.y(one.mean)) for x, one in places], colour, 2.5)
    for x, one in places:
        if one.half_width:
            low, high = axes.y(one.low), axes.y(one.high)
            sheet.line([(x, low), (x, high)], colour, 1.5)
            for y in (low, high):
                sheet.line([(x - 4, y), (x + 4, y)], colour, 1.5)
        sheet.dot(x, axes.y(one.mean), 5, colour)


def _kind(name: str, num_steps: int, several: bool) -> str:
    return f"{name}, {num_steps} steps" if several else name
