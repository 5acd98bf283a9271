"""Advantage-weighted matching (2509.25050): flow matching on the policy's own samples, weighted by their advantage.

    l = mean (v - v*)²,  logp = -w(l, t)        pseudo log-prob, `learner.forward_losses.awm_logprob`
    rho = exp(logp - logp of the step's beginning),  A = adv_max clip(A, ±adv_clip) / adv_clip
    L = max(-A rho, -A clip(rho, 1 ± clip_range)) + kl_weight mean (v - v_ref)² + old_weight mean (v - v_old)²

With one update per step rho is 1, the gradient A times that of w(l, t), and v is pushed away from bad samples without
bound: what stops it is the penalty towards a slow copy. It does where its pull outgrows the push: always for "huber"
and "ghuber", which flatten; for the others, as quadratic as the penalty, where |A| w < old_weight. A configuration
without both clip and penalty is refused.

The released setting rolls out with a stochastic SA-Solver, 14 steps. Deviations: levels are drawn per prompt, not per
device batch, so that nothing depends on the cut; the penalty also counts where kl_weight is 0; log-probs are not summed
over levels before the ratio (`sum_first`, which differs only once rho leaves 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from learner.algorithms.base import LossSetting
from learner.algorithms.forward_base import ForwardAlgorithm, ForwardConfig, Noised
from learner.batching import MicroBatch
from learner.decay import Decay, DecaySchedule
from learner.forward_losses import AwmWeighting, awm_logprob, denoising_error
from learner.losses import clipped_policy_loss, velocity_mse
from learner.noise_levels import TrainTimes
from learner.policies import PolicySet, Relative
from raylign.types import Needs


class AwmConfig(ForwardConfig):
    """AWM with its released setting for Stable Diffusion 3.5 Medium (OCR)."""

    type: Literal["awm"] = "awm"
    weighting: AwmWeighting = "ghuber"
    """What a velocity error is worth as a log-prob."""
    ghuber_power: float = Field(default=0.25, gt=0, le=1)
    """p of "ghuber"."""
    adv_max: float = Field(default=1.0, gt=0)
    """Size that an advantage of `adv_clip` is scaled to."""
    clip_range: float | None = Field(default=1.0, gt=0)
    """Ratios beyond 1 ± this get no gradient in the advantage's direction; never reached with one update per step."""
    ratio_to: Literal["step_start", "old"] = "step_start"
    """Whom the ratio compares with: the policy of the step's beginning, or the slow copy (the code's `off_policy`)."""
    num_train_times: int | None = Field(default=6, ge=1)
    """Noise levels trained per sample."""
    times: TrainTimes = TrainTimes(draw="stratified", fraction=0.9, with_first=False)
    """Which levels; with the first one for PickScore in the paper's code."""
    kl_weight: float = Field(default=0.003, ge=0)
    """Weight of mean (v - v_ref)²; 1e-4 for PickScore."""
    old_weight: float = Field(default=1.0, ge=0)
    """Weight of mean (v - v_old)² towards the slow copy."""
    old_decay: Decay = DecaySchedule(end=0.3)
    """How slowly that copy follows: min(.001 s, .3)."""

    @model_validator(mode="after")
    def _refuse_to_be_unbounded(self) -> AwmConfig:
        if self.clip_range is None and self.old_weight == 0:
            raise ValueError(
                "clip_range is off and old_weight 0: nothing bounds how far bad samples push; give one of them"
            )
        return self

    @property
    def uses_old(self) -> bool:
        """Whether the slow copy is asked."""
        return self.old_weight > 0 or self.ratio_to == "old"

    @property
    def needs(self) -> Needs:
        start = Needs.SAMPLING if self.ratio_to == "step_start" else Needs(0)
        return super().needs | start | (Needs.OLD if self.uses_old else Needs(0))

    @property
    def smallest_clip(self) -> float | None:
        return self.clip_range


class Awm(ForwardAlgorithm):
    """See the module's docstring. The policy of the step's beginning is the relative "sampling"."""

    policy_metrics: ClassVar[tuple[str, ...]] = ("velocity/error", "ratio/mean", "ratio/deviation_max")

    def __init__(self, config: AwmConfig, setting: LossSetting) -> None:
        super().__init__(config, setting)
        self.config: AwmConfig = config
        if config.uses_old:
            self.metrics += ("velocity/old_gap",)

    def policy_loss(
        self, policies: PolicySet, batch: MicroBatch, noised: Noised
    ) -> tuple[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]]:
        config = self.config
        old = policies.velocity_of("old", *noised.question) if config.uses_old else None
        before = old
        if config.ratio_to == "step_start":
            before = None if batch.on_policy else policies.velocity_of("sampling", *noised.question)
        velocity = policies.velocity(*noised.question)
        error_N, logprob_N = self._logprob(velocity, noised)
        before_N = logprob_N if before is None else self._logprob(before, noised)[1]
        adv_N = config.adv_max * batch.adv_N / config.adv_clip
        clip = torch.inf if config.clip_range is None else config.clip_range
        policy_N, ratio_N = clipped_policy_loss(logprob_N, before_N, adv_N, clip)
        metrics = {
            "loss/policy": policy_N,
            "velocity/error": error_N,
            "ratio/mean": ratio_N,
            "ratio/deviation_max": (ratio_N - 1).abs(),
        }
        loss_N = policy_N
        if old is not None:
            gap_N = velocity_mse(velocity, old)
            loss_N = policy_N + config.old_weight * gap_N
            metrics["velocity/old_gap"] = gap_N
        return loss_N, velocity, metrics

    def decay(self, relative: Relative, num_optimiser_steps: int, step: int) -> float:
        if relative == "old":
            return self.config.old_decay.at(num_optimiser_steps)
        return 0.0 if relative == "sampling" else 1.0

    def _logprob(self, velocity: torch.Tensor, noised: Noised) -> tuple[torch.Tensor, torch.Tensor]:
        error_N = denoising_error(velocity, noised.target_NCHW, adaptive=False)
        return error_N, awm_logprob(error_N, noised.sigma_N, self.config.weighting, self.config.ghuber_power)
