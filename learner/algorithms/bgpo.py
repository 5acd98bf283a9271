"""BGPO (2510.11683): a bound of the ELBO objective that is a sum over Monte-Carlo samples, trained one at a time.

    sample j of n_t:  l_j = T / |M_j| sum over k in M_j of log p(o_k | c, o without M_j),  d_j = (l_j - l_j,rollout) / L
    A >= 0:  A (1 + d_j) / n_t        A < 0:  A exp(d_j) / n_t         (their sums are <= A exp(mean d), equal at d = 0)

The ELBO objective takes exp() of the mean over samples, so a backward pass needs the graphs of all of them. The bound
is linear in samples: each is one item with a backward pass of its own, and memory does not grow with n_t. Value and
gradient are the objective's own before the first update.

|M_j| is stratified over the samples: a start in 1..T from the sample's key, then even steps around the circle, so that
each is uniform alone and together they cover all levels. T counts the tokens up to the first end token, which alone
are masked at random and scored; what follows stays masked, as it was when those before it were written. L is the
canvas.

From the released code: the division by L, the stratification, clip 0.2 and the dual clip 3. Deviations: 1 + d is used
as it is (the code's exp(log(1 + d)) is no number for d <= -1), every response counts alike (its script's mean over
tokens weighs long ones more), and what follows the end is masked, not taken out of the attention, which would tell the
answer's length.
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
from learner.noising import NoisedCanvas, Scorer, item_generators, random_masks
from learner.token_losses import kl_penalty, linear_bound_loss
from raylign.types import RolloutGroup


class BgpoConfig(TokenAlgorithmConfig):
    """The released setting (one pass per step at lr 5e-7 on LLaDA-8B, G 8; 32 samples for Sudoku)."""

    type: Literal["bgpo"] = "bgpo"
    num_samples: int = Field(default=16, ge=1)
    """n_t, noised canvases per response and update, one backward pass each."""
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """Bounds beyond 1 ± this get no gradient in the advantage's direction."""
    dual_clip: float | None = Field(default=3.0, gt=1)
    """Largest ratio that a worse response is pushed away with; none for no such limit."""
    advantage_std: SampleStd = "sample"
    """Divide by the group's deviation."""


class Bgpo(TokenAlgorithm):
    """See the module's docstring."""

    policy_metrics: ClassVar[tuple[str, ...]] = RATIO_METRICS

    def __init__(self, config: BgpoConfig, setting: LossSetting) -> None:
        super().__init__(config, setting)
        self.config: BgpoConfig = config

    def items(self, group: RolloutGroup, run_seed: int, step: int) -> torch.Tensor:
        """The Monte-Carlo samples, (G, n_t)."""
        return torch.arange(self.config.num_samples).repeat(group.group_size, 1)

    def policy_loss(self, scorer: Scorer, batch: TokenBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        config, length = self.config, batch.tokens.tokens_GL.shape[1]
        canvas, weight_N = draw_sample(batch, scorer.counted_NL, config.num_samples)
        # Divided by the canvas's length here, so that everything below is per position.
        scores = self.scores(scorer, lambda ask: ask(canvas).sum(dim=1) * weight_N / length)
        clip = config.clip_range
        bound_N, ratio_N = linear_bound_loss(scores.learner - scores.rollout, batch.adv_N, clip, clip, config.dual_clip)
        loss_N = bound_N / config.num_samples
        metrics = {"loss/policy": loss_N, **ratio_metrics(ratio_N, clip, clip)}
        if scores.ref is None:
            return loss_N, metrics
        kl_N = kl_penalty(scores.learner, scores.ref, config.kl_estimator) / config.num_samples
        return self.with_kl(loss_N, metrics, kl_N)


def stratified_counts(start_N: torch.Tensor, length_N: torch.Tensor, item_N: torch.Tensor, total: int) -> torch.Tensor:
    """How many of `length` positions sample `item` of `total` masks, (N,) int64 in 1..length; start in 0..length-1."""
    return (start_N + item_N * length_N // total) % length_N + 1


def draw_sample(batch: TokenBatch, counted_NL: torch.Tensor, total: int) -> tuple[NoisedCanvas, torch.Tensor]:
    """The canvas of each row's item and the weight T / |M| of its log-probs, (N,)."""
    length_N = counted_NL.sum(dim=1).cpu()
    starts = item_generators(batch, "noise_start", with_item=False)
    start_N = torch.stack(
        [torch.randint(int(length), (), generator=draw) for length, draw in zip(length_N, starts, strict=True)]
    )
    count_N = stratified_counts(start_N, length_N, batch.item_N, total)
    masked_NL = random_masks(counted_NL, count_N, item_generators(batch, "noise"))
    return NoisedCanvas(counted_NL & ~masked_NL, masked_NL), (length_N / count_N).to(counted_NL.device)
