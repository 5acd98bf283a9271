"""From several rewards' scores to one number per sample, or to none when a required reward has no value."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from raylign.errors import ConfigError
from raylign.types import Prompt, RewardBreakdown, RewardSample, RewardScore
from rewards.base import Reward, RewardConfig, score_totally


class Weighed(Protocol):
    """What the mix needs to know of a reward: its configuration, or what a request asks for."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def required(self) -> bool: ...


def mix(scores_by_reward: Mapping[str, Sequence[RewardScore]], configs: Sequence[Weighed]) -> list[RewardBreakdown]:
    """One breakdown per sample from one list of scores per reward, each in sample order.

    The total is the sum of weight * value. A failed required reward leaves no total. A failed optional one is left
    out and the other weights grow so that their magnitudes sum to the same, which keeps totals comparable.
    """
    columns = [scores_by_reward[config.name] for config in configs]
    return [_mix_one(scores, configs) for scores in zip(*columns, strict=True)]


def _mix_one(scores: tuple[RewardScore, ...], configs: Sequence[Weighed]) -> RewardBreakdown:
    total = 0.0
    weight_all = weight_left = 0.0
    for score, config in zip(scores, configs, strict=True):
        weight_all += abs(config.weight)
        if score.value is not None:
            weight_left += abs(config.weight)
            total += config.weight * score.value
        elif config.required:
            return RewardBreakdown(None, scores)
    complete = all(score.value is not None for score in scores)
    if not complete:
        if weight_left == 0:
            return RewardBreakdown(None, scores)
        total *= weight_all / weight_left
    # Finite values and weights can still overflow; an infinite total is no total.
    return RewardBreakdown(total if math.isfinite(total) else None, scores)


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
        self, samples: Sequence[RewardSample], only: Collection[str] | None = None
    ) -> list[RewardBreakdown]:
        """One breakdown per sample, in order; `only` restricts the mix to rewards of these names."""
        chosen = [(config, reward) for config, reward in self.rewards if only is None or config.name in only]
        answers = await asyncio.gather(*(score_totally(reward, samples) for _, reward in chosen))
        by_name = {config.name: scores for (config, _), scores in zip(chosen, answers, strict=True)}
        return mix(by_name, [config for config, _ in chosen])
