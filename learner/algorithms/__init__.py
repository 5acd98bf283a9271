"""Algorithms. To add one: a file with its config and class, and a row here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from learner.algorithms.base import Algorithm, ItemLosses, RolloutPolicy
from learner.algorithms.flow_grpo import FlowGrpo, FlowGrpoConfig
from learner.algorithms.nft import Nft, NftConfig
from raylign.samplers import Sampler

AlgorithmConfig = Annotated[NftConfig | FlowGrpoConfig, Field(discriminator="type")]
ALGORITHMS = {
    NftConfig: Nft,
    FlowGrpoConfig: FlowGrpo,
}


def make_algorithm(config: NftConfig | FlowGrpoConfig, sampler: Sampler, guidance_scale: float) -> Algorithm:
    """The algorithm a configuration names, on the rollouts' sampler and guidance."""
    return ALGORITHMS[type(config)](config, sampler, guidance_scale)  # type: ignore[arg-type]  # the table pairs them


__all__ = ["ALGORITHMS", "Algorithm", "AlgorithmConfig", "ItemLosses", "RolloutPolicy", "make_algorithm"]
