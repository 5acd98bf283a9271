"""The accuracy-calls frontier of a text model: what it solves against how often its network is called. Pure.

A point is one way of drawing the held-out prompts: its accuracy, and the mean number of function evaluations (NFE) of
an answer. Sweeping the entropy budget gamma of one set of weights gives a curve, and the run's own way of drawing a
point beside it, its operating point. Accuracy is the share of exactly solved prompts where a reward tells it (a detail
`exact`), else the mean reward; samples whose reward failed are in no mean.

Between two points the frontier is a straight line: drawing a share of the prompts with one budget and the rest with
the other attains exactly that accuracy at exactly that mean of calls. Left of the first point nothing is attained;
right of the last, its accuracy is, with calls to spare.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from raylign.errors import RunDirError
from raylign.types import Rollout, RolloutGroup

Quality = Literal["exact", "reward"]

MAX_LEVELS = 12
"""With more, hardly a prompt would be left for each, so none are told apart."""
_LOG_OF_ZERO = -80.0
LEVEL_KEYS = ("difficulty", "level", "length", "num_digits", "numbers")
"""Where a prompt's metadata may say how hard it is; the first that is there counts."""


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One way of drawing the held-out prompts. See the module."""

    gamma: float | None
    """Entropy budget; of an operating point the mean of the budgets, None for samplers without one."""
    accuracy: float
    error: float | None
    """Standard error of the accuracy, over prompts; None for a single prompt."""
    nfe: float
    samples: int
    levels: Mapping[str, FrontierPoint] = field(default_factory=dict[str, "FrontierPoint"])
    """The same by difficulty of the prompts, where they tell it."""


@dataclass(frozen=True, slots=True)
class FrontierSeries:
    """One set of weights, swept over budgets, and its operating point."""

    step: int
    points: tuple[FrontierPoint, ...]
    own: FrontierPoint | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its standard error, None where it is unknown."""

    value: float
    error: float | None


def quality_of(groups: Iterable[RolloutGroup]) -> Quality:
    """What accuracy means for these groups."""
    rollouts = (rollout for group in groups for rollout in group.rollouts)
    return "exact" if any(exact_of(rollout) is not None for rollout in rollouts) else "reward"


def exact_of(rollout: Rollout) -> bool | None:
    """Whether the prompt was solved exactly, as its rewards tell; None if none does."""
    scores = rollout.reward.scores if rollout.reward is not None else ()
    found = [score.details["exact"] for score in scores if score.value is not None and "exact" in score.details]
    return bool(found[0]) if found else None


def budget_of(log_gamma: float) -> float:
    """The budget of a recorded logarithm; that of budget 0 is the least normal number's."""
    return 0.0 if log_gamma < _LOG_OF_ZERO else math.exp(log_gamma)


def measure(groups: Sequence[RolloutGroup], quality: Quality, gamma: float | None = None) -> FrontierPoint | None:
    """The point of groups of texts; None if no sample has a reward. `gamma` defaults to the mean of their budgets."""
    point = _measure(groups, quality, gamma)
    if point is None:
        return None
    by_level: dict[str, list[RolloutGroup]] = {}
    for group in groups:
        by_level.setdefault(level_of(group.prompt.metadata), []).append(group)
    by_level.pop("", None)
    if len(by_level) > MAX_LEVELS:
        by_level = {}
    levels = {level: _measure(some, quality, gamma) for level, some in sorted(by_level.items(), key=_level_order)}
    return FrontierPoint(
        point.gamma,
        point.accuracy,
        point.error,
        point.nfe,
        point.samples,
        {level: one for level, one in levels.items() if one is not None},
    )


def level_of(metadata: Mapping[str, Any]) -> str:
    """How hard a prompt is, such as "length 5" or, of a list, how many it names; "" if it does not tell."""
    for key in LEVEL_KEYS:
        value = metadata.get(key)
        if isinstance(value, list | tuple):
            value = len(cast("Sequence[Any]", value))
        if isinstance(value, str | int | float):
            named = str(value).lower().startswith(key)
            return str(value) if named else f"{key.replace('_', ' ')} {value}"
    return ""


