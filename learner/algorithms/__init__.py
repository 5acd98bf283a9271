"""Algorithms. To add one: a file with its config and class, and a row here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from learner.algorithms.base import Algorithm, ItemLosses, LossSetting, RolloutPolicy
from learner.algorithms.d1 import D1, D1Config
from learner.algorithms.flow_grpo import FlowGrpo, FlowGrpoConfig
from learner.algorithms.nft import Nft, NftConfig

AlgorithmUnion = NftConfig | FlowGrpoConfig | D1Config
AlgorithmConfig = Annotated[AlgorithmUnion, Field(discriminator="type")]
IMAGE_ALGORITHMS = {
    NftConfig: Nft,
    FlowGrpoConfig: FlowGrpo,
}
TEXT_ALGORITHMS = {
    D1Config: D1,
}
ALGORITHMS: dict[type, type] = {**IMAGE_ALGORITHMS, **TEXT_ALGORITHMS}


def make_algorithm(config: AlgorithmUnion, setting: LossSetting) -> Algorithm[Any]:
    """The algorithm a configuration names, told of the rollouts."""
    return ALGORITHMS[type(config)](config, setting)


__all__ = [
    "ALGORITHMS",
    "IMAGE_ALGORITHMS",
    "TEXT_ALGORITHMS",
    "Algorithm",
    "AlgorithmConfig",
    "AlgorithmUnion",
    "ItemLosses",
    "LossSetting",
    "RolloutPolicy",
    "make_algorithm",
]
