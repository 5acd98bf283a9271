"""ESPO (2512.03759): the whole response as one action, its likelihood an ELBO of masks and their complements.

    ELBO = mean over R pairs of (L + 1) / 2 ( 1/n sum over M of log p_k + 1/(L - n) sum over the rest of log p'_k )
    n = |M| uniform on 0 .. L,    rho = exp((ELBO - ELBO_rollout) / L)
    L_i = -min(rho A, clip(rho) A) + beta k2(ELBO) / L,    A: the reward less the mean of the siblings'

Each half is unbiased; the pair covers every token once. 2 R forwards per response and update, their graphs held
together. L is the whole canvas, and whatever the rollout left after the first end token counts too. k2 is taken of the
raw ELBOs.

Deviation: n is stratified over the siblings of a prompt by a golden-ratio sequence, floor(frac(u + i phi) (L + 1)) for
the i-th mask with u ~ U(0, 1) per prompt and pass, where the code spreads it evenly over one device's batch: still
uniform, nearly as even for any group size, and independent of the cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field

from learner.advantages import Baseline
from learner.algorithms.base import LossSetting
from learner.algorithms.token_base import RATIO_METRICS, TokenAlgorithm, TokenAlgorithmConfig, ratio_metrics
from learner.batching import TokenBatch
from learner.noising import Ask, Estimator, Scorer, group_uniforms, item_generators, masked_at, random_masks
from learner.token_losses import KlEstimator, clipped_ratio_loss, kl_penalty, paired_elbo

_GOLDEN = (5**0.5 - 1) / 2


class EspoConfig(TokenAlgorithmConfig):
    """ESPO with its released setting (G 6, 8 passes per step at lr 3e-6; `kl_weight` is Countdown's, 1e-2 on Sudoku
    and code, 1e-3 on GSM8K and MATH)."""

    type: Literal["espo"] = "espo"
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """Ratios beyond 1 ± this get no gradient in the advantage's direction."""
    num_pairs: int = Field(default=2, ge=1)
    """R, masks per response, each with its complement."""
    baseline: Baseline = "leave_one_out"
    """What a sample's reward is compared with."""
    kl_weight: float = Field(default=3e-3, ge=0)
    """Weight of the distance to the reference."""
    kl_estimator: KlEstimator = "k2"
    """How that distance is estimated."""


class Espo(TokenAlgorithm):
    """See the module's docstring."""

    policy_metrics: ClassVar[tuple[str, ...]] = (*RATIO_METRICS, "elbo/per_token")

    def __init__(self, config: EspoConfig, setting: LossSetting) -> None:
        super().__init__(config, setting)
        self.config: EspoConfig = config

    def policy_loss(self, scorer: Scorer, batch: TokenBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        clip, length = self.config.clip_range, batch.tokens.tokens_GL.shape[1]
        scores = self.scores(scorer, elbo_estimator(batch, self.config.num_pairs))
        loss_N, ratio_N = clipped_ratio_loss(scores.learner / length, scores.rollout / length, batch.adv_N, clip, clip)
        kl_N = None
        if scores.ref is not None:
            kl_N = kl_penalty(scores.learner, scores.ref, self.config.kl_estimator) / length
        metrics = {
            "loss/policy": loss_N,
            **ratio_metrics(ratio_N, clip, clip),
            "elbo/per_token": scores.learner / length,
        }
        return self.with_kl(loss_N, metrics, kl_N)


def elbo_estimator(batch: TokenBatch, num_pairs: int) -> Estimator:
    """The ELBO of each response from `num_pairs` masks and their complements, (N,); masks are drawn here, by key."""
    tokens_NL = batch.tokens.tokens_GL
    everywhere_NL = torch.ones_like(tokens_NL, dtype=torch.bool)
    draws = item_generators(batch, "espo_mask")
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for pair in range(num_pairs):
        count_N = _mask_sizes(batch, pair, num_pairs).to(tokens_NL.device)
        pairs.append((random_masks(everywhere_NL, count_N, draws), count_N))

    def estimate(ask: Ask) -> torch.Tensor:
        halves = [paired_elbo(ask(masked_at(m)), ask(masked_at(~m)), count_N) for m, count_N in pairs]
        return torch.stack(halves).mean(dim=0)

    return estimate


def _mask_sizes(batch: TokenBatch, pair: int, num_pairs: int) -> torch.Tensor:
    """How many tokens each response's mask has, (N,) int64 on 0 .. L, stratified over a prompt's siblings and pairs."""
    number_N = torch.tensor([key.sample_index * num_pairs + pair for key in batch.keys], dtype=torch.float64)
    spread_N = (group_uniforms(batch, "espo_size") + number_N * _GOLDEN).frac()
    return (spread_N * (batch.tokens.tokens_GL.shape[1] + 1)).long()
