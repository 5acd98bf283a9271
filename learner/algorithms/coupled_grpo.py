"""Coupled-GRPO of DiffuCoder (2506.20639): every token is scored under a mask and under its complement.

    M = {k : u_k < r}, r ~ U(.2, .8);   p0, p1, p2 = log p(o_k) with all, with M, with the complement of M masked
    log pi(o_k | c) ~ 1/2 ( p0_k + [k in M] p1_k / r + [k not in M] p2_k / (1 - r) )
    L = sum over k up to the first end token of [ -min(rho_k A, clip(rho_k) A) + beta k3 ] / number of such tokens

Three forwards per response and update. A is the reward less the mean of the siblings'. The prompt is shown, and
tokens after the first end token are masked like all others but not counted.

Caution: 1/r and 1/(1 - r) multiply a log-prob that then enters exp(), so log-ratios grow up to 2.5-fold (5-fold before
the half): a clip range is felt sooner than under d1. Deviation: r is drawn per prompt and pass, not per device batch,
so that it does not depend on the cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from learner.advantages import Baseline
from learner.algorithms.base import LossSetting
from learner.algorithms.token_base import (
    RATIO_METRICS,
    TokenAlgorithm,
    TokenAlgorithmConfig,
    clipped_token_loss,
    token_shares,
)
from learner.batching import TokenBatch
from learner.noising import Ask, Scorer, all_masked, group_uniforms, item_generators, masked_at
from learner.token_losses import coupled_logprob
from raylign.types import RolloutGroup


class CoupledGrpoConfig(TokenAlgorithmConfig):
    """Coupled-GRPO with its released setting (G 10, 2 passes per step at lr 1e-6 on DiffuCoder-7B)."""

    type: Literal["coupled_grpo"] = "coupled_grpo"
    clip_range: float = Field(default=0.5, gt=0, lt=1)
    """Ratios beyond 1 ± this get no gradient in the advantage's direction."""
    min_mask_rate: float = Field(default=0.2, gt=0, lt=1)
    """Smallest r, the share of tokens in M."""
    max_mask_rate: float = Field(default=0.8, gt=0, lt=1)
    """Largest r."""
    baseline: Baseline = "leave_one_out"
    """What a sample's reward is compared with."""
    kl_weight: float = Field(default=0.01, ge=0)
    """Weight of the distance to the reference."""

    @model_validator(mode="after")
    def _refuse_crossed_rates(self) -> CoupledGrpoConfig:
        if self.min_mask_rate > self.max_mask_rate:
            raise ValueError(
                f"min_mask_rate {self.min_mask_rate} is above max_mask_rate {self.max_mask_rate}; swap them"
            )
        return self


class CoupledGrpo(TokenAlgorithm):
    """See the module's docstring."""

    policy_metrics: ClassVar[tuple[str, ...]] = RATIO_METRICS

    def __init__(self, config: CoupledGrpoConfig, setting: LossSetting) -> None:
        super().__init__(config, setting)
        self.config: CoupledGrpoConfig = config

    def shares(self, group: RolloutGroup) -> torch.Tensor:
        """The loss is a mean over tokens."""
        return token_shares(group, self.vocabulary)

    def policy_loss(self, scorer: Scorer, batch: TokenBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        masked_NL, rate_N = self._draw(batch)
        full, part, rest = all_masked(batch), masked_at(masked_NL), masked_at(~masked_NL)

        def estimate(ask: Ask) -> torch.Tensor:
            return coupled_logprob(ask(full), ask(part), ask(rest), rate_N)

        scores = self.scores(scorer, estimate)
        loss_N, metrics = clipped_token_loss(scores, batch.adv_N, scorer.counted_NL, self.config.clip_range)
        return self.with_kl(loss_N, metrics, self.token_kl(scores, scorer.counted_NL))

    def _draw(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """M as (N, L) bool and r as (N,) fp32: r by the prompt's key, M by the sample's, both anew in each epoch."""
        low, high = self.config.min_mask_rate, self.config.max_mask_rate
        rate_N = (low + (high - low) * group_uniforms(batch, "coupled_rate")).float()
        length, device = batch.tokens.tokens_GL.shape[1], batch.tokens.tokens_GL.device
        uniform_NL = torch.stack([torch.rand(length, generator=g) for g in item_generators(batch, "coupled_mask")])
        return (uniform_NL < rate_N[:, None]).to(device), rate_N.to(device)
