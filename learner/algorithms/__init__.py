"""Algorithms. To add one: a file with its config and class, and a row here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from learner.algorithms.awm import Awm, AwmConfig
from learner.algorithms.base import Algorithm, ItemLosses, LossSetting, RolloutPolicy
from learner.algorithms.bgpo import Bgpo, BgpoConfig
from learner.algorithms.coupled_grpo import CoupledGrpo, CoupledGrpoConfig
from learner.algorithms.crd import Crd, CrdConfig
from learner.algorithms.d1 import D1, D1Config
from learner.algorithms.dance_grpo import DanceGrpo, DanceGrpoConfig
from learner.algorithms.ddpo import Ddpo, DdpoConfig
from learner.algorithms.diffpo import Diffpo, DiffpoConfig
from learner.algorithms.espo import Espo, EspoConfig
from learner.algorithms.flow_grpo import FlowGrpo, FlowGrpoConfig
from learner.algorithms.flow_grpo_fast import FlowGrpoFast, FlowGrpoFastConfig
from learner.algorithms.gdpo import Gdpo, GdpoConfig
from learner.algorithms.grpo_guard import GrpoGuard, GrpoGuardConfig
from learner.algorithms.just_grpo import JustGrpo, JustGrpoConfig
from learner.algorithms.mix_grpo import MixGrpo, MixGrpoConfig
from learner.algorithms.nft import Nft, NftConfig
from learner.algorithms.spg import Spg, SpgConfig
from learner.algorithms.trajectory import Trajectory, TrajectoryConfig
from learner.algorithms.unigrpo import UniGrpo, UniGrpoConfig
from learner.algorithms.wd1 import Wd1, Wd1Config

AlgorithmUnion = (
    NftConfig
    | CrdConfig
    | AwmConfig
    | FlowGrpoConfig
    | FlowGrpoFastConfig
    | GrpoGuardConfig
    | MixGrpoConfig
    | DanceGrpoConfig
    | DdpoConfig
    | D1Config
    | CoupledGrpoConfig
    | UniGrpoConfig
    | Wd1Config
    | SpgConfig
    | EspoConfig
    | DiffpoConfig
    | GdpoConfig
    | BgpoConfig
    | TrajectoryConfig
    | JustGrpoConfig
)
AlgorithmConfig = Annotated[AlgorithmUnion, Field(discriminator="type")]
IMAGE_ALGORITHMS = {
    NftConfig: Nft,
    CrdConfig: Crd,
    AwmConfig: Awm,
    FlowGrpoConfig: FlowGrpo,
    FlowGrpoFastConfig: FlowGrpoFast,
    GrpoGuardConfig: GrpoGuard,
    MixGrpoConfig: MixGrpo,
    DanceGrpoConfig: DanceGrpo,
    DdpoConfig: Ddpo,
}
TEXT_ALGORITHMS = {
    D1Config: D1,
    CoupledGrpoConfig: CoupledGrpo,
    UniGrpoConfig: UniGrpo,
    Wd1Config: Wd1,
    SpgConfig: Spg,
    EspoConfig: Espo,
    DiffpoConfig: Diffpo,
    GdpoConfig: Gdpo,
    BgpoConfig: Bgpo,
    TrajectoryConfig: Trajectory,
    JustGrpoConfig: JustGrpo,
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
