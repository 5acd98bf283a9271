"""When the pieces of a step's work began and ended, for its record (services.record). Pure.

Works come from several places: the step's groups tell what drawing and scoring them took, held-out groups what an
evaluation beside the step took, actors what pulling took, and the loop its own phases. Times are those of the machines
that did the work, so between machines they are as true to each other as their clocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from raylign.types import RolloutGroup, Work

REWARDS, LOOP = "rewards", "loop"
"""Who scores, and who runs the step, where rollout processes are named host:pid."""
MAX_WORK = 2000
"""Pieces kept of a step, the longest ones."""
_DRAWN = ("sample", "decode")


def work_of(groups: Iterable[RolloutGroup]) -> tuple[Work, ...]:
    """What was done for some groups, each piece once."""
    return tuple(dict.fromkeys(work for group in groups for work in group.work))


def renamed(works: Iterable[Work], phase: str, phases: Sequence[str] = _DRAWN) -> tuple[Work, ...]:
    """The works with drawing, or the phases given, under another name."""
    return tuple(replace(work, phase=phase) if work.phase in phases else work for work in works)


def as_evaluation(works: Iterable[Work]) -> tuple[Work, ...]:
    """Whatever was done for held-out groups is evaluation."""
    return tuple(replace(work, phase="evaluate") for work in works)


def step_timeline(drawn: Sequence[Work], beside: Sequence[Work], over_s: float, step_s: float) -> dict[str, Any]:
    """A step as plain data: when it began, and [who, phase, seconds after its beginning, seconds] of each piece.

    drawn: what its groups took; pieces from before the step have negative beginnings, as groups may be drawn while an
    earlier step is trained. beside: pulls, evaluations and phases of the loop, of which those count that ended in it.
    over_s: when the step was over, in Unix seconds; step_s: how long it took.
    """
    start_s = over_s - step_s
    # What was done before the first step, or between two, is no part of any.
    kept = [*drawn, *(work for work in beside if work.start_s + work.seconds > start_s)]
    longest = sorted(kept, key=lambda work: -work.seconds)[:MAX_WORK]
    return {
        "start": round(start_s, 4),
        "seconds": round(step_s, 4),
        "work": [
            [work.who, work.phase, round(work.start_s - start_s, 4), round(work.seconds, 4)]
            for work in sorted(longest, key=lambda work: (work.start_s, work.who))
        ],
        "left_out": len(kept) - len(longest),
    }
