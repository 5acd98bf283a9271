"""Scoring the candidates of one prompt together, for rewards that compare them."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from raylign.types import RewardSample, RewardScore
from rewards.base import Reward, ScoresGroups, failure, score_totally

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


def any_compares(rewards: Iterable[Reward]) -> bool:
    """Whether one of the rewards scores a group as a whole."""
    return any(isinstance(reward, ScoresGroups) for reward in rewards)


async def in_groups(
    samples: Sequence[RewardSample], score_group: Callable[[list[RewardSample]], Awaitable[Sequence[Answer]]]
) -> list[Answer]:
    """Answers in the order of the samples, those of one `group_id` asked for in one call, all calls at once."""
    places_by_group: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        places_by_group.setdefault(sample.group_id, []).append(place)
    groups = list(places_by_group.values())
    answers = await asyncio.gather(*(score_group([samples[place] for place in places]) for places in groups))
    by_place = {
        place: answer
        for places, answered in zip(groups, answers, strict=True)
        for place, answer in zip(places, answered, strict=True)
    }
    return [by_place[place] for place in range(len(samples))]


async def score_group_totally(reward: Reward, samples: Sequence[RewardSample]) -> list[RewardScore]:
    """One prompt's candidates compared, or scored one by one by a reward that compares none.

    If comparing raises, every candidate gets an error: there is no comparing one alone.
    """
    if not isinstance(reward, ScoresGroups):
        return await score_totally(reward, samples)
    try:
        scores = await reward.score_group(samples)
        if len(scores) != len(samples):
            raise ValueError(f"reward {reward.name!r} answered {len(samples)} candidates with {len(scores)} scores")
    except Exception:  # a scorer runs foreign models on any input; a failure there is a value here
        log_id = uuid.uuid4().hex[:12]
        logger.exception("reward %r failed on a group of %d (log id %s)", reward.name, len(samples), log_id)
        return [failure(reward, "model_error", f"the scorer failed; see its log, id {log_id}") for _ in samples]
    return scores
