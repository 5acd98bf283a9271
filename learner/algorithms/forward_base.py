"""What the forward-process methods share (DiffusionNFT, AWM, CRD): noising, credit, levels, no guidance.

Each final sample x0 is noised again, x_t = (1 - t) x0 + t eps, and every policy the loss compares is asked the same
question there: same sample, same noise, same level. No likelihood, no trajectory, so any sampler will do; without
guidance, in training and (as their authors find best) in rollouts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field

from learner.advantages import credit_groups
from learner.algorithms.base import (
    ImageAlgorithmConfig,
    ItemLosses,
    LossSetting,
    RolloutPolicy,
    check_count,
    usable_steps,
)
from learner.batching import MicroBatch
from learner.losses import norm_ratio, velocity_mse
from learner.noise_levels import NoiseLevels, TrainTimes
from learner.policies import PolicySet, Relative
from raylign.keys import generator, normal
from raylign.models.base import Conditioning
from raylign.samplers import ImageSamplerConfig, num_steps
from raylign.types import Advantage, Needs, RolloutGroup


class ForwardConfig(ImageAlgorithmConfig):
    """Keys that every forward-process method has; each sets its paper's defaults."""

    num_train_times: int | None = Field(default=None, ge=1)
    """Noise levels trained per sample; int(.99 of those to draw from) when not given."""
    times: TrainTimes = TrainTimes()
    """Which levels."""
    kl_weight: float = Field(default=1e-4, ge=0)
    """Weight of mean (v - v_ref)²; 0 needs no reference."""

    @property
    def needs(self) -> Needs:
        return Needs.FINAL | (Needs.REFERENCE if self.kl_weight > 0 else Needs(0))

    @property
    def guidance_free(self) -> bool:
        return True

    def num_times(self, num_steps: int) -> int:
        """Levels trained per sample, beside a sampler of so many steps. Raises ConfigError if there are fewer."""
        available = len(self.times.places(num_steps))
        return check_count(self.num_train_times or usable_steps(available), available, "algorithm.num_train_times")

    def check_sampler(self, sampler: ImageSamplerConfig) -> None:
        self.num_times(sampler.num_steps)


class Noised(NamedTuple):
    """What all policies are asked about a micro-batch, and v* = eps - x0."""

    state_NCHW: torch.Tensor
    sigma_N: torch.Tensor
    conditioning: Conditioning
    target_NCHW: torch.Tensor

    @property
    def question(self) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
        return self.state_NCHW, self.sigma_N, self.conditioning


class ForwardAlgorithm(ABC):
    """See the module. A subclass gives `policy_loss`, `policy_metrics` and `decay`."""

    policy_metrics: ClassVar[tuple[str, ...]] = ()
    """Names that `policy_loss` reports beside "loss/policy": always all of them."""
    shares_levels: ClassVar[bool] = True
    """Whether siblings are trained at the same levels."""

    def __init__(self, config: ForwardConfig, setting: LossSetting) -> None:
        self.config = config
        self.levels = NoiseLevels(config.times, setting.sampler)
        self._num_times = config.num_times(num_steps(setting.sampler))
        self.metrics: tuple[str, ...] = ("loss/policy", *self.policy_metrics)
        if config.kl_weight > 0:
            self.metrics += ("loss/kl", "velocity/norm_ratio")

    @abstractmethod
    def policy_loss(
        self, policies: PolicySet, batch: MicroBatch, noised: Noised
    ) -> tuple[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]]:
        """The loss of each item but for its KL (N,), the policy's velocity, and the metrics, all with gradient."""

    @abstractmethod
    def decay(self, relative: Relative, num_optimiser_steps: int, step: int) -> float:
        """How slowly each relative follows."""

    def reference(self, policies: PolicySet, noised: Noised) -> torch.Tensor:
        """What the KL keeps the velocity near to, (N, C, H, W)."""
        return policies.velocity_of("reference", *noised.question)

    def kl_weight(self, batch: MicroBatch) -> torch.Tensor | float:
        """What each item's KL counts."""
        return self.config.kl_weight

    @property
    def needs(self) -> Needs:
        return self.config.needs

    @property
    def rollout_policy(self) -> RolloutPolicy:
        return self.config.rollout_policy

    def credit(self, groups: Sequence[RolloutGroup]) -> list[Advantage]:
        return credit_groups(groups, self.config.advantage_std, self.config.adv_clip)

    def items(self, group: RolloutGroup, run_seed: int, step: int) -> torch.Tensor:
        """Places in the table of levels, drawn for each sample or once for the group."""
        keys = [rollout.key for rollout in group.rollouts]
        if not self.shares_levels:
            return torch.stack([self.levels.draw(self._num_times, generator(*key, "train_times")) for key in keys])
        drawn = self.levels.draw(self._num_times, generator(*keys[0][:-1], "train_times"))
        return drawn.expand(group.group_size, -1)

    def shares(self, group: RolloutGroup) -> torch.Tensor:
        """Every item counts alike."""
        return torch.full((group.group_size,), float(self._num_times))

    def noised(self, batch: MicroBatch) -> Noised:
        """The samples at their levels, with noise keyed by sample, level and pass."""
        x0 = batch.final_NCHW
        sigma_N = self.levels.sigmas[batch.item_N].to(x0.device)
        noise = normal(noise_generators(batch), x0.shape[1:]).to(x0.device)
        t = sigma_N.view(-1, 1, 1, 1)
        return Noised((1 - t) * x0 + t * noise, sigma_N, batch.conditioning, noise - x0)

    def loss(self, policies: PolicySet, batch: MicroBatch) -> ItemLosses:
        noised = self.noised(batch)
        # Asked before the policy, whose graph reads the parameters.
        ref = self.reference(policies, noised) if self.config.kl_weight > 0 else None
        loss_N, velocity, policy_metrics = self.policy_loss(policies, batch, noised)
        metrics = dict(policy_metrics)
        if ref is not None:
            kl_N = velocity_mse(velocity, ref)
            loss_N = loss_N + self.kl_weight(batch) * kl_N
            metrics |= {"loss/kl": kl_N, "velocity/norm_ratio": norm_ratio(velocity, ref)}
        return ItemLosses(loss_N, {name: value.detach() for name, value in metrics.items()})


def noise_generators(batch: MicroBatch) -> list[torch.Generator]:
    """Fresh noise for each item of each pass, keyed by its sample and level, so that no cut of the batch changes it."""
    again = (batch.epoch,) if batch.epoch > 0 else ()
    levels = batch.item_N.tolist()
    return [generator(*key, "train_noise", level, *again) for key, level in zip(batch.keys, levels, strict=True)]
