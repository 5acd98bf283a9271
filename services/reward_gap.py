"""The reward gap: what a policy's noisy samples earn more than its noiseless ones (2510.10767). Pure.

    gap(eta) = E[r(x_0 drawn at stochasticity eta)] - E[r(x_0 drawn by the ODE)]      in equally many steps

Policy-gradient methods train on noisy samples, users draw noiseless ones; the gap says how much of a reward does not
come along. It is estimated in pairs: the same held-out prompts and the same initial noise on both sides, one difference
of mean rewards per prompt. Intervals are Student's t over prompts at 95 %; samples whose reward failed are in no mean.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raylign.errors import RunDirError
from raylign.types import RolloutGroup
from rollout.drawn import AS_CONFIGURED, EvalPoint

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and half the width of its confidence interval, None where one value shows no spread."""

    mean: float
    half_width: float | None
    count: int

    @property
    def low(self) -> float:
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half_width or 0.0)


@dataclass(frozen=True, slots=True)
class GapPoint:
    """One stochasticity at one learner step: both rewards, and the gap between them over the prompts of both."""

    step: int
    eta: float
    num_steps: int
    reward: Interval
    ode: Interval
    gap: Interval


def interval(values: Sequence[float]) -> Interval:
    """Mean and t-interval of independent values. Raises statistics.StatisticsError for none."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Interval(mean, None, count)
    return Interval(mean, t_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count), count)


def t_quantile(freedom: int) -> float:
    """Student's t at .975, so that CONFIDENCE lies between it and its negative."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + CONFIDENCE / 2))


def prompt_means(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Mean reward of each prompt's samples by prompt id; prompts without any reward are left out."""
    totals = {group.prompt.id: [one.total for one in group.rollouts if one.total is not None] for group in groups}
    return {prompt: statistics.fmean(values) for prompt, values in totals.items() if values}


def paired_gap(noisy: Mapping[str, float], ode: Mapping[str, float]) -> Interval | None:
    """The interval of the differences by prompt, noisy - ODE; None if no prompt has both."""
    differences = [reward - ode[prompt] for prompt, reward in noisy.items() if prompt in ode]
    return interval(differences) if differences else None


def point_name(point: EvalPoint) -> str:
    """How metrics and tables call a way of drawing pictures, such as `eta_0.5` or `ode_steps_12`."""
    name = "ode" if point.eta is None else f"eta_{point.eta:g}"
    return name if point.num_steps is None else f"{name}_steps_{point.num_steps}"


def gap_points(step: int, sweeps: Mapping[EvalPoint, Sequence[RolloutGroup]]) -> dict[EvalPoint, GapPoint]:
    """The gap at each stochasticity of `sweeps`, to the ODE there of as many steps (the evaluation's: AS_CONFIGURED).

    A point without any prompt that both sides have a reward for is left out.
    """
    measured: dict[EvalPoint, GapPoint] = {}
    for point, groups in sweeps.items():
        if point.eta is None:
            continue
        noisy, ode = prompt_means(groups), prompt_means(sweeps[ode_of(point)])
        gap = paired_gap(noisy, ode)
        if gap is not None:
            num_steps = len(groups[0].latents.sigmas_S1) - 1
            reward, baseline = interval(list(noisy.values())), interval(list(ode.values()))
            measured[point] = GapPoint(step, point.eta, num_steps, reward, baseline, gap)
    return measured


def ode_of(point: EvalPoint) -> EvalPoint:
    """The noiseless way of drawing that a stochasticity is compared with."""
    return AS_CONFIGURED if point.num_steps is None else EvalPoint(num_steps=point.num_steps)


def gap_metrics(
    sweeps: Mapping[EvalPoint, Sequence[RolloutGroup]], measured: Mapping[EvalPoint, GapPoint]
) -> dict[str, float]:
    """Mean reward of every repeat, `eval/eta_0.5/mean`, and the gap, `eval/gap/eta_0.5`, with half its interval."""
    metrics: dict[str, float] = {}
    for point, groups in sweeps.items():
        totals = [one.total for group in groups for one in group.rollouts if one.total is not None]
        if point != AS_CONFIGURED and totals:
            metrics[f"eval/{point_name(point)}/mean"] = statistics.fmean(totals)
    for point, one in measured.items():
        metrics[f"eval/gap/{point_name(point)}"] = one.gap.mean
        if one.gap.half_width is not None:
            metrics[f"eval/gap_ci95/{point_name(point)}"] = one.gap.half_width
    return metrics


def say_gaps(measured: Mapping[EvalPoint, GapPoint]) -> str:
    """One line for the screen."""
    return "  |  ".join(f"{point_name(point)} {say_interval(one.gap)}" for point, one in measured.items())


def say_interval(one: Interval) -> str:
    """Such as `+0.0123 +- 0.0045`, which every screen can show."""
    return f"{one.mean:+.4f}" if one.half_width is None else f"{one.mean:+.4f} +- {one.half_width:.4f}"


def gaps_json(points: Sequence[GapPoint]) -> bytes:
    """The contents of `reward_gap.json`."""
    about = {"confidence": CONFIDENCE, "interval": "Student's t over prompts; of gaps, over their paired differences"}
    return json.dumps({**about, "points": [asdict(point) for point in points]}, indent=1).encode() + b"\n"


def read_gaps(path: Path) -> list[GapPoint]:
    """What `gaps_json` wrote; none if there is no file. Raises RunDirError for a file of another kind."""
    try:
        data = json.loads(path.read_bytes())
        return [_point(one) for one in data["points"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise RunDirError(f"{path} holds no gaps ({type(error).__name__}: {error}); delete it to go on") from None


def _point(data: Mapping[str, Any]) -> GapPoint:
    intervals = {name: Interval(**data[name]) for name in ("reward", "ode", "gap")}
    return GapPoint(data["step"], data["eta"], data["num_steps"], **intervals)
