"""From drawn groups to scored groups; the Scorer that goes over HTTP, and the one that adds held-out metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from raylign.types import RewardBreakdown, RewardFailure, RewardSample, RolloutGroup, RolloutStatus, Work
from rewards import RewardMix
from rewards.grouping import in_groups
from rewards.remote import RewardClient
from services.roles import Scorer
from services.timeline import REWARDS


class HttpScorer:
    """Scores a run's samples as any other client of the service would; lossless pictures give the same values."""

    def __init__(
        self, client: RewardClient, compares: bool, trained: Sequence[str], deadline_s: float | None = None
    ) -> None:
        """`compares`: whether a reward scores a group as a whole, so that each group goes in a request of its own.

        `trained`: the names of the rewards that are no held-out metrics. deadline_s: what has no score by then, tried
        again and again, is an error.
        """
        self._client = client
        self._compares = compares
        self._trained = tuple(trained)
        self._deadline_s = deadline_s

    async def score(self, samples: Sequence[RewardSample], evaluation: bool = False) -> list[RewardBreakdown]:
        """One breakdown per sample, in order; errors are values. An evaluation asks the held-out metrics as well."""
        only = None if evaluation else self._trained

        async def score_group(group: Sequence[RewardSample]) -> list[RewardBreakdown]:
            return (await self._client.score_group(group, only, deadline_s=self._deadline_s)).breakdowns

        if self._compares:
            return await in_groups(samples, score_group)
        return await self._client.score(samples, only, deadline_s=self._deadline_s)

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()


class WithLightMetrics:
    """A Scorer with held-out metrics beside it that are measured in this process."""

    def __init__(self, scorer: Scorer, metrics: RewardMix) -> None:
        """`metrics`: `only_eval` rewards that the scorer does not have."""
        self._scorer = scorer
        self._metrics = metrics

    async def score(self, samples: Sequence[RewardSample], evaluation: bool = False) -> list[RewardBreakdown]:
        """The scorer's breakdowns; in an evaluation the metrics' scores follow in each, and count nothing."""
        if not evaluation:
            return await self._scorer.score(samples)
        scored, measured = await asyncio.gather(
            self._scorer.score(samples, evaluation), self._metrics.score(samples, evaluation)
        )
        return [
            replace(one, scores=one.scores + more.scores, weights=one.weights + more.weights)
            for one, more in zip(scored, measured, strict=True)
        ]


async def score_groups(scorer: Scorer, groups: Sequence[RolloutGroup], evaluation: bool = False) -> list[RolloutGroup]:
    """Rewards for every sample that was drawn, in one call; one that was not has an error in place of a reward.

    In an `evaluation` the held-out metrics are asked as well.
    """
    samples = [
        RewardSample(
            id=f"{group.prompt.id}/{group.visit}/{rollout.key.sample_index}",
            prompt=group.prompt,
            image_HWC=None if group.images_GHWC is None else group.images_GHWC[place],
            text=None if group.texts is None else group.texts[place],
            group_id=f"{group.prompt.id}/{group.visit}",
        )
        for group in groups
        for place, rollout in enumerate(group.rollouts)
        if rollout.status is RolloutStatus.OK
    ]
    began_s, started_s = time.time(), time.perf_counter()
    scores = iter(await scorer.score(samples, evaluation) if samples else [])
    seconds = time.perf_counter() - started_s
    share, work = seconds / len(groups), [Work(REWARDS, "score", began_s, seconds)] if samples else []
    scored: list[RolloutGroup] = []
    for group in groups:
        rewards = [next(scores) if r.status is RolloutStatus.OK else _not_drawn() for r in group.rollouts]
        scored.append(group.with_rewards(rewards, share, work))
    return scored


def _not_drawn() -> RewardBreakdown:
    failure = RewardFailure("invalid_input", "the sampler's final state is not finite, so there is nothing to score")
    return RewardBreakdown(None, (), failure)
