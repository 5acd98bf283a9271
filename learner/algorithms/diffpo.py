"""DiFFPO (2510.02212): policy gradients of a two-stage mean-field surrogate, corrected for the true sampler.

    tau ~ U{0..T-1} per response, T the steps that wrote it;  s(k) the step that revealed token k
    log pi^(o_k) = log p(o_k | c, all masked)            if s(k) <= tau
                   log p(o_k | c, canvas after step tau)  otherwise
    w_k = min(C, pi^_rollout(o_k) / pi_rollout(o_k | c, canvas at step s(k)))           without gradient
    rho_k = pi^(o_k) / pi^_rollout(o_k)
    L = mean over responses of 1/|o| sum over k of [ -w_k min(rho_k A, clip(rho_k) A) + beta KL_k ]

Two forwards per response and update. tau is drawn anew in each pass over the step's samples and shared by all
policies. The denominator of w is the log-prob recorded when the token was revealed, under the bare policy: surrogate
and behaviour then mean the same temperature (1), whatever the rollouts' temperature, top-p or guidance.

Together with `sampler.budget = "learned"` the entropy budget of each prompt is trained jointly (token_base).

The paper's code is not released and its hyperparameters are not stated where we could read them, so every number
below is ours, as are counting tokens up to the first end token and the whole form of the budget's loss. On our toy
tasks the weights make learning slower and less stable: tokens that the surrogate finds unlikely get a weight near 0,
and the update mostly sharpens. They are the paper's objective and therefore on by default; watch "is/ess", and set
`importance_weights = false` to compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field

from learner.advantages import SampleStd
from learner.algorithms.base import LossSetting
from learner.algorithms.token_base import RATIO_METRICS, TokenAlgorithm, TokenAlgorithmConfig, ratio_metrics
from learner.batching import TokenBatch
from learner.noising import NoisedCanvas, Scorer, item_generators
from learner.token_losses import (
    clipped_ratio_loss,
    effective_sample_share,
    importance_weights,
    kl_penalty,
    masked_mean,
)
from learner.trajectory_canvases import last_steps, two_stage_canvases


class DiffpoConfig(TokenAlgorithmConfig):
    """DiFFPO's model part; all values are ours, tested on small models."""

    type: Literal["diffpo"] = "diffpo"
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """Ratios beyond 1 ± this get no gradient in the advantage's direction (ours)."""
    importance_weights: bool = True
    """Weigh tokens by surrogate / behaviour; false sets every weight to 1."""
    importance_cap: float = Field(default=2.0, gt=0)
    """C, the largest weight (ours)."""
    advantage_std: SampleStd = "sample"
    """Divide the advantage by the group's deviation (ours)."""


class Diffpo(TokenAlgorithm):
    """See the module's docstring."""

    policy_metrics: ClassVar[tuple[str, ...]] = (*RATIO_METRICS, "is/mean", "is/ess")

    def __init__(self, config: DiffpoConfig, setting: LossSetting) -> None:
        super().__init__(config, setting)
        self.config: DiffpoConfig = config

    def policy_loss(self, scorer: Scorer, batch: TokenBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        config, counted_NL = self.config, scorer.counted_NL
        early, late = draw_two_stages(batch, counted_NL)
        # A position belongs to one of the canvases, and a score is 0 where it was not asked for.
        scores = self.scores(scorer, lambda ask: ask(early) + ask(late))
        weights_NL = torch.ones_like(scores.rollout)
        if config.importance_weights:
            weights_NL = importance_weights(scores.rollout, batch.tokens.plain_logprob_GL, config.importance_cap)
        clip = config.clip_range
        policy_NL, ratio_NL = clipped_ratio_loss(scores.learner, scores.rollout, batch.adv_N[:, None], clip, clip)
        loss_N = masked_mean(weights_NL * policy_NL, counted_NL)
        metrics = {
            "loss/policy": loss_N,
            **ratio_metrics(ratio_NL, clip, clip, counted_NL),
            "is/mean": masked_mean(weights_NL, counted_NL),
            "is/ess": effective_sample_share(weights_NL, counted_NL),
        }
        if scores.ref is None:
            return loss_N, metrics
        kl_NL = kl_penalty(scores.learner, scores.ref, config.kl_estimator)
        return self.with_kl(loss_N, metrics, masked_mean(kl_NL, counted_NL))


def draw_two_stages(batch: TokenBatch, counted_NL: torch.Tensor) -> tuple[NoisedCanvas, NoisedCanvas]:
    """The two canvases of each row, at a tau from its "two_stage" key and the epoch."""
    reveal_step_NL = batch.tokens.reveal_step_GL
    draws = item_generators(batch, "two_stage", with_item=False)
    last = last_steps(reveal_step_NL, counted_NL).tolist()
    tau = [int(torch.randint(step + 1, (), generator=draw)) for step, draw in zip(last, draws, strict=True)]
    return two_stage_canvases(reveal_step_NL, counted_NL, torch.tensor(tau))
