"""A learner that dies does not end the run: which losses are made good, how often, and what is told of it.

    a rank is lost ─▶ all ranks are made anew ─▶ the newest good checkpoint ─▶ the steps since are trained again

Rollout actors and rewards stay as they are, unless they are the ranks' own processes. Draws are keyed, so the steps
that are trained again come out as they were; their rows of metrics take the place of the first ones.

Only a process or a node that is gone is a loss. An error of the work itself (a number that is not finite, a checkpoint
that cannot be written, memory of a GPU that is too small) would come again, so it ends the run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raylign.errors import ClusterError, RaylignError
from raylign.types import JsonValue, RolloutGroup
from rollout.drawn import EvalPoint

if TYPE_CHECKING:
    from services.controller import Observer


@dataclass(slots=True)
class Restarts:
    """Counts deaths of the learner. Progress beyond the step that died makes them forgotten."""

    limit: int
    used: int = 0
    died_at: int = -1

    def count(self, step: int) -> None:
        """The learner died, with `step` as the last completed one. Raises ClusterError if that was once too often."""
        if step > self.died_at:
            self.used = 0
        self.died_at = max(step, self.died_at)
        self.used += 1
        if self.used > self.limit:
            raise ClusterError(
                f"learner ranks died {self.used} times and step {self.died_at + 1} was never done "
                f"(max_learner_restarts = {self.limit}). Look for what ends them, such as too little memory on their "
                "node, then `raylign resume`"
            )


@dataclass(frozen=True, slots=True)
class Recovery:
    """One loss that was made good."""

    step: int
    """Last step that was done when it happened."""
    back_to: int
    """The step that training went on from."""
    seconds: float
    """From when it was noticed until the first of the steps after that began again."""

    def as_json(self) -> dict[str, JsonValue]:
        return {"step": self.step, "back_to": self.back_to, "seconds": self.seconds}


def causes(error: BaseException) -> list[BaseException]:
    """The errors that a group is made of, Raylign's own before others; of any other error itself."""
    leaves: list[BaseException] = []
    pending = [error]
    while pending:
        one = pending.pop(0)
        if isinstance(one, BaseExceptionGroup):
            pending.extend(one.exceptions)
        else:
            leaves.append(one)
    return sorted(leaves, key=lambda leaf: not isinstance(leaf, RaylignError))


async def is_loss(error: BaseException, num_lost: Callable[[], Awaitable[int]]) -> bool:
    """Whether a run failed because ranks are gone; `num_lost` asks the cluster how many.

    Their death may show as another rank's broken connection, or as weights that nobody has any more.
    """
    for cause in causes(error):
        if isinstance(cause, asyncio.CancelledError) or not isinstance(cause, Exception):
            return False
        if isinstance(cause, RaylignError) and not isinstance(cause, ClusterError):
            return False
    return await num_lost() > 0


class RecoveryObserver:
    """Passes everything on; with the first step after a recovery, how long that took."""

    def __init__(
        self,
        observer: Observer,
        lost_s: float,
        recovered: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """lost_s: when the loss was noticed. `recovered` hears of the seconds, once."""
        self._observer = observer
        self._lost_s: float | None = lost_s
        self._recovered = recovered
        self._clock = clock

    def stepped(self, step: int, metrics: Mapping[str, float], groups: Sequence[RolloutGroup]) -> None:
        if self._lost_s is not None:
            seconds = max(0.0, self._clock() - self._lost_s - metrics["time/step_s"])
            self._lost_s = None
            self._recovered(seconds)
            metrics = {**metrics, "time/recovery_s": seconds}
        self._observer.stepped(step, metrics, groups)

    def evaluated(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        self._observer.evaluated(step, groups)

    def swept(self, step: int, sweeps: Mapping[EvalPoint, Sequence[RolloutGroup]]) -> None:
        self._observer.swept(step, sweeps)
