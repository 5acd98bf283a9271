"""Rewards. To add one: a file with its config and class, and a row here.

Importing this reads no model library; engines import theirs when they are built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from rewards.base import Reward, RewardConfig
from rewards.jpeg import JpegConfig, JpegReward
from rewards.mix import RewardMix, check_names, mix
from rewards.ocr import OcrConfig, OcrReward

RewardUnion = Annotated[OcrConfig | JpegConfig, Field(discriminator="type")]
REWARDS = {
    OcrConfig: OcrReward,
    JpegConfig: JpegReward,
}


def make_reward(config: OcrConfig | JpegConfig) -> Reward:
    """The reward a configuration describes; models are loaded by its `load` or first `score`."""
    return REWARDS[type(config)](config)  # type: ignore[arg-type]  # the table pairs them


def make_mix(configs: Sequence[OcrConfig | JpegConfig]) -> RewardMix:
    """The in-process scorer of a run's rewards. Raises ConfigError for no reward or a repeated name."""
    return RewardMix([(config, make_reward(config)) for config in configs])


__all__ = [
    "REWARDS",
    "JpegConfig",
    "JpegReward",
    "OcrConfig",
    "OcrReward",
    "Reward",
    "RewardConfig",
    "RewardMix",
    "RewardUnion",
    "check_names",
    "make_mix",
    "make_reward",
    "mix",
]
