"""d1's diffu-GRPO (2504.12216): one-step log-probs under a fully masked response, PPO's clip per token.

    log pi(o_k | c) ~ log softmax f(c', all masked)_k [o_k],   c' = the prompt with 15 % of its tokens masked
    L = sum over k up to the first end token of [ -min(rho_k A, clip(rho_k) A) + beta k3 ] / number of such tokens

One forward per response and update, whatever the number of denoising steps. The policies share the prompt's mask,
which is drawn anew for each pass over the step's samples, as in the paper's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field

from learner.algorithms.base import LossSetting
from learner.algorithms.token_base import (
    RATIO_METRICS,
    TokenAlgorithm,
    TokenAlgorithmConfig,
    clipped_token_loss,
    token_shares,
)
from learner.batching import TokenBatch
from learner.noising import Scorer, all_masked
from raylign.types import RolloutGroup


class D1Config(TokenAlgorithmConfig):
    """diffu-GRPO with its released setting (G 6, 8 or 12 passes per step at lr 3e-6 on LLaDA-8B)."""

    type: Literal["d1"] = "d1"
    clip_range: float = Field(default=0.5, gt=0, lt=1)
    """Ratios beyond 1 ± this get no gradient in the advantage's direction."""
    prompt_mask_rate: float = Field(default=0.15, ge=0, lt=1)
    """Share of prompt tokens masked while scoring; 0 scores the prompt as it is."""
    kl_weight: float = Field(default=0.04, ge=0)
    """Weight of the distance to the reference."""
    reference_sync_steps: int | None = Field(default=64, ge=1)
    """Steps between moves of the reference towards the policy."""


class D1(TokenAlgorithm):
    """See the module's docstring."""

    policy_metrics: ClassVar[tuple[str, ...]] = RATIO_METRICS

    def __init__(self, config: D1Config, setting: LossSetting) -> None:
        super().__init__(config, setting)
        self.config: D1Config = config

    def shares(self, group: RolloutGroup) -> torch.Tensor:
        """The loss is a mean over tokens."""
        return token_shares(group, self.vocabulary)

    def policy_loss(self, scorer: Scorer, batch: TokenBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        canvas = all_masked(batch, self.config.prompt_mask_rate)
        scores = self.scores(scorer, lambda ask: ask(canvas))
        loss_N, metrics = clipped_token_loss(scores, batch.adv_N, scorer.counted_NL, self.config.clip_range)
        return self.with_kl(loss_N, metrics, self.token_kl(scores, scorer.counted_NL))
