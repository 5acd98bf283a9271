"""UniGRPO of MMaDA (2505.15809): masks whose share sweeps the noise levels over the passes of a step.

    p_1 ~ U(0, 1) per response,  p_n = p_1 + (n - 1) / (mu - 1) (1 - p_1) in pass n of mu;  M: a share p_n of the tokens
    score: log p(o_k) for k in M, the prompt and the other tokens shown
    L = mean over samples of mean over M of [ -min(rho_k A, clip(rho_k) A) + beta k3 ],   A = (r - mean) / std

One forward per response and update. The paper's trainer was never released and its text leaves the level of the ratio
open: `ratio` takes it per token (as its objective is indexed) or once per response, of the mean log-prob over M (as
it defines the response's score). Tokens after the first end token are masked and not counted. Deviations: noise
levels are continuous where the paper rounds to one of T; M has exactly max(1, round(p n)) of the n counted tokens, so
it is never empty. Clip range and KL weight are GRPO's; the paper does not give its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field

from learner.advantages import SampleStd
from learner.algorithms.base import LossSetting
from learner.algorithms.token_base import (
    RATIO_METRICS,
    Scores,
    TokenAlgorithm,
    TokenAlgorithmConfig,
    clipped_token_loss,
    ratio_metrics,
)
from learner.batching import TokenBatch
from learner.noising import NoisedCanvas, Scorer, item_generators, random_masks
from learner.token_losses import clipped_ratio_loss, masked_mean
from raylign.keys import generator


class UniGrpoConfig(TokenAlgorithmConfig):
    """UniGRPO; set learner.epochs_per_step to the passes mu over which the masks sweep."""

    type: Literal["unigrpo"] = "unigrpo"
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """Ratios beyond 1 ± this get no gradient in the advantage's direction."""
    ratio: Literal["token", "sequence"] = "token"
    """One ratio per masked token, or one per response of their mean log-prob."""
    advantage_std: SampleStd = "population"
    """Divide by the group's deviation."""
    kl_weight: float = Field(default=0.04, ge=0)
    """Weight of the distance to the reference."""


class UniGrpo(TokenAlgorithm):
    """See the module's docstring."""

    policy_metrics: ClassVar[tuple[str, ...]] = (*RATIO_METRICS, "mask/share")

    def __init__(self, config: UniGrpoConfig, setting: LossSetting) -> None:
        super().__init__(config, setting)
        self.config: UniGrpoConfig = config

    def policy_loss(self, scorer: Scorer, batch: TokenBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        counted_NL = scorer.counted_NL
        length_N = counted_NL.sum(dim=1)
        size_N = (self._level(batch).to(length_N.device) * length_N).round().long().clamp_min(1)
        masked_NL = random_masks(counted_NL, size_N, item_generators(batch, "unigrpo_mask"))
        canvas = NoisedCanvas(counted_NL & ~masked_NL, masked_NL)
        scores = self.scores(scorer, lambda ask: ask(canvas))
        loss_N, metrics = self._clipped(scores, batch.adv_N, masked_NL)
        kl_N = self.token_kl(scores, masked_NL)
        metrics = {**metrics, "mask/share": size_N / length_N}
        return self.with_kl(loss_N, metrics, None if kl_N is None else kl_N / size_N)

    def _clipped(
        self, scores: Scores, adv_N: torch.Tensor, masked_NL: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The surrogate at the configured level, a mean over the masked tokens, and its metrics."""
        clip = self.config.clip_range
        if self.config.ratio == "token":
            total_N, metrics = clipped_token_loss(scores, adv_N, masked_NL, clip)
            loss_N = total_N / masked_NL.sum(dim=1)
            return loss_N, {**metrics, "loss/policy": loss_N}
        learner_N, rollout_N = masked_mean(scores.learner, masked_NL), masked_mean(scores.rollout, masked_NL)
        loss_N, ratio_N = clipped_ratio_loss(learner_N, rollout_N, adv_N, clip, clip)
        return loss_N, {"loss/policy": loss_N, **ratio_metrics(ratio_N, clip, clip)}

    def _level(self, batch: TokenBatch) -> torch.Tensor:
        """p_n of each response, (N,) fp64: its start by the sample's key alone, the rest by the pass."""
        start_N = torch.tensor(
            [
                float(torch.rand((), generator=generator(*key, "unigrpo_level"), dtype=torch.float64))
                for key in batch.keys
            ]
        )
        return start_N + sweep(batch.epoch, self.setting.num_epochs) * (1 - start_N)


def sweep(epoch: int, num_epochs: int) -> float:
    """How far pass `epoch` (from 0) of `num_epochs` has come from the first noise level to the last: 0 to 1."""
    return epoch / (num_epochs - 1) if num_epochs > 1 else 0.0
