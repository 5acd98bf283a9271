"""From several rewards' scores to one number per sample, or to none when a required reward has no value."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from raylign.errors import ConfigError
from raylign.types import Prompt, RewardBreakdown, RewardSample, RewardScore
from rewards.base import Reward, RewardConfig
from rewards.grouping import any_compares, in_groups, score_group_totally


class Weighed(Protocol):
    """What the mix needs to know of a reward: its configuration, or what a request asks for."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def required(self) -> bool: ...


Values = Sequence[float | None]
"""One reward's values in sample order; None where it failed."""
GDPO_EPS = 1e-4
"""Added to a group's deviation, as in GDPO's published code and in the learner."""


@dataclass(frozen=True, slots=True)
class Total:
    """One sample's mix."""

    value: float | None
    renormalised: bool = False
    """Whether an optional reward is missing and the other weights grew in its place."""


def weighted_sums(values_by_reward: Mapping[str, Values], asks: Sequence[Weighed]) -> list[Total]:
    """The sum of weight * value of each sample; finite, or None.

    A missing required value leaves no total. A missing optional one is left out and the other weights grow so that
    their magnitudes sum to the same, which keeps totals comparable. An optional one of weight 0 is never missed.
    """
    columns = [values_by_reward[ask.name] for ask in asks]
    return [_weighted_sum(values, asks) for values in zip(*columns, strict=True)]


def _weighted_sum(values: Sequence[float | None], asks: Sequence[Weighed]) -> Total:
    total = 0.0
    weight_all = weight_left = 0.0
    complete = True
    for value, ask in zip(values, asks, strict=True):
        weight_all += abs(ask.weight)
        if value is not None:
            weight_left += abs(ask.weight)
            total += ask.weight * value
        elif ask.required:
            return Total(None)
        elif ask.weight:
            complete = False
    if not complete:
        if weight_left == 0:
            return Total(None)
        total *= weight_all / weight_left
    # Finite values and weights can still overflow; an infinite total is no total.
    return Total(total, not complete) if math.isfinite(total) else Total(None)


def affine(values: Values, bounds: tuple[float, float], higher_is_better: bool) -> list[float | None]:
    """Values of a bounded reward on [0, 1], the better end on 1: (v - low) / (high - low), or (high - v) / (...)."""
    low, high = bounds
    zero, one = (low, high) if higher_is_better else (high, low)
    return [None if value is None else (value - zero) / (one - zero) for value in values]


def group_normalised(
    values_by_reward: Mapping[str, Values], asks: Sequence[Weighed], group_ids: Sequence[str]
) -> dict[str, list[float | None]]:
    """Each reward by itself: the first step of GDPO (2601.05242, Group reward-Decoupled Normalization),

        A_k = (r_k - mean of r_k in the group) / (std of r_k in the group + 1e-4)

    `weighted_sums` of these is the paper's second step; the third, normalising the sums over the whole batch, is the
    trainer's, which alone knows the batch. The deviation is the population's, as in the learner (the authors' code
    for TRL takes the sample's); equal values give exactly 0. A sample that lacks a required value enters no mean and
    gets None for every reward; a missing optional value is left out of its own reward's mean only.
    """
    required = [values_by_reward[ask.name] for ask in asks if ask.required]
    places_by_group: dict[str, list[int]] = {}
    for place, group_id in enumerate(group_ids):
        if all(values[place] is not None for values in required):
            places_by_group.setdefault(group_id, []).append(place)
    normalised: dict[str, list[float | None]] = {}
    for ask in asks:
        column: list[float | None] = [None] * len(group_ids)
        for places in places_by_group.values():
            present = [(p, v) for p in places if (v := values_by_reward[ask.name][p]) is not None]
            for (place, _), score in zip(present, _standardised([v for _, v in present]), strict=True):
                column[place] = score
        normalised[ask.name] = column
    return normalised


def _standardised(values: Sequence[float]) -> list[float]:
    """(v - mean) / (population std + eps); exactly 0 for equal values, whose mean may round."""
    if not values or min(values) == max(values):
        return [0.0] * len(values)
    # Halving until the largest is below 2 is exact, and keeps the squares of huge values finite.
    scale = math.ldexp(1.0, math.frexp(max(map(abs, values)))[1] - 1)
    scaled = [value / scale for value in values]
    mean = math.fsum(scaled) / len(scaled)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in scaled) / len(scaled))
    return [(value - mean) / (std + GDPO_EPS / scale) for value in scaled]


def mix(scores_by_reward: Mapping[str, Sequence[RewardScore]], configs: Sequence[Weighed]) -> list[RewardBreakdown]:
    """One breakdown per sample from one list of scores per reward, each in sample order; see `weighted_sums`."""
    columns = [scores_by_reward[config.name] for config in configs]
    weights = tuple(config.weight for config in configs)
    values = {name: [score.value for score in scores] for name, scores in scores_by_reward.items()}
    totals = weighted_sums(values, configs)
    rows = zip(*columns, strict=True)
    return [RewardBreakdown(t.value, row, weights=weights) for t, row in zip(totals, rows, strict=True)]


def check_names(configs: Sequence[RewardConfig]) -> None:
    """Raise ConfigError unless there is at least one reward and every name is there once."""
    names = [config.name for config in configs]
    if not names:
        raise ConfigError("no reward is configured; add a [[rewards]] table with a type, such as 'ocr'")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"reward name(s) {', '.join(twice)} occur more than once; give each [[rewards]] its own `name`"
        )


class RewardMix:
    """Scores in this process, without Ray."""

    def __init__(self, rewards: Sequence[tuple[RewardConfig, Reward]]) -> None:
        """Rewards with the configuration that weighs them; see `rewards.make_mix`. Raises ConfigError."""
        check_names([config for config, _ in rewards])
        self._configs = [config for config, _ in rewards]
        self._rewards = [reward for _, reward in rewards]

    @property
    def rewards(self) -> list[tuple[RewardConfig, Reward]]:
        """What it mixes, in order."""
        return list(zip(self._configs, self._rewards, strict=True))

    def check(self, prompt: Prompt) -> None:
        """Raise PromptError if a required reward can never score samples of this prompt."""
        for config, reward in self.rewards:
            if config.required:
                reward.check(prompt)

    async def score(
        self, samples: Sequence[RewardSample], evaluation: bool = False, only: Collection[str] | None = None
    ) -> list[RewardBreakdown]:
        """One breakdown per sample, in order; held-out metrics (`only_eval`) are asked in an `evaluation` only.

        `only` restricts the mix to rewards of these names. If a reward compares, the samples of each `group_id` are
        scored together.
        """
        chosen = [
            (config, reward)
            for config, reward in self.rewards
            if (evaluation or not config.only_eval) and (only is None or config.name in only)
        ]
        if any_compares(reward for _, reward in chosen):
            return await in_groups(samples, lambda group: self._mix(group, chosen))
        return await self._mix(samples, chosen)

    async def _mix(
        self, samples: Sequence[RewardSample], chosen: Sequence[tuple[RewardConfig, Reward]]
    ) -> list[RewardBreakdown]:
        answers = await asyncio.gather(*(score_group_totally(reward, samples) for _, reward in chosen))
        by_name = {config.name: scores for (config, _), scores in zip(chosen, answers, strict=True)}
        return mix(by_name, [config for config, _ in chosen])
