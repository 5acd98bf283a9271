"""What a person should look at, from a run's metrics alone. Pure; the page shows it, nothing acts on it.

Each rule is a function of the columns and of a few facts of the configuration. It says what it saw in numbers; a rule
that has not enough steps yet says nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from services.confidence import INTERVAL
from services.dashboard.columns import Columns
from services.headlines import DIVERSITY, direction

Level = Literal["warn", "bad"]
_RECENT = 10
"""Rows that count as now."""
_FALL = 0.05
"""The share of its best that a held-out mean may lose before it counts as falling, beyond its interval."""
_RISE = 0.01
_NO_REWARDS = ("failed", "std_within_group", "nfe", "cached_calls", "gamma", "characters", DIVERSITY)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules need of a configuration."""

    groups_per_step: int = 1
    group_size: int = 1
    parity_tolerance: float | None = None


@dataclass(frozen=True, slots=True)
class Alert:
    """One finding."""

    kind: str
    level: Level
    title: str
    text: str
    step: int

    def json(self) -> dict[str, Any]:
        return asdict(self)


def alerts(columns: Columns, facts: Facts) -> list[Alert]:
    """Everything that is to be said now, the worst first."""
    if not columns.steps:
        return []
    found = [alert for rule in RULES for alert in rule(columns, facts)]
    return sorted(found, key=lambda alert: alert.level != "bad")


def reward_hacking(columns: Columns, facts: Facts) -> list[Alert]:
    """The training reward rose while a held-out mean fell from its best."""
    found: list[Alert] = []
    training = columns.points("reward/mean")
    for name in held_out_rewards(columns):
        points = columns.points(f"eval/{name}")
        if len(points) < 3 or direction(name, 0.0, 1.0) != "better":
            continue
        best_step, best = max(points, key=lambda point: (point[1], point[0]))
        step, last = points[-1]
        width = (columns.tail(f"{INTERVAL}eval/{name}", len(columns.steps)) or [0.0])[-1]
        fell = best - last
        before, now = _mean_around(training, best_step), _mean_around(training, step)
        if before is None or now is None:
            continue
        rose = now - before
        if fell > max(_FALL * abs(best), width) and rose > _RISE * max(abs(before), 1e-12):
            text = (
                f"held-out {name} fell from {best:.3f} at step {best_step} to {last:.3f}, while the training reward "
                f"rose from {before:.3f} to {now:.3f}. Compare the pictures or texts of both steps."
            )
            level: Level = "bad" if fell > 2 * max(_FALL * abs(best), width) else "warn"
            found.append(Alert("hacking", level, "Reward hacking suspected", text, step))
    return found


def held_out_rewards(columns: Columns) -> list[str]:
    """Names of the held-out means that are rewards or metrics, without their details."""
    names = [name.removeprefix("eval/") for name in columns.values if name.startswith("eval/")]
    plain = [name for name in names if "/" not in name and name not in _NO_REWARDS]
    return [name for name in plain if name != "mean"] or plain


def diversity_collapse(columns: Columns, facts: Facts) -> list[Alert]:
    """Samples of one prompt became alike."""
    points = columns.points(f"eval/{DIVERSITY}")
    if len(points) < 2:
        return []
    (_, first), (step, last) = points[0], points[-1]
    if first <= 0 or last >= 0.5 * first:
        return []
    text = f"two held-out samples of one prompt differ by {last:.3f}, and by {first:.3f} at the start."
    return [Alert("diversity", "bad" if last < 0.25 * first else "warn", "Diversity collapses", text, step)]


def zero_variance(columns: Columns, facts: Facts) -> list[Alert]:
    """Groups whose siblings all have one reward teach nothing."""
    recent = columns.tail("reward/zero_variance_groups", _RECENT)
    if not recent:
        return []
    share = statistics.fmean(recent) / facts.groups_per_step
    if share < 0.5:
        return []
    text = (
        f"in {share:.0%} of the groups of the last {len(recent)} steps all siblings have the same reward, so they "
        "carry no gradient. Prompts may be too easy, too hard, or samples too alike."
    )
    return [
        Alert("zero_variance", "bad" if share > 0.9 else "warn", "Groups without a signal", text, columns.steps[-1])
    ]


