"""Scoring along the recorded trajectory: TraceRL (2509.06949) and CJ-GRPO (2509.23924).

    merge the steps of a response `merge_steps` at a time;  for each merged step g
    canvas z_g: what was revealed before g is shown, the rest is masked;  M_g: the positions that g revealed
    l_g = mean over k in M_g of [ -min(rho_k A, clip(rho_k) A) + beta KL_k ],  rho_k at z_g

With `merge_steps = 1` each token is scored exactly as it was drawn, and the sum of the log-probs is the rollout's. A
merged step is one item with a backward pass of its own, so memory does not grow with their number.

The defaults are TraceRL's for full attention (its `shrink` is 8): mean over all scored canvases of the update, KL to
the policy of the step's beginning. CJ-GRPO is

    merge_steps = 1, normaliser = "steps", clip_range = 0.5, advantage_std = "none",
    kl_to = "reference", kl_weight = 0.04

Deviations: tokens after the first end token are not trained (TraceRL trains up to four of them; CJ-GRPO all), steps
that revealed only such tokens count nowhere, and the KL is averaged like the policy's term (TraceRL's code sums it
over a canvas). Attention is full: block models' rows of [clean | noisy] copies, which TraceRL trains at once, are not
built. TraceRL's value model is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field

from learner.advantages import SampleStd
from learner.algorithms.base import LossSetting
from learner.algorithms.token_base import RATIO_METRICS, Scores, TokenAlgorithm, TokenAlgorithmConfig, ratio_metrics
from learner.batching import ABSENT, TokenBatch
from learner.noising import Estimator, Scorer
from learner.token_losses import clipped_ratio_loss, kl_penalty, masked_mean, masked_sum
from learner.trajectory_canvases import merged_steps, step_canvas
from raylign.models.tokens import response_mask
from raylign.types import Needs, RolloutGroup


class TrajectoryConfig(TokenAlgorithmConfig):
    """TraceRL's setting for LLaDA; the module's docstring has CJ-GRPO's."""

    type: Literal["trajectory"] = "trajectory"
    merge_steps: int = Field(default=8, ge=1)
    """Denoising steps scored by one forward; 1 scores every token on the canvas it was drawn on."""
    normaliser: Literal["canvases", "steps", "tokens"] = "canvases"
    """What is averaged: all scored canvases of the update alike; each response's merged steps; its tokens."""
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """Ratios beyond 1 ± this get no gradient in the advantage's direction."""
    kl_weight: float = Field(default=0.01, ge=0)
    """Weight of the distance to the policy that `kl_to` names."""
    kl_to: Literal["rollout", "reference"] = "rollout"
    """Which policy to stay near: that of the step's beginning, or the reference."""
    advantage_std: SampleStd = "population"
    """Divide by the group's deviation."""

    @property
    def needs(self) -> Needs:
        """The reference is kept only if the KL is to it."""
        kept = Needs.REFERENCE if self.kl_weight > 0 and self.kl_to == "reference" else Needs(0)
        return Needs.FINAL | Needs.OLD | kept


class Trajectory(TokenAlgorithm):
    """See the module's docstring."""

    policy_metrics: ClassVar[tuple[str, ...]] = RATIO_METRICS

    def __init__(self, config: TrajectoryConfig, setting: LossSetting) -> None:
        super().__init__(config, setting)
        self.config: TrajectoryConfig = config

    def items(self, group: RolloutGroup, run_seed: int, step: int) -> torch.Tensor:
        """The merged steps of each response, (G, K) for the K that a canvas can have; ABSENT where there are fewer."""
        most = math.ceil(group.tokens.tokens_GL.shape[1] / self.config.merge_steps)
        item_GK = torch.arange(most).expand(group.group_size, -1)
        return torch.where(item_GK < self._num_merged(group)[:, None], item_GK, ABSENT)

    def shares(self, group: RolloutGroup) -> torch.Tensor:
        """A response counts its scored canvases, or 1."""
        if self.config.normaliser == "canvases":
            return self._num_merged(group).float()
        return torch.ones(group.group_size)

    def policy_loss(self, scorer: Scorer, batch: TokenBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        config, clip = self.config, self.config.clip_range
        reveal_step_NL = batch.tokens.reveal_step_GL
        merged_NL = merged_steps(reveal_step_NL, scorer.counted_NL, config.merge_steps)
        canvas = step_canvas(reveal_step_NL, merged_NL, batch.item_N)
        scores = self.scores(scorer, lambda ask: ask(canvas))
        policy_NL, ratio_NL = clipped_ratio_loss(scores.learner, scores.rollout, batch.adv_N[:, None], clip, clip)
        loss_N = self._average(policy_NL, canvas.selected_NL, merged_NL)
        metrics = {"loss/policy": loss_N, **ratio_metrics(ratio_NL, clip, clip, canvas.selected_NL)}
        if scores.ref is None:
            return loss_N, metrics
        kl_NL = kl_penalty(scores.learner, scores.ref, config.kl_estimator)
        return self.with_kl(loss_N, metrics, self._average(kl_NL, canvas.selected_NL, merged_NL))

    def scores(self, scorer: Scorer, estimator: Estimator) -> Scores:
        """With the KL to the policy of the step's beginning, that is the one to stay near."""
        if self.config.kl_weight == 0 or self.config.kl_to == "reference":
            return super().scores(scorer, estimator)
        learner, rollout = scorer.both(estimator)
        return Scores(learner, rollout, rollout)

    def _average(self, values_NL: torch.Tensor, selected_NL: torch.Tensor, merged_NL: torch.Tensor) -> torch.Tensor:
        """One item's part of the objective, (N,): items are summed, and divided by the summed `shares`."""
        if self.config.normaliser == "tokens":
            return masked_sum(values_NL, selected_NL) / (merged_NL != ABSENT).sum(dim=1)
        mean_N = masked_mean(values_NL, selected_NL)
        return mean_N / (merged_NL.amax(dim=1) + 1) if self.config.normaliser == "steps" else mean_N

    def _num_merged(self, group: RolloutGroup) -> torch.Tensor:
        """ceil(S / merge_steps) of each response, S the steps that revealed a counted token, (G,) int64."""
        tokens = group.tokens
        counted_GL = response_mask(tokens.tokens_GL, self.vocabulary.eos_id)
        return merged_steps(tokens.reveal_step_GL, counted_GL, self.config.merge_steps).amax(dim=1) + 1
