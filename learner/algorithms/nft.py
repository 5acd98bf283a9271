"""DiffusionNFT (2509.16117): contrast the policy with its old self on the forward process; no likelihoods.

Each final sample x0 is noised again, x_t = (1 - t) x0 + t eps, at times of the sampler's own grid. Good samples pull
v towards x0, bad ones push its reflection about v_old there; see `learner.forward_losses.nft_loss`. Trained without
guidance whatever the rollouts used, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from learner.advantages import credit_groups, r_from_advantage
from learner.algorithms.base import (
    ImageAlgorithmConfig,
    ItemLosses,
    LossSetting,
    RolloutPolicy,
    check_count,
    usable_steps,
)
from learner.batching import MicroBatch
from learner.forward_losses import nft_loss
from learner.losses import norm_ratio, velocity_mse
from learner.policies import PolicySet, Relative
from raylign.config import Config
from raylign.keys import generator, normal
from raylign.samplers import Sampler, num_steps
from raylign.types import Advantage, Needs, RolloutGroup


class OldDecay(Config):
    """Decay d of the old policy after s optimiser steps: min(start_value + (s - start) * slope, end).

    The defaults are the paper's for GenEval and multi-reward, min(.001 s, .5); its OCR runs use start 75,
    slope .0075, end .999.
    """

    start: int = Field(default=0, ge=0)
    """Optimiser steps before d starts to rise; until then it is start_value."""
    start_value: float = Field(default=0.0, ge=0, le=1)
    """d at the start; 0 copies the policy, which is fully on-policy."""
    slope: float = Field(default=0.001, ge=0)
    """Rise of d per optimiser step."""
    end: float = Field(default=0.5, ge=0, le=1)
    """Highest d."""

    def at(self, num_optimiser_steps: int) -> float:
        return min(self.start_value + max(0, num_optimiser_steps - self.start) * self.slope, self.end)


class NftConfig(ImageAlgorithmConfig):
    """DiffusionNFT with its released single-reward setting."""

    type: Literal["nft"] = "nft"
    beta: float = Field(default=1.0, gt=0)
    """How far v± lie from v_old; .1 for OCR and multi-reward in the paper."""
    adv_clip: float = Field(default=5.0, gt=0)
    """Advantages of this size become r = 0 or 1; also the policy loss's factor. Smaller is sharper."""
    num_train_times: int | None = Field(default=None, ge=1)
    """Noise levels trained per sample, drawn from the sampler's; int(.99 num_steps) when not given."""
    kl_weight: float = Field(default=1e-4, ge=0)
    """Weight of mean (v - v_ref)²."""
    old_decay: OldDecay = OldDecay()
    """How slowly the old policy, which also makes the rollouts, follows."""

    @property
    def needs(self) -> Needs:
        return Needs.FINAL | Needs.OLD | (Needs.REFERENCE if self.kl_weight > 0 else Needs(0))

    @property
    def rollout_policy(self) -> RolloutPolicy:
        return "old"

    @property
    def guidance_free(self) -> bool:
        return True


class Nft:
    """See the module's docstring."""

    def __init__(self, config: NftConfig, setting: LossSetting) -> None:
        self.config = config
        sampler: Sampler = setting.sampler
        self._sigmas_S1 = sampler.sigmas_S1
        asked = config.num_train_times or usable_steps(num_steps(sampler))
        self._num_times = check_count(asked, num_steps(sampler), "algorithm.num_train_times")
        self.metrics: tuple[str, ...] = ("loss/policy", "velocity/old_gap", "r/mean")
        if Needs.REFERENCE in config.needs:
            self.metrics += ("loss/kl", "velocity/norm_ratio")

    @property
    def needs(self) -> Needs:
        return self.config.needs

    @property
    def rollout_policy(self) -> RolloutPolicy:
        return self.config.rollout_policy

    def credit(self, groups: Sequence[RolloutGroup]) -> list[Advantage]:
        return credit_groups(groups, self.config.advantage_std, self.config.adv_clip)

    def items(self, group: RolloutGroup, run_seed: int, step: int) -> torch.Tensor:
        """The first levels of a random permutation of the sampler's, each sample its own."""
        num_levels = len(self._sigmas_S1) - 1
        draws = [generator(*rollout.key, "train_times") for rollout in group.rollouts]
        orders = [torch.randperm(num_levels, generator=draw) for draw in draws]
        return torch.stack([order[: self._num_times] for order in orders])

    def shares(self, group: RolloutGroup) -> torch.Tensor:
        """Every item counts alike."""
        return torch.full((group.group_size,), float(self._num_times))

    def loss(self, policies: PolicySet, batch: MicroBatch) -> ItemLosses:
        config, x0, conditioning = self.config, batch.final_NCHW, batch.conditioning
        sigma_N = self._sigmas_S1[batch.item_N].to(x0.device)
        noise = normal(train_noise_generators(batch), x0.shape[1:]).to(x0.device)
        t = sigma_N.view(-1, 1, 1, 1)
        state = (1 - t) * x0 + t * noise
        old = policies.velocity_of("old", state, sigma_N, conditioning)
        ref = policies.velocity_of("reference", state, sigma_N, conditioning) if config.kl_weight > 0 else None
        velocity = policies.velocity(state, sigma_N, conditioning)
        r_N = r_from_advantage(batch.adv_N, config.adv_clip)
        policy_N = config.adv_clip * nft_loss(velocity, old, state, x0, sigma_N, r_N, config.beta)
        metrics = {"loss/policy": policy_N, "velocity/old_gap": velocity_mse(velocity, old), "r/mean": r_N}
        loss_N = policy_N
        if ref is not None:
            kl_N = velocity_mse(velocity, ref)
            loss_N = policy_N + config.kl_weight * kl_N
            metrics |= {"loss/kl": kl_N, "velocity/norm_ratio": norm_ratio(velocity, ref)}
        return ItemLosses(loss_N, {name: value.detach() for name, value in metrics.items()})

    def decay(self, relative: Relative, num_optimiser_steps: int, step: int) -> float:
        return self.config.old_decay.at(num_optimiser_steps) if relative == "old" else 1.0


def train_noise_generators(batch: MicroBatch) -> list[torch.Generator]:
    """Fresh noise for each item, keyed by its sample and level, so that no cut of the batch changes it."""
    steps = batch.item_N.tolist()
    return [generator(*key, "train_noise", int(step)) for key, step in zip(batch.keys, steps, strict=True)]
