"""Lets the number of rollout actors follow the run: an observer of the controller, around the one that it has."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from raylign.types import RolloutGroup
from rollout.drawn import EvalPoint
from services.elastic import RULES, ActorBounds, Autoscaling, Load, Pressure, advise
from services.run_control import Pool

if TYPE_CHECKING:
    from services.controller import Observer


class Autoscaler:
    """Passes everything on, and changes the number of actors as the steps' loads suggest (`services.elastic`)."""

    def __init__(
        self,
        observer: Observer,
        pool: Pool,
        bounds: ActorBounds,
        most: Callable[[], int],
        note: Callable[[str], None],
        rules: Autoscaling = RULES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`most`: how many actors the cluster can hold. `note` hears of every change."""
        self._observer = observer
        self._pool = pool
        self._bounds = bounds
        self._most = most
        self._note = note
        self._rules = rules
        self._clock = clock
        self._pressure = Pressure()

    def stepped(self, step: int, metrics: Mapping[str, float], groups: Sequence[RolloutGroup]) -> None:
        status = self._pool.status()
        actors = {"actors/wanted": float(status.wanted), "actors/in_service": float(status.in_service)}
        self._observer.stepped(step, {**metrics, **actors}, groups)
        step_s = metrics["time/step_s"] - metrics.get("time/evaluate_s", 0.0)
        load = Load(self._clock(), metrics.get("time/rollout_s", 0.0), step_s)
        self._pressure, wanted = advise(self._pressure, load, status, self._bounds, self._rules)
        if wanted > status.wanted:
            # Actors that could never be placed would only be waited for.
            wanted = max(status.wanted, min(wanted, self._most()))
        if wanted != status.wanted:
            reason = "the learner waits for samples" if wanted > status.wanted else "the learner never waits"
            self._note(f"step {step}: from {status.wanted} to {wanted} rollout actors, for {reason}")
            self._pool.resize(wanted)

    def evaluated(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        self._observer.evaluated(step, groups)

    def swept(self, step: int, sweeps: Mapping[EvalPoint, Sequence[RolloutGroup]]) -> None:
        self._observer.swept(step, sweeps)


def autoscaled(
    observer: Observer,
    pool: Pool | None,
    bounds: ActorBounds,
    most: Callable[[], int],
    note: Callable[[str], None],
) -> Observer:
    """The observer, within one that scales where the configuration lets the number of actors change."""
    if pool is None or not bounds.is_elastic:
        return observer
    return Autoscaler(observer, pool, bounds, most, note)
