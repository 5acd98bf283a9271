"""Where a step's time went, by role: from the seconds that its line of metrics.jsonl tells. Pure.

The learner's parts are wall time of the loop and add up to the step. What actors and rewards were busy with is theirs,
summed over all of them, so it is told as a share of what they could have done: actors x the step's seconds. Where
groups of later steps are drawn meanwhile, that work counts to the step that trains on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_LEARNER = (
    ("rollout", "waiting for samples"),
    ("credit", "credit"),
    ("train", "train"),
    ("publish", "publish"),
    ("pull", "actors pull"),
    ("parity", "parity check"),
    ("evaluate", "evaluate"),
    ("other", "other"),
)
_STAGES = ("draft", "select", "regenerate", "draft_reward")
WAITING = "rollout"


@dataclass(frozen=True, slots=True)
class Part:
    """A phase of a role: seconds, and their share of what the role had."""

    phase: str
    label: str
    seconds: float
    share: float


@dataclass(frozen=True, slots=True)
class Lane:
    """One role. `num` is how many of it there were, None where that is not known; then shares are of what it did."""

    role: str
    num: int | None
    seconds: float
    parts: list[Part]


def lanes(row: Mapping[str, float], num_actors: int) -> list[Lane]:
    """The roles of one step. [] for a step that was not trained (an evaluation before the first)."""
    step_s = row.get("time/step_s")
    if not step_s:
        return []
    actors = int(row.get("actors/in_service", num_actors)) or num_actors
    room = actors * step_s
    pull_s = row.get("time/pull_s", 0.0)
    if "busy/draft_s" in row:
        drawn = [
            ("draft", "draft", row["busy/draft_s"]),
            ("regenerate", "draw again", row.get("busy/regenerate_s", 0.0)),
        ]
    else:
        drawn = [
            ("sample", "generate", row.get("busy/sample_s", 0.0)),
            ("decode", "decode", row.get("busy/decode_s", 0.0)),
        ]
    drawn.append(("pull", "pull weights", actors * pull_s))
    drawn.append(("evaluate", "evaluate", actors * row.get("time/evaluate_s", 0.0)))
    found = [_lane("Rollout actors", actors, room, drawn)]
    score_s = row.get("busy/reward_s", 0.0)
    if score_s:
        found.append(Lane("Rewards", None, score_s, [Part("score", "score", score_s, min(1.0, score_s / step_s))]))
    learner = [(phase, label, row.get(f"time/{phase}_s", 0.0)) for phase, label in _LEARNER]
    found.append(_lane("Learner", 1, step_s, learner))
    return found


def slowest(rows: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """The loop's phases over some steps, the longest first: seconds per step and share. Evaluations count in full."""
    total = sum(row.get("time/step_s", 0.0) for row in rows)
    if not total:
        return []
    seconds = {phase: sum(row.get(f"time/{phase}_s", 0.0) for row in rows) for phase, _ in _LEARNER}
    labels = dict(_LEARNER)
    ranked = sorted(seconds, key=lambda phase: -seconds[phase])
    return [
        {"phase": phase, "label": labels[phase], "seconds": seconds[phase] / len(rows), "share": seconds[phase] / total}
        for phase in ranked
        if seconds[phase]
    ]


def ages(row: Mapping[str, float]) -> list[dict[str, Any]]:
    """How many samples of a step were how many versions old."""
    names = sorted(name for name in row if name.startswith("samples/age_"))
    return [{"age": name.removeprefix("samples/age_").replace("_up", "+"), "samples": row[name]} for name in names]


def as_json(found: Sequence[Lane]) -> list[dict[str, Any]]:
    """Lanes as plain data."""
    return [asdict(lane) for lane in found]


def _lane(role: str, num: int, room: float, parts: Sequence[tuple[str, str, float]]) -> Lane:
    """A role with what is left of its room as idle time; parts that overlap fill it."""
    busy = sum(seconds for _, _, seconds in parts)
    whole = max(room, busy)
    shown = [Part(phase, label, seconds, seconds / whole) for phase, label, seconds in parts if seconds > 0]
    if whole - busy > 1e-3 * whole:
        shown.append(Part("idle", "idle", whole - busy, 1.0 - busy / whole))
    return Lane(role, num, whole, shown)
