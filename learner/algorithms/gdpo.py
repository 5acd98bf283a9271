"""GDPO, group diffusion policy optimisation (2510.08554): a sequence ratio of ELBOs by Gauss-Legendre quadrature.

    ELBO(o | c) ~ sum over nodes j of w_j / t_j sum over k in M_j of log p(o_k | c, o without M_j)
    t, w: nodes and weights of n-point Gauss-Legendre on (0, 1);  |M_j| = floor(t_j L), the same M_j for all policies
    rho = exp((ELBO - ELBO_rollout) / L);  L = mean over responses of -min(rho A, clip(rho) A)

The noise level, which makes most of the variance of a Monte-Carlo ELBO, is integrated; only the positions are drawn.
The ratio comes after the sum, so all n graphs are kept for the backward pass.

floor(tL) positions at weight 1/t count a node |M| / (tL) < 1 times: a node with t L < 1 not at all. At L = 256 that
is small; at L = 8 two nodes lose a fifth of the ELBO. `level_weights = "unbiased"` masks round(tL) positions, at least
one, and weighs them by L / |M|, the exact integrand at that number of masks; what is left is quadrature error.

The whole canvas is scored, with what follows the first end token, as in the released code. Its "simpson" rule is left
out (the code raises KeyError). Not to be confused with `advantage_std = "gdpo"` of the image algorithms (2601.05242).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from learner.algorithms.base import LossSetting
from learner.algorithms.token_base import RATIO_METRICS, TokenAlgorithm, TokenAlgorithmConfig, ratio_metrics
from learner.batching import TokenBatch
from learner.noising import Ask, NoisedCanvas, Scorer, item_generators, masked_at, random_masks
from learner.token_losses import clipped_ratio_loss, kl_penalty

LevelWeights = Literal["paper", "unbiased"]


class GdpoConfig(TokenAlgorithmConfig):
    """The released launch script's setting (12 passes per step at lr 3e-7 on LLaDA-8B, other values as d1's)."""

    type: Literal["gdpo"] = "gdpo"
    num_nodes: int = Field(default=3, ge=1, le=5)
    """Noise levels of the quadrature ("gauss-1" to "gauss-5"), one forward each."""
    level_weights: LevelWeights = "paper"
    """"paper": floor(tL) masks at weight 1/t; "unbiased": round(tL) at weight L / their number."""
    clip_range: float = Field(default=0.5, gt=0, lt=1)
    """Ratios beyond 1 ± this get no gradient in the advantage's direction."""


class Level(NamedTuple):
    """One node of the quadrature: how many positions are masked, and what the sum of their log-probs is worth."""

    num_masked: int
    weight: float


class Gdpo(TokenAlgorithm):
    """See the module's docstring."""

    policy_metrics: ClassVar[tuple[str, ...]] = RATIO_METRICS

    def __init__(self, config: GdpoConfig, setting: LossSetting) -> None:
        super().__init__(config, setting)
        self.config: GdpoConfig = config

    def policy_loss(self, scorer: Scorer, batch: TokenBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        config, length = self.config, batch.tokens.tokens_GL.shape[1]
        levels = quadrature_levels(config.num_nodes, length, config.level_weights)
        canvases = draw_levels(batch, levels)

        def score(ask: Ask) -> torch.Tensor:
            """The ELBO per position, (N,)."""
            nodes = zip(levels, canvases, strict=True)
            return torch.stack([level.weight / length * ask(canvas).sum(dim=1) for level, canvas in nodes]).sum(dim=0)

        scores, clip = self.scores(scorer, score), config.clip_range
        loss_N, ratio_N = clipped_ratio_loss(scores.learner, scores.rollout, batch.adv_N, clip, clip)
        metrics = {"loss/policy": loss_N, **ratio_metrics(ratio_N, clip, clip)}
        if scores.ref is None:
            return loss_N, metrics
        return self.with_kl(loss_N, metrics, kl_penalty(scores.learner, scores.ref, config.kl_estimator))


def quadrature_levels(num_nodes: int, length: int, weights: LevelWeights) -> list[Level]:
    """The nodes for a canvas of `length` positions, from low noise to high; those that mask nothing are left out.

    n-point Gauss-Legendre on (-1, 1) has nodes x and weights w; on (0, 1) they are (1 + x) / 2 and w / 2.
    """
    xs, ws = np.polynomial.legendre.leggauss(num_nodes)
    levels: list[Level] = []
    for t, w in zip((1 + xs) / 2, ws / 2, strict=True):
        if weights == "paper":
            # One half times an even length is a whole number; rounding of the node must not take one away.
            count = int(t * length + 1e-9)
            levels.append(Level(count, float(w / t)))
        else:
            count = max(1, round(t * length))
            levels.append(Level(count, float(w * length / count)))
    return [level for level in levels if level.num_masked > 0]


def draw_levels(batch: TokenBatch, levels: list[Level]) -> list[NoisedCanvas]:
    """One canvas per level, from each sample's "levels" key and the epoch."""
    everywhere_NL = torch.ones_like(batch.tokens.tokens_GL, dtype=torch.bool)
    draws = item_generators(batch, "levels", with_item=False)
    counts = [torch.full((len(batch.keys),), level.num_masked) for level in levels]
    return [masked_at(random_masks(everywhere_NL, count_N, draws)) for count_N in counts]
