"""Flow-GRPO (2505.05470): PPO's clipped ratio on the steps of a stochastic sampler.

The learner re-scores the recorded transitions with the very function that drew them (`Sampler.transition`), under the
rollout's guidance and in the rollout's batch shapes, so that on policy the ratio is exactly 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

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
from learner.losses import KlSpace, clipped_policy_loss, norm_ratio, reference_kl
from learner.policies import PolicySet, Relative
from raylign.errors import ShapeError
from raylign.keys import generator
from raylign.samplers import Sampler, num_steps
from raylign.types import Advantage, Needs, RolloutGroup


class FlowGrpoConfig(ImageAlgorithmConfig):
    """Flow-GRPO with its Stable Diffusion 3.5 Medium setting (OCR and GenEval)."""

    type: Literal["flow_grpo"] = "flow_grpo"
    clip_range: float = Field(default=1e-4, gt=0, lt=1)
    """Ratios beyond 1 ± this get no gradient in the advantage's direction; small, as log-probs are means over dims."""
    kl_weight: float = Field(default=0.04, ge=0)
    """Weight of the distance to the reference; .01 for PickScore in the paper."""
    kl_space: KlSpace = "mean_over_std2_no_dt"
    """How that distance is measured; weights are not transferable between spaces."""
    num_train_steps: int | None = Field(default=None, ge=1)
    """Sampler steps trained, out of the first int(.99 num_steps); all of those when not given, else a random subset
    drawn anew each learner step and shared by all samples."""

    @property
    def needs(self) -> Needs:
        return Needs.STEPS | Needs.LOGPROBS | Needs.CHUNKS | (Needs.REFERENCE if self.kl_weight > 0 else Needs(0))

    @property
    def smallest_clip(self) -> float | None:
        return self.clip_range


class FlowGrpo:
    """See the module's docstring."""

    def __init__(self, config: FlowGrpoConfig, setting: LossSetting) -> None:
        self.config = config
        sampler: Sampler = setting.sampler
        self._sampler = sampler
        self._guidance_scale = setting.guidance_scale
        # The paper's code drops the last step: its density is too narrow for a ratio to mean anything.
        self._usable_steps = usable_steps(num_steps(sampler))
        asked = config.num_train_steps or self._usable_steps
        self._num_train = check_count(asked, self._usable_steps, "algorithm.num_train_steps")
        self.metrics: tuple[str, ...] = ("loss/policy", "ratio/mean", "ratio/deviation_max", "ratio/clip_fraction")
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
        """The same steps for every sample, in order, so that a micro-batch holds one step."""
        order = torch.randperm(self._usable_steps, generator=generator(run_seed, "train_steps", step))
        chosen = order[: self._num_train].sort().values
        return chosen.expand(group.group_size, -1)

    def shares(self, group: RolloutGroup) -> torch.Tensor:
        """Every item counts alike."""
        return torch.full((group.group_size,), float(self._num_train))

    def loss(self, policies: PolicySet, batch: MicroBatch) -> ItemLosses:
        if batch.states_NS1CHW is None or batch.rollout_logprob_NS is None:
            raise ShapeError(
                "flow_grpo needs recorded states and log-probs; its rollouts must record STEPS and LOGPROBS"
            )
        config, step, guidance = self.config, batch.only_step(), self._guidance_scale
        # Contiguous, as the rollout had them: another memory layout may round differently.
        state = batch.states_NS1CHW[:, step].contiguous()
        next_state = batch.states_NS1CHW[:, step + 1].contiguous()
        sigmas = self._sampler.sigmas_S1
        sigma_N = sigmas[step].to(state.device).expand(len(state)).contiguous()
        ref = None
        if config.kl_weight > 0:
            ref = policies.velocity_of("reference", state, sigma_N, batch.conditioning, guidance)
        velocity = policies.velocity(state, sigma_N, batch.conditioning, guidance)
        transition = self._sampler.transition(velocity, state, step)
        learner_logprob_N = transition.logprob(next_state)
        rollout_logprob_N = batch.rollout_logprob_NS[:, step]
        policy_N, ratio_N = clipped_policy_loss(learner_logprob_N, rollout_logprob_N, batch.adv_N, config.clip_range)
        deviation_N = (ratio_N - 1).abs()
        metrics = {
            "loss/policy": policy_N,
            "ratio/mean": ratio_N,
            "ratio/deviation_max": deviation_N,
            "ratio/clip_fraction": (deviation_N > config.clip_range).float(),
        }
        loss_N = policy_N
        if ref is not None:
            ref_mean = self._sampler.transition(ref, state, step).mean_BCHW
            delta = float(sigmas[step + 1] - sigmas[step])
            kl_N = reference_kl(config.kl_space, transition.mean_BCHW, ref_mean, transition.std_B, velocity, ref, delta)
            loss_N = policy_N + config.kl_weight * kl_N
            metrics |= {"loss/kl": kl_N, "velocity/norm_ratio": norm_ratio(velocity, ref)}
        return ItemLosses(loss_N, {name: value.detach() for name, value in metrics.items()})

    def decay(self, relative: Relative, num_optimiser_steps: int, step: int) -> float:
        return 1.0
