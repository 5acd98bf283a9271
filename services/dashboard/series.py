"""Curves for the page: thousands of steps as hundreds of points, with a band that says how sure they are. Pure.

A point stands for one step, or for a bucket of neighbouring ones: their mean. Its band is the 95 % interval of that
mean where the run recorded one for each step (`ci95/...`; widths of independent means add in squares), and else the
least and the greatest of the bucket.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from services.confidence import INTERVAL
from services.dashboard.columns import Columns

Band = Literal["ci95", "range", ""]
_DIGITS = 7


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of one metric; `low` and `high` bound the band, and are empty where there is none."""

    x: list[float]
    y: list[float]
    low: list[float | None]
    high: list[float | None]
    band: Band

    def json(self) -> dict[str, Any]:
        return {"x": self.x, "y": self.y, "low": self.low, "high": self.high, "band": self.band}


def curve(columns: Columns, name: str, most: int) -> Curve:
    """A metric in at most so many points."""
    steps, values = np.array(columns.steps, dtype=np.float64), columns.column(name)
    has = ~np.isnan(values)
    steps, values = steps[has], values[has]
    widths = columns.column(INTERVAL + name)[has]
    if not len(values):
        return Curve([], [], [], [], "")
    if len(values) <= most:
        if np.isnan(widths).all():
            return Curve(_rounded(steps), _rounded(values), [], [], "")
        return _with_widths(steps, values, widths)
    edges = np.linspace(0, len(values), most + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(values)))
    x, y = np.add.reduceat(steps, edges) / counts, np.add.reduceat(values, edges) / counts
    if np.isnan(widths).any():
        low, high = np.minimum.reduceat(values, edges), np.maximum.reduceat(values, edges)
        return Curve(_rounded(x), _rounded(y), _listed(low), _listed(high), "range")
    return _with_widths(x, y, np.sqrt(np.add.reduceat(widths**2, edges)) / counts)


def _with_widths(x: np.ndarray, y: np.ndarray, widths: np.ndarray) -> Curve:
    return Curve(_rounded(x), _rounded(y), _listed(y - widths), _listed(y + widths), "ci95")


def _rounded(values: np.ndarray) -> list[float]:
    """Enough digits to draw with: a third of the bytes."""
    return [float(f"{value:.{_DIGITS}g}") for value in values.tolist()]


def _listed(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else float(f"{value:.{_DIGITS}g}") for value in values.tolist()]
