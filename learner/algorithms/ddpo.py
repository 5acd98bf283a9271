"""DDPO (2305.13301): PPO's clipped ratio, or REINFORCE, on every step of an ancestral chain; DPOK (2305.16381).

    ppo        L = max(-A rho, -A clip(rho, 1 ± eps))
    reinforce  L = -A log p(x' | x)                        both + beta KL

DPOK is `variant = "reinforce"` with `kl_weight` > 0 and `kl_space = "exact_gaussian"`: the gradient of
sum_t [-A log p_t + beta KL(p_t, pre-trained p_t)]. Sums over steps and latent dims are means here, in both terms alike:
beta keeps its meaning, and the learning rate differs. The published chain is DDIM's with eta = 1 under guidance 5 at 50
steps: sampler "gddim" (its default eta) on Stable Diffusion 1.5. Every step that has a density is trained; on flow
models raise the level next to 0 (`sampler.halve_last_level`), or the step to it, almost noiseless, drowns all others.

A = (r - mean) / (deviation + 1e-6) by prompt, from a prompt's group of this step if it has `min_count` scored siblings,
else from all samples of the step. Deviation: the code keeps each prompt's last 16 or 32 rewards over epochs, and falls
back likewise until it has 16. A group is as large a history, and all of it from one policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from learner.advantages import AdvantageStd, credit_groups
from learner.algorithms.base import LossSetting
from learner.algorithms.step_base import StepAlgorithm, StepAlgorithmConfig
from learner.losses import KlSpace
from learner.step_ratio import StepScores
from raylign.errors import ConfigError
from raylign.types import Advantage, RolloutGroup


class DdpoConfig(StepAlgorithmConfig):
    """DDPO with its setting for Stable Diffusion 1.5."""

    published_sampler: ClassVar[str] = "sampler.type = 'gddim'"

    type: Literal["ddpo"] = "ddpo"
    variant: Literal["ppo", "reinforce"] = "ppo"
    """ppo: the clipped ratio. reinforce: the score function, for one update per step; DPOK's."""
    advantage_std: AdvantageStd = "group"
    """Divide by the deviation of each group, or of the whole step; per_reward: each reward by its own, then weigh."""
    advantage_eps: float = Field(default=1e-6, gt=0)
    """Added to the deviation that advantages are divided by."""
    min_count: int = Field(default=16, ge=0)
    """Groups with fewer scored siblings are compared with the whole step: its mean, its deviation."""
    kl_space: KlSpace = "exact_gaussian"
    """How the distance to the reference is measured; DPOK's is the exact one."""

    @property
    def smallest_clip(self) -> float | None:
        return self.clip_range if self.variant == "ppo" else None

    def check_updates(self, max_staleness: int, num_updates: int) -> None:
        super().check_updates(max_staleness, num_updates)
        if self.variant == "reinforce" and max_staleness > 0 and self.staleness_correction == "clip":
            raise ConfigError(
                f"{self.name} with variant = 'reinforce' has no ratio to clip, so samples of max_staleness = "
                f"{max_staleness} would not be corrected; set algorithm.staleness_correction = 'decoupled'"
            )
        if self.variant == "reinforce" and num_updates > 1:
            raise ConfigError(
                f"{self.name} with variant = 'reinforce' weighs no sample by its ratio, so only the first of "
                f"{num_updates} updates per step is on policy; set learner.updates_per_step = 1 (and epochs_per_step), "
                "or variant = 'ppo'"
            )

    def num_usable(self, num_steps: int) -> int:
        """All of them."""
        return num_steps


class Ddpo(StepAlgorithm):
    """See the module's docstring."""

    def __init__(self, config: DdpoConfig, setting: LossSetting) -> None:
        super().__init__(config, setting)
        self.config: DdpoConfig = config

    def credit(self, groups: Sequence[RolloutGroup]) -> list[Advantage]:
        config = self.config
        return credit_groups(
            groups,
            config.advantage_std,
            config.adv_clip,
            config.advantage_eps,
            config.advantage_unbiased,
            config.min_count,
        )

    def policy_loss(self, scores: StepScores, adv_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss_N, ratio_N = super().policy_loss(scores, adv_N)
        if self.config.variant == "reinforce":
            loss_N = -adv_N * scores.learner_logprob_N
        return loss_N, ratio_N