def pareto(points: Iterable[FrontierPoint]) -> list[FrontierPoint]:
    """The points that no other beats with as few calls, by rising calls (and so by rising accuracy)."""
    best: list[FrontierPoint] = []
    for point in sorted(points, key=lambda one: (one.nfe, -one.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def accuracy_at(points: Iterable[FrontierPoint], nfe: float) -> Estimate | None:
    """The accuracy attained with `nfe` calls on average; None where the frontier does not reach so few."""
    front = pareto(points)
    if not front or nfe < front[0].nfe:
        return None
    for low, high in itertools.pairwise(front):
        if nfe <= high.nfe:
            share = (nfe - low.nfe) / (high.nfe - low.nfe)
            errors = None if low.error is None or high.error is None else (1 - share, low.error, share, high.error)
            # Two budgets on shares of the prompts: independent prompts, so the errors add up as squares do.
            error = None if errors is None else math.hypot(errors[0] * errors[1], errors[2] * errors[3])
            return Estimate((1 - share) * low.accuracy + share * high.accuracy, error)
    return Estimate(front[-1].accuracy, front[-1].error)


def mean_point(points: Sequence[FrontierPoint]) -> FrontierPoint:
    """The mean of points of several seeds; its error is that of the mean of independent ones."""
    errors = [point.error for point in points if point.error is not None]
    gammas = [point.gamma for point in points if point.gamma is not None]
    levels = {level for point in points for level in point.levels}
    return FrontierPoint(
        statistics.fmean(gammas) if len(gammas) == len(points) else None,
        statistics.fmean(point.accuracy for point in points),
        math.hypot(*errors) / len(errors) if len(errors) == len(points) else None,
        statistics.fmean(point.nfe for point in points),
        sum(point.samples for point in points),
        {
            level: mean_point([point.levels[level] for point in points if level in point.levels])
            for level in sorted(levels, key=lambda level: _level_order((level, ())))
        },
    )


def mean_points(series: Sequence[Sequence[FrontierPoint]]) -> list[FrontierPoint]:
    """Curves of several seeds as one: the mean at each budget that all of them were swept at."""
    by_gamma: dict[float | None, list[FrontierPoint]] = {}
    for point in (point for points in series for point in points):
        by_gamma.setdefault(point.gamma, []).append(point)
    return [mean_point(some) for some in by_gamma.values() if len(some) == len(series)]


def frontier_json(quality: Quality, series: Mapping[str, FrontierSeries]) -> bytes:
    """The contents of `frontier.json`."""
    data = {"quality": quality, "series": {name: series_data(one) for name, one in series.items()}}
    return json.dumps(data, indent=2, allow_nan=False).encode() + b"\n"


def series_data(series: FrontierSeries) -> dict[str, Any]:
    """A series as JSON can hold it."""
    points = [_point_data(point) for point in series.points]
    return {"step": series.step, "points": points, "own": None if series.own is None else _point_data(series.own)}


def read_frontier(path: Path) -> tuple[Quality, dict[str, FrontierSeries]]:
    """What `frontier_json` wrote; no series if there is no file. Raises RunDirError for a file of another kind."""
    try:
        data = json.loads(path.read_bytes())
        series = {
            name: FrontierSeries(
                one["step"],
                tuple(_point(point) for point in one["points"]),
                None if one["own"] is None else _point(one["own"]),
            )
            for name, one in data["series"].items()
        }
        return "exact" if data["quality"] == "exact" else "reward", series
    except FileNotFoundError:
        return "exact", {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDirError(f"{path} is no frontier ({type(error).__name__}: {error}); delete it to go on") from None


def _measure(groups: Sequence[RolloutGroup], quality: Quality, gamma: float | None) -> FrontierPoint | None:
    means: list[float] = []
    calls: list[float] = []
    budgets: list[float] = []
    samples = 0
    for group in groups:
        tokens = group.tokens
        values = [_accuracy(rollout, quality) for rollout in group.rollouts]
        scored = [(place, value) for place, value in enumerate(values) if value is not None]
        if not scored:
            continue
        samples += len(scored)
        means.append(statistics.fmean(value for _, value in scored))
        calls.append(statistics.fmean(float(tokens.nfe_G[place]) for place, _ in scored))
        if tokens.log_gamma_G is not None:
            budgets.append(statistics.fmean(budget_of(float(tokens.log_gamma_G[place])) for place, _ in scored))
    if not means:
        return None
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    if gamma is None and len(budgets) == len(means):
        gamma = statistics.fmean(budgets)
    return FrontierPoint(gamma, statistics.fmean(means), error, statistics.fmean(calls), samples)


def _accuracy(rollout: Rollout, quality: Quality) -> float | None:
    if quality == "reward" or rollout.total is None:
        return rollout.total
    exact = exact_of(rollout)
    return None if exact is None else float(exact)


def _level_order(item: tuple[str, object]) -> tuple[str, float, str]:
    """Levels by number where they end in one ("length 5" before "length 12")."""
    name, _, last = item[0].rpartition(" ")
    try:
        return name, float(last), ""
    except ValueError:
        return name, math.inf, last


def _point_data(point: FrontierPoint) -> dict[str, Any]:
    """A point as JSON can hold it, which knows no infinite budget."""
    levels = {level: _point_data(one) for level, one in point.levels.items()}
    return asdict(point) | {"gamma": "inf" if point.gamma == math.inf else point.gamma, "levels": levels}


def _point(data: Mapping[str, Any]) -> FrontierPoint:
    gamma = math.inf if data["gamma"] == "inf" else data["gamma"]
    levels = {level: _point(one) for level, one in data["levels"].items()}
    return FrontierPoint(gamma, data["accuracy"], data["error"], data["nfe"], data["samples"], levels)
