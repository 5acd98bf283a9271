"""How sure a mean reward is: half-widths of its 95 % interval, over prompts. Pure.

Siblings share a prompt, so they are not independent; prompts are. A mean over samples is that of its prompts' means
(groups are of one size), and Student's t makes the interval honest for the few prompts of a step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from raylign.types import RolloutGroup

INTERVAL = "ci95/"
"""Before a metric's name: half the width of its interval."""
_LEVEL = 0.975


def interval_metrics(groups: Sequence[RolloutGroup], prefix: str) -> dict[str, float]:
    """`ci95/<prefix>/mean` and `ci95/<prefix>/<reward>`; a reward that fewer than two prompts have is left out."""
    values: dict[str, list[list[float]]] = {}
    for group in groups:
        here: dict[str, list[float]] = {}
        for rollout in group.rollouts:
            if rollout.total is not None:
                here.setdefault("mean", []).append(rollout.total)
            for score in rollout.reward.scores if rollout.reward is not None else ():
                if score.value is not None:
                    here.setdefault(score.name, []).append(score.value)
        for name, numbers in here.items():
            values.setdefault(name, []).append(numbers)
    widths = {name: half_width([statistics.fmean(one) for one in some]) for name, some in values.items()}
    return {f"{INTERVAL}{prefix}/{name}": width for name, width in widths.items() if width is not None}


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the values' mean; None for fewer than two."""
    if len(values) < 2:
        return None
    from scipy.special import stdtrit

    return float(stdtrit(len(values) - 1, _LEVEL)) * statistics.stdev(values) / math.sqrt(len(values))
