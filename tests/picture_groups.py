"""Scored groups of pictures with given rewards: what tests of evaluations and of the reward gap show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from raylign.types import JsonValue, LatentTrajectory, Prompt, RewardBreakdown, RewardScore, RolloutGroup
from rollout.prompts import GroupTask
from tests.fakes import make_group


def rewarded_group(
    prompt_id: str,
    rewards: Sequence[float | None],
    *,
    num_steps: int,
    details: Sequence[Mapping[str, JsonValue]] | None = None,
) -> RolloutGroup:
    """One prompt's 1x1 pictures after so many denoising steps; a reward None is a failed one."""
    task = GroupTask(Prompt(prompt_id, f"draw {prompt_id}"), -1, 0)
    group = make_group(task, range(len(rewards)), 0)
    latents = LatentTrajectory(torch.zeros(len(rewards), 1, 1, 1), torch.linspace(1, 0, num_steps + 1))
    breakdowns: list[RewardBreakdown] = []
    for place, reward in enumerate(rewards):
        told = {} if details is None else details[place]
        scores = () if reward is None else (RewardScore("fake", reward, details=told),)
        breakdowns.append(RewardBreakdown(reward, scores))
    return replace(group, trajectory=latents).with_rewards(breakdowns)
