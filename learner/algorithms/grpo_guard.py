"""GRPO-Guard (2510.22319): Flow-GRPO with ratios that are centred at 1 and spread alike at every step.

Means of Gaussians that moved by m lower the log-ratio by m² / (2 std²) on average: more at late steps, whose std is
small, so that a clip range holds back one side only. With mu_old the mean under the rollout policy:

    bias = mean_d (mu - mu_old)² / (2 std²)      rho = exp((log p - log p_old + bias) std)
    L = max(-A rho, -A clip(rho, 1 ± eps)) / -dt

std = S_t sqrt(-dt) is the noise that the step adds. The code takes batch means of both factors, here all samples of a
micro-batch are at one step, so they are the same numbers.

Deviation: the code stores mu_old of every step, as large as the states. Here mu_old is what the policy of the learner
step's beginning says: one more forward per trained step, without gradient, from a learner step's second update on. At
`max_staleness` 0 that is the rollouts' policy; above it, `staleness_correction = "decoupled"` takes the ratio to that
policy as well, and nothing else will do.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from learner.algorithms.step_base import StepAlgorithm, StepAlgorithmConfig
from learner.losses import guarded_policy_loss
from learner.step_ratio import StepScores
from raylign.errors import ConfigError
from raylign.samplers import ImageSamplerConfig
from raylign.samplers.cps import CpsConfig
from raylign.types import Needs


class GrpoGuardConfig(StepAlgorithmConfig):
    """GRPO-Guard with its released clip range."""

    type: Literal["grpo_guard"] = "grpo_guard"
    clip_range: float = Field(default=2e-6, gt=0, lt=1)
    """Ratios beyond 1 ± this get no gradient in the advantage's direction; of the normalised ratio, so smaller."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the distance to the reference; Flow-GRPO's does not transfer, as the policy loss is scaled."""

    @property
    def needs(self) -> Needs:
        return super().needs | Needs.OLD

    def check_updates(self, max_staleness: int, num_updates: int) -> None:
        if max_staleness > 0 and self.staleness_correction != "decoupled":
            raise ConfigError(
                f"{self.name} removes the bias of moving away from the policy of the learner step's beginning, and "
                f"with max_staleness = {max_staleness} samples are older policies'; set it to 0, or "
                "algorithm.staleness_correction = 'decoupled', or take algorithm.type = 'flow_grpo'"
            )

    def check_sampler(self, sampler: ImageSamplerConfig) -> None:
        super().check_sampler(sampler)
        if isinstance(sampler, CpsConfig) and sampler.density == "squared":
            raise ConfigError(
                f"{self.name} removes the mean of a Gaussian's log-ratio, and sampler 'cps' scores with the squared "
                "distance alone; set sampler.density = 'gaussian'"
            )


class GrpoGuard(StepAlgorithm):
    """See the module's docstring."""

    def policy_loss(self, scores: StepScores, adv_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return guarded_policy_loss(
            scores.learner_logprob_N,
            self.denominator(scores),
            adv_N,
            self.config.clip_range,
            scores.drift(),
            scores.learner.transition.std_B,
            scores.delta_sigma,
        )
