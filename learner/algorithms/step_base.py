"""What the policy-gradient algorithms for pictures share: the steps they train, credit, and the frame of their loss.

An algorithm file holds its paper's configuration and, where it is not PPO's clipped ratio, its `policy_loss`; the steps
are scored by `learner.step_ratio`, the arithmetic is in `learner.losses` and `learner.advantages`.

Samples of an asynchronous run are older than the step's weights, theta_0. With mu the policy that drew them,

    "clip"       rho = pi / mu             L = max(-A rho, -A clip(rho, 1 ± eps))             PPO's, as on policy
    "decoupled"  rho = pi / pi_theta_0     L = min(cap, pi_theta_0 / mu) max(-A rho, …)       2110.00641, 2505.24298

The first corrects as much, but it clips about mu: steps that theta_0 left behind by more than eps have no gradient
from the start. The second clips about theta_0. At age 0 mu is theta_0, and they are one loss, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from learner.advantages import STD_EPS, credit_groups
from learner.ages import by_age, names_by_age
from learner.algorithms.base import (
    ImageAlgorithmConfig,
    ItemLosses,
    LossSetting,
    RolloutPolicy,
    check_count,
    usable_steps,
)
from learner.batching import MicroBatch
from learner.losses import KlSpace, clipped_policy_loss
from learner.policies import PolicySet, Relative
from learner.step_ratio import StepScores, draw_steps, score_step, trainable_steps
from raylign.errors import ConfigError
from raylign.samplers import ImageSamplerConfig, Sampler, num_steps
from raylign.samplers.base import SdeSamplerConfig
from raylign.samplers.dance_sde import DanceSdeConfig
from raylign.samplers.flow_sde import FlowSdeConfig
from raylign.samplers.gddim import GddimConfig
from raylign.samplers.window import window_starts
from raylign.types import Advantage, Needs, RolloutGroup


class StepAlgorithmConfig(ImageAlgorithmConfig):
    """Keys that every policy-gradient algorithm for pictures has; each sets its paper's defaults and adds `type`."""

    published_sampler: ClassVar[str] = "sampler.type = 'flow_sde'"
    """What refusals tell to set."""

    advantage_eps: float = Field(default=STD_EPS, gt=0)
    """Added to the deviation that advantages are divided by."""
    advantage_unbiased: bool = False
    """Divide by the deviation with one degree of freedom less."""
    clip_range: float = Field(default=1e-4, gt=0, lt=1)
    """Ratios beyond 1 ± this get no gradient in the advantage's direction; small, as log-probs are means over dims."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the distance to the reference; 0 needs no reference."""
    kl_space: KlSpace = "mean_over_std2_no_dt"
    """How that distance is measured; weights are not transferable between spaces."""
    num_train_steps: int | None = Field(default=None, ge=1)
    """Sampler steps trained, a random subset of those that can be, drawn anew each learner step and shared by all
    samples; all of them when not given."""
    staleness_correction: Literal["clip", "decoupled"] | None = None
    """What is done about samples that are older than the step's weights; must be said where max_staleness is above 0.
    clip: nothing beside the clipped ratio to the policy that drew them. decoupled: clip about the policy of the step's
    beginning, and weigh by its ratio to the one that drew them."""
    weight_cap: float = Field(default=2.0, ge=1)
    """Largest of those weights (truncated importance sampling)."""

    @property
    def name(self) -> str:
        """As refusals call it."""
        return f"algorithm {getattr(self, 'type', '')!r}"

    @property
    def needs(self) -> Needs:
        needs = Needs.STEPS | Needs.LOGPROBS | Needs.CHUNKS
        if self.staleness_correction == "decoupled":
            needs |= Needs.OLD
        return needs | Needs.REFERENCE if self.kl_weight > 0 else needs

    @property
    def smallest_clip(self) -> float | None:
        return self.clip_range

    def num_usable(self, num_steps: int) -> int:
        """How many of a sampler's steps may be trained: all but the last hundredth, whose density is too narrow for a
        ratio to mean anything."""
        return usable_steps(num_steps)

    def num_trained(self, num_trainable: int) -> int:
        """How many of the steps that can be trained in one learner step are."""
        return num_trainable if self.num_train_steps is None else self.num_train_steps

    def check_updates(self, max_staleness: int, num_updates: int) -> None:
        if max_staleness > 0 and self.staleness_correction is None:
            raise ConfigError(
                f"{self.name} weighs samples by policy ratios, and with max_staleness = {max_staleness} they come from "
                "policies up to that many versions old; set algorithm.staleness_correction = 'decoupled' (clips about "
                "the policy of the step's beginning) or 'clip' (about the one that drew them), or max_staleness = 0, "
                "or take a method that needs no ratio to them: algorithm.type = 'nft', 'awm' or 'crd'"
            )

    def check_sampler(self, sampler: ImageSamplerConfig) -> None:
        name, kind = (
            f"{kind} {getattr(one, 'type', '')!r}" for kind, one in (("algorithm", self), ("sampler", sampler))
        )
        if isinstance(sampler, GddimConfig) and not sampler.has_density:
            raise ConfigError(
                f"{name} scores each step's log-prob, which {kind} has for sampler.eta above 0 only; raise it"
            )
        if not sampler.has_density:
            raise ConfigError(
                f"{name} scores each step's log-prob, which the deterministic or multistep {kind} as configured does "
                f"not have; set {self.published_sampler} (other stochastic samplers serve too)"
            )
        per_time = isinstance(sampler, FlowSdeConfig | DanceSdeConfig)
        if self.kl_weight > 0 and self.kl_space == "mean_over_std2_no_dt" and not per_time:
            raise ConfigError(
                f"{name}: kl_space 'mean_over_std2_no_dt' divides by the noise per unit of time, and the noise of "
                f"{kind} is one of each step; set algorithm.kl_space = 'exact_gaussian' or 'velocity_mse', and choose "
                "kl_weight anew: it is not transferable"
            )
        self.check_trainable(sampler, [True] * sampler.num_steps)

    def check_trainable(self, sampler: ImageSamplerConfig, can_S: Sequence[bool]) -> None:
        """Raise ConfigError unless every place of the sampler's window leaves enough of the steps with a density."""
        usable = {step for step, can in enumerate(can_S[: self.num_usable(sampler.num_steps)]) if can}
        places = [usable]
        if isinstance(sampler, SdeSamplerConfig) and sampler.window is not None:
            size = sampler.window.size
            places = [usable & set(range(at, at + size)) for at in window_starts(sampler.window, sampler.num_steps)]
        fewest = min(len(steps) for steps in places)
        if fewest == 0:
            raise ConfigError(
                f"the sampler's window reaches places without a step that can be trained; of {sampler.num_steps} steps "
                f"(counted from 0) these can: {sorted(usable)}. Change sampler.window"
            )
        check_count(self.num_trained(fewest), fewest, "algorithm.num_train_steps")