def clip_fraction(columns: Columns, facts: Facts) -> list[Alert]:
    """Most ratios are clipped: the policy moved further than the loss allows for."""
    recent = columns.tail("ratio/clip_fraction", _RECENT)
    share = statistics.fmean(recent) if recent else 0.0
    if share < 0.3:
        return []
    text = f"{share:.0%} of the ratios of the last {len(recent)} steps pass a clip bound; lower learner.lr, or the "
    text += "updates per step."
    return [Alert("clip", "bad" if share > 0.6 else "warn", "Most ratios are clipped", text, columns.steps[-1])]


def parity(columns: Columns, facts: Facts) -> list[Alert]:
    """Rollout actors and learner answer differently."""
    recent, tolerance = columns.tail("parity/gap", _RECENT), facts.parity_tolerance
    if not recent or tolerance is None or recent[-1] <= 0.5 * tolerance:
        return []
    text = f"rollout actors and learner differ by {recent[-1]:.2e}; {tolerance:g} is tolerated."
    return [Alert("parity", "bad" if recent[-1] > tolerance else "warn", "Parity gap", text, columns.steps[-1])]


def failures(columns: Columns, facts: Facts) -> list[Alert]:
    """Samples fail, or updates are refused."""
    found: list[Alert] = []
    samples = facts.groups_per_step * facts.group_size
    failed = sum(sum(columns.tail(f"failed/{kind}", _RECENT)) for kind in ("generation_failed", "reward_failed"))
    share = failed / (samples * min(_RECENT, len(columns.steps)))
    if share >= 0.02:
        text = (
            f"{share:.0%} of the samples of the last steps have no reward; see Failures for the samples that caused it."
        )
        found.append(Alert("failures", "bad" if share > 0.1 else "warn", "Samples fail", text, columns.steps[-1]))
    refused = sum(columns.tail("failed/refused_updates", _RECENT))
    if refused:
        text = f"{refused:g} updates of the last steps were not finite and were refused; the weights are the last good"
        text += " ones."
        found.append(Alert("refused", "bad", "Updates refused", text, columns.steps[-1]))
    fell = {band: sum(columns.tail(f"failed/async_{band}", _RECENT)) for band in ("parity", "deviation", "kl")}
    if any(fell.values()):
        bands = ", ".join(band for band, count in fell.items() if count)
        text = f"the run left its band of {bands}, and goes on synchronously."
        found.append(Alert("async", "warn", "Asynchronous training stopped", text, columns.steps[-1]))
    return found


def guard(columns: Columns, facts: Facts) -> list[Alert]:
    """The run's own hacking guard tripped; what it did stands in its metrics."""
    tripped = columns.tail("guard/tripped", 1)
    if not tripped or not tripped[0]:
        return []
    did = [name.removeprefix("guard/did_") for name in columns.values if name.startswith("guard/did_")]
    done = [action.replace("_", " ") for action in did if any(columns.tail(f"guard/did_{action}", len(columns.steps)))]
    text = f"{tripped[0]:g} of its signals are out of bounds." + (
        f" It did: {', '.join(sorted(done))}." if done else ""
    )
    return [Alert("guard", "bad", "The hacking guard tripped", text, columns.steps[-1])]


RULES: Sequence[Callable[[Columns, Facts], list[Alert]]] = (
    reward_hacking,
    diversity_collapse,
    zero_variance,
    clip_fraction,
    parity,
    failures,
    guard,
)


def _mean_around(points: Sequence[tuple[int, float]], step: int) -> float | None:
    """The mean of the training reward over the rows up to a step; of the first ones if none came before."""
    before = [value for at, value in points if at <= step][-_RECENT:] or [value for _, value in points[:3]]
    mean = statistics.fmean(before) if before else math.nan
    return None if math.isnan(mean) else mean
