"""The guard of one run: what it is given each step, its state for checkpoints, and what its verdicts do to the loop.

The controller asks it after each step. It lowers rates through the learner's `adjust`, leaves dropped rewards out of
the groups that are trained on, and names the checkpoint to go back to. Going back is then what resuming is: the step's
checkpoint is written with the weights of the best one, and the run goes on from it.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from raylign.types import JsonValue, RewardBreakdown, Rollout, RolloutGroup, RolloutStatus
from rewards.base import RewardAsk
from rewards.mix import weighted_sums
from rollout.rank_agreement import spearman
from services.confidence import interval_metrics
from services.guard import AGREEMENT, GuardState, Verdict, judge
from services.guard_config import GuardConfig, watched
from services.step_metrics import eval_metrics


class Adjustable(Protocol):
    """The part of a LearnerRole that the guard needs."""

    async def adjust(self, lr_scale: float, kl_scale: float) -> None: ...

    async def load(self, folder: Path) -> None: ...


class GuardedConfig(Protocol):
    """The part of a RunConfig that the guard needs."""

    @property
    def guard(self) -> GuardConfig: ...

    @property
    def rewards(self) -> Sequence[Any]: ...


class RewardGuard:
    """See the module. It belongs to one controller; `restore` comes before the controller runs."""

    def __init__(
        self, config: GuardedConfig, note: Callable[[str], None] = lambda text: None, checkpoints: Path = Path()
    ) -> None:
        """`note` hears what is done; `checkpoints` is the folder to go back in."""
        self._config = config.guard
        self._rewards = [reward for reward in config.rewards if not reward.only_eval]
        self._names = watched(config.guard, config.rewards)
        self._note = note
        self._checkpoints = checkpoints
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self._state = GuardState()

    @property
    def enabled(self) -> bool:
        """Whether it needs each step's evaluation to be over before the step is judged."""
        return self._config.enabled

    @property
    def rolls_back(self) -> bool:
        """Whether the best checkpoint must be there to go back to."""
        return self._config.enabled and bool(self._config.takes("roll_back"))

    @property
    def spared(self) -> int | None:
        """The step whose checkpoint must not be deleted."""
        return self._state.best_step if self.rolls_back else None

    @property
    def events(self) -> list[JsonValue]:
        """What was done so far, for the run's summary."""
        return [event.model_dump(mode="json") for event in self._state.events]

    def state(self) -> dict[str, JsonValue]:
        """What decides the next steps, for a checkpoint."""
        return self._state.model_dump(mode="json")

    def restore(self, state: Mapping[str, JsonValue]) -> None:
        """Go on from a state."""
        if self._config.enabled:
            self._state = GuardState.model_validate(state)

    def evaluated(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """An evaluation was made with a step's weights."""
        if self._config.enabled:
            self._evaluated = step, {**eval_metrics(groups), **interval_metrics(groups, "eval")}

    def judge(self, step: int, metrics: Mapping[str, float], groups: Sequence[RolloutGroup]) -> Verdict:
        """Judge a step by its metrics, its groups and the evaluation that was made after it, if one was."""
        if not self._config.enabled:
            return Verdict()
        left = {name: w for name, w in self._names.trained.items() if w and name not in self._state.dropped}
        own = agreement_metrics(groups, left)
        seen = self._evaluated[1] if self._evaluated[0] == step else {}
        self._state, verdict = judge(self._config, self._names, self._state, step, {**metrics, **own, **seen})
        for event in verdict.events:
            self._note(f"guard, step {step}, {event.signal}: {event.told}")
        return replace(verdict, metrics={**own, **verdict.metrics})

    async def adjust(self, learner: Adjustable) -> None:
        """Tell the learner its rates, where they are not what was configured."""
        if (self._state.lr_scale, self._state.kl_scale) != (1.0, 1.0):
            await learner.adjust(self._state.lr_scale, self._state.kl_scale)

    async def go_back(self, learner: Adjustable, step: int) -> None:
        """Give the learner the weights, moments and slow copies of a step's checkpoint."""
        await learner.load((self._checkpoints / f"step_{step}").resolve())

    def to_train_on(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """Groups as they are, but for the rewards that were dropped."""
        if not self._state.dropped:
            return list(groups)
        asks = [
            RewardAsk(one.name, 0.0, required=False)
            if one.name in self._state.dropped
            else RewardAsk(one.name, one.weight, one.required)
            for one in self._rewards
        ]
        return [_mixed_anew(group, asks) for group in groups]


def agreement_metrics(groups: Sequence[RolloutGroup], weights: Mapping[str, float]) -> dict[str, float]:
    """Rank correlation of each two rewards within groups, mean over the groups that rank by both; of the pair that
    agrees least. {} where there are not two. A reward with a negative weight counts the other way round."""
    least: list[float] = []
    for one, other in itertools.combinations(weights, 2):
        sign = 1.0 if weights[one] * weights[other] > 0 else -1.0
        found = [rho for group in groups if (rho := _rank_correlation(group, one, other)) is not None]
        if found:
            least.append(sign * statistics.fmean(found))
    return {AGREEMENT: min(least)} if least else {}


def _rank_correlation(group: RolloutGroup, one: str, other: str) -> float | None:
    values = [{score.name: score.value for score in r.reward.scores} for r in group.rollouts if r.reward is not None]
    pairs = [(a, b) for v in values if (a := v.get(one)) is not None and (b := v.get(other)) is not None]
    return spearman([a for a, _ in pairs], [b for _, b in pairs]) if len(pairs) > 2 else None


def _mixed_anew(group: RolloutGroup, asks: Sequence[RewardAsk]) -> RolloutGroup:
    rollouts = tuple(_with_mix(rollout, asks) for rollout in group.rollouts)
    return replace(group, rollouts=rollouts)


def _with_mix(rollout: Rollout, asks: Sequence[RewardAsk]) -> Rollout:
    """A rollout whose total is the mix of these; one that failed by a dropped reward alone counts again."""
    reward = rollout.reward
    if reward is None or not reward.scores:
        return rollout
    values = {score.name: [score.value] for score in reward.scores}
    (total,) = weighted_sums(values, asks)
    weight = {ask.name: ask.weight for ask in asks}
    weights = tuple(weight[score.name] for score in reward.scores)
    status = rollout.status
    if status in (RolloutStatus.OK, RolloutStatus.REWARD_FAILED):
        status = RolloutStatus.REWARD_FAILED if total.value is None else RolloutStatus.OK
    return replace(rollout, reward=RewardBreakdown(total.value, reward.scores, reward.failure, weights), status=status)
