"""DanceGRPO (2505.07818): PPO's clipped ratio on a share of the steps of siblings that start from one noise.

As published: Dance-SDE with eta = .3, 16 steps and the last never trained; A = (r - mean) / unbiased deviation of the
group; no distance to the reference. Best-of-n (its video recipe keeps 8 of 24): after credit only the best and the
worst siblings of each group are trained.

Deviation: the code draws 60 % of the steps for each sample alone. Micro-batches here hold one step, so that they have
the rollout's shape, and a learner step's samples share the drawn steps. Siblings that are not trained save no forward
where they share a chunk with some that are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from learner.advantages import AdvantageStd, keep_best_and_worst
from learner.algorithms.base import LossSetting
from learner.algorithms.step_base import StepAlgorithm, StepAlgorithmConfig
from raylign.errors import ConfigError
from raylign.samplers import ImageSamplerConfig
from raylign.samplers.base import SdeSamplerConfig
from raylign.types import Advantage, RolloutGroup


class DanceGrpoConfig(StepAlgorithmConfig):
    """DanceGRPO with its setting for FLUX.1."""

    published_sampler: ClassVar[str] = "sampler.type = 'dance_sde'"

    type: Literal["dance_grpo"] = "dance_grpo"
    advantage_std: AdvantageStd = "group"
    """Divide by the deviation of each group, or of the whole step; per_reward: each reward by its own, then weigh."""
    advantage_eps: float = Field(default=1e-8, gt=0)
    """Added to the deviation that advantages are divided by."""
    advantage_unbiased: bool = True
    """Divide by the deviation with one degree of freedom less."""
    train_fraction: float = Field(default=0.6, gt=0, le=1)
    """Share of the steps that is trained, where num_train_steps is not given; rounded down, at least one."""
    train_best_worst: int | None = Field(default=None, ge=2, multiple_of=2)
    """Train this many siblings of each group: half of them the best, half the worst; all when not given."""

    def num_trained(self, num_trainable: int) -> int:
        return self.num_train_steps or max(1, int(self.train_fraction * num_trainable))

    def check_group_size(self, group_size: int) -> None:
        if self.train_best_worst is not None and self.train_best_worst > group_size:
            raise ConfigError(
                f"algorithm.train_best_worst = {self.train_best_worst} siblings cannot be chosen from groups of "
                f"{group_size}; lower it or raise group_size"
            )

    def check_sampler(self, sampler: ImageSamplerConfig) -> None:
        super().check_sampler(sampler)
        if isinstance(sampler, SdeSamplerConfig) and not sampler.shared_noise:
            raise ConfigError(
                f"{self.name} compares siblings that start from one noise; set sampler.shared_noise = true, or take "
                "algorithm.type = 'flow_grpo'"
            )


class DanceGrpo(StepAlgorithm):
    """See the module's docstring."""

    def __init__(self, config: DanceGrpoConfig, setting: LossSetting) -> None:
        super().__init__(config, setting)
        self._num_kept = config.train_best_worst

    def credit(self, groups: Sequence[RolloutGroup]) -> list[Advantage]:
        advantages = super().credit(groups)
        if self._num_kept is None:
            return advantages
        return [keep_best_and_worst(one, self._num_kept) for one in advantages]