class StepAlgorithm:
    """PPO's clipped ratio per recorded step; a subclass overrides what its paper does otherwise."""

    def __init__(self, config: StepAlgorithmConfig, setting: LossSetting) -> None:
        sampler: Sampler = setting.sampler
        config.check_sampler(sampler.config)
        config.check_trainable(sampler.config, sampler.stochastic_S)
        self.config = config
        self._sampler = sampler
        self._guidance_scale = setting.guidance_scale
        self._num_usable = config.num_usable(num_steps(sampler))
        self.metrics: tuple[str, ...] = ("loss/policy", "ratio/mean", "ratio/deviation_max", "ratio/clip_fraction")
        if config.kl_weight > 0:
            self.metrics += ("loss/kl", "velocity/norm_ratio")
        self._decoupled = config.staleness_correction == "decoupled"
        if config.staleness_correction is not None:
            self.metrics += ("behaviour/deviation", *names_by_age(("behaviour/deviation", "ratio/clip_fraction")))
        if self._decoupled:
            self.metrics += ("behaviour/weight", "behaviour/weight_max")

    @property
    def needs(self) -> Needs:
        return self.config.needs

    @property
    def rollout_policy(self) -> RolloutPolicy:
        return self.config.rollout_policy

    def credit(self, groups: Sequence[RolloutGroup]) -> list[Advantage]:
        config = self.config
        return credit_groups(
            groups, config.advantage_std, config.adv_clip, config.advantage_eps, config.advantage_unbiased
        )

    def items(self, group: RolloutGroup, run_seed: int, step: int) -> torch.Tensor:
        """The same steps for every sample, in order, so that a micro-batch holds one step."""
        trainable = self._trainable(group)
        return draw_steps(trainable, self.config.num_trained(len(trainable)), run_seed, step).expand(
            group.group_size, -1
        )

    def shares(self, group: RolloutGroup) -> torch.Tensor:
        """Every item counts alike."""
        return torch.full((group.group_size,), float(self.config.num_trained(len(self._trainable(group)))))

    def policy_loss(self, scores: StepScores, adv_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each item, with gradient, and the ratio it is made of: both (N,)."""
        return clipped_policy_loss(scores.learner_logprob_N, self.denominator(scores), adv_N, self.config.clip_range)

    def denominator(self, scores: StepScores) -> torch.Tensor:
        """The log-prob that the learner's is compared with, (N,)."""
        return scores.need_old_logprob() if self._decoupled else scores.rollout_logprob_N

    def loss(self, policies: PolicySet, batch: MicroBatch) -> ItemLosses:
        config = self.config
        scores = score_step(policies, batch, self._sampler, self._guidance_scale, config.needs)
        loss_N, ratio_N = self.policy_loss(scores, batch.adv_N)
        deviation_N = (ratio_N - 1).abs()
        metrics = {
            "loss/policy": loss_N,
            "ratio/mean": ratio_N,
            "ratio/deviation_max": deviation_N,
            "ratio/clip_fraction": (deviation_N > config.clip_range).float(),
        }
        if self._decoupled:
            weight_N = scores.age_weight(config.weight_cap)
            loss_N = weight_N * loss_N
            metrics |= {"loss/policy": loss_N, "behaviour/weight": weight_N, "behaviour/weight_max": weight_N}
        if config.staleness_correction is not None:
            metrics["behaviour/deviation"] = scores.away()
            told = {name: metrics[name].detach() for name in ("behaviour/deviation", "ratio/clip_fraction")}
            metrics |= by_age(told, batch.age_N)
        if config.kl_weight > 0:
            kl_N = scores.kl(config.kl_space)
            loss_N = loss_N + config.kl_weight * kl_N
            metrics |= {"loss/kl": kl_N, "velocity/norm_ratio": scores.norm_ratio()}
        return ItemLosses(loss_N, {name: value.detach() for name, value in metrics.items()})

    def decay(self, relative: Relative, num_optimiser_steps: int, step: int) -> float:
        """The reference is frozen; the old policy, where there is one, is that of the step's beginning."""
        return 0.0 if relative == "old" else 1.0

    def _trainable(self, group: RolloutGroup) -> list[int]:
        return trainable_steps(group.latents, self._sampler, self._num_usable)
