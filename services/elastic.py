"""How many rollout actors a run should have, and which of them go. Pure: no Ray, no clock of its own.

a step's load ──advise──▶ the number wanted      the learner waits at an empty buffer: more actors
                                                 it never waits, the buffer is full:  fewer actors
nodes, needs ──most_that_fit──▶ the most that the cluster can ever hold
actors ──who_leaves──▶ those that a shrinking pool gives up
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass as checked_dataclass

from raylign.config import Config


@dataclass(frozen=True, slots=True)
class ActorBounds:
    """The fewest and the most rollout actors. Equal bounds are a pool that only a person changes."""

    least: int
    most: int

    @property
    def is_elastic(self) -> bool:
        return self.least < self.most

    def clip(self, wanted: int) -> int:
        return max(self.least, min(self.most, wanted))


class ElasticConfig(Config):
    """How many rollout actors a run has, and between which bounds it changes their number by itself."""

    num_actors: int = Field(default=2, ge=1)
    """Rollout actors at the start; may be changed freely, also while the run goes: results stay the same."""
    min_actors: int | None = Field(default=None, ge=1)
    """The run starts when so many are up and the others join when they come; num_actors when not given."""
    max_actors: int | None = Field(default=None, ge=1)
    """Up to so many are added while the learner waits for samples; num_actors when not given."""

    @model_validator(mode="after")
    def _check_order(self) -> ElasticConfig:
        least, most = self.bounds.least, self.bounds.most
        if not least <= self.num_actors <= most:
            raise ValueError(
                f"rollout.num_actors {self.num_actors} must lie between min_actors {least} and max_actors {most}; "
                "change one of them"
            )
        return self

    @property
    def bounds(self) -> ActorBounds:
        """The fewest actors that a run starts with, and the most that it asks for by itself."""
        return ActorBounds(self.min_actors or self.num_actors, self.max_actors or self.num_actors)


@checked_dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class PoolStatus:
    """What has become of the actors that were asked for. It also travels as JSON, and is checked on arrival."""

    wanted: int
    in_service: int
    joining: int
    """Created, not placed or not ready yet."""
    away: int
    """Died or hung after they had worked; they come back by themselves."""
    leaving: int
    """Finish what they have, and go."""
    restarts: int
    hung: int
    """How often an actor was given up because it did not answer in time."""
    paused: bool
    problem: str = ""
    """Why the last actor that could not join did not."""


@dataclass(frozen=True, slots=True)
class Load:
    """One training step, as the learner saw the buffer."""

    at_s: float
    waited_s: float
    """How long the learner waited for the step's groups: 0 when they were there."""
    step_s: float
    """Wall seconds of the whole step, that wait included, evaluations left out."""


@dataclass(frozen=True, slots=True)
class Autoscaling:
    """When the pool changes. The gap between the two shares, and the steps and seconds, are the hysteresis."""

    grow_above: float = 0.3
    """Share of a step that the learner waits, above which actors are missing."""
    shrink_below: float = 0.02
    """The share below which the buffer is as good as always full."""
    grow_steps: int = 3
    shrink_steps: int = 10
    grow_after_s: float = 20.0
    shrink_after_s: float = 120.0
    settle_s: float = 60.0
    """After a change nothing is concluded for so long: new actors load their model first."""


RULES = Autoscaling()
"""Those that runs follow."""


@dataclass(frozen=True, slots=True)
class Pressure:
    """What the last steps have in common: `towards` is 1 for too few actors, -1 for too many, 0 for neither."""

    towards: int = 0
    since_s: float = 0.0
    num_steps: int = 0
    settled_s: float = 0.0
    """Nothing is concluded from steps before this."""


def advise(
    pressure: Pressure, load: Load, pool: PoolStatus, bounds: ActorBounds, rules: Autoscaling = RULES
) -> tuple[Pressure, int]:
    """The pressure after a step, and how many actors there should be; `pool.wanted` where nothing should change.

    The pool grows by a half and shrinks by a quarter, at least by one. While actors are on their way, or the run is
    paused, nothing is concluded.
    """
    if load.at_s < pressure.settled_s or pool.joining or pool.leaving or pool.paused:
        return replace(pressure, towards=0, num_steps=0), pool.wanted
    share = load.waited_s / load.step_s if load.step_s > 0 else 0.0
    towards = 1 if share > rules.grow_above else -1 if share < rules.shrink_below else 0
    if towards == 0:
        return replace(pressure, towards=0, num_steps=0), pool.wanted
    if towards != pressure.towards:
        pressure = replace(pressure, towards=towards, since_s=load.at_s - load.step_s, num_steps=0)
    pressure = replace(pressure, num_steps=pressure.num_steps + 1)
    steps, after_s = (
        (rules.grow_steps, rules.grow_after_s) if towards > 0 else (rules.shrink_steps, rules.shrink_after_s)
    )
    if pressure.num_steps < steps or load.at_s - pressure.since_s < after_s:
        return pressure, pool.wanted
    change = math.ceil(pool.wanted / 2) if towards > 0 else -math.ceil(pool.wanted / 4)
    wanted = bounds.clip(pool.wanted + change)
    return Pressure(settled_s=load.at_s + rules.settle_s), wanted


def most_that_fit(
    nodes: Sequence[Mapping[str, float]],
    everywhere: Mapping[str, float],
    need: Mapping[str, float],
    others: Mapping[str, float],
) -> int:
    """How many actors could ever run at once, whatever else runs there now.

    nodes: resources of each node that may hold one. everywhere: of all nodes together. need: of one actor. others: what
    the run's other roles reserve.
    """
    needed = {kind: amount for kind, amount in need.items() if amount > 0}
    if not needed:
        raise ValueError("an actor that needs nothing fits without end")
    by_node = sum(min(_times(kind, node.get(kind, 0.0), amount) for kind, amount in needed.items()) for node in nodes)
    beside = (
        _times(kind, everywhere.get(kind, 0.0) - others.get(kind, 0.0), amount) for kind, amount in needed.items()
    )
    return max(0, min(by_node, *beside))


def _times(kind: str, has: float, amount: float) -> int:
    """How often `amount` fits into `has`. Ray counts in ten-thousandths, and a part of a GPU lies on one GPU."""
    if kind == "GPU" and amount < 1:
        return math.floor(has) * _times("part", 1.0, amount)
    return math.floor(round(has * 10_000) / round(amount * 10_000))


def who_leaves(actors: Sequence[int], in_service: Collection[int], count: int) -> list[int]:
    """The actors that a pool gives up, by number: those that do not work first, then the newest."""
    return sorted(actors, key=lambda actor: (actor in in_service, -actor))[: max(0, count)]
