"""What the algorithms for text share: credit, the joint entropy-budget controller, and the parts of their metrics.

An algorithm file holds its paper's configuration and `policy_loss`; which canvases it scores comes from
`learner.noising`, its arithmetic from `learner.token_losses`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field

from learner.advantages import Baseline, SampleStd, group_rewards, relative_advantages
from learner.algorithms.base import ItemLosses, LossSetting, RolloutPolicy
from learner.batching import TokenBatch
from learner.noising import Estimator, Scorer
from learner.policies import PolicySet, Relative
from learner.token_losses import KlEstimator, budget_loss, clipped_ratio_loss, kl_penalty, masked_mean, masked_sum
from raylign.config import Config
from raylign.errors import ShapeError
from raylign.models.tokens import Vocabulary, response_mask
from raylign.types import Advantage, Needs, RolloutGroup


class TokenAlgorithmConfig(Config):
    """Keys that every algorithm for text has; each algorithm sets its paper's defaults."""

    baseline: Baseline = "mean"
    """What a sample's reward is compared with: the group's mean, or that of its siblings alone."""
    advantage_std: SampleStd = "none"
    """Divide by the group's deviation: not, by the biased one, or by the one with one degree of freedom less."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the distance to the reference policy; 0 needs no reference."""
    kl_estimator: KlEstimator = "k3"
    """How that distance is estimated."""
    reference_sync_steps: int | None = Field(default=None, ge=1)
    """Steps between moves of the reference towards the policy; it is frozen when not given."""
    reference_sync_alpha: float = Field(default=0.6, gt=0, le=1)
    """How much of the policy the reference takes over then."""
    speed_weight: float = Field(default=0.25, ge=0, lt=1)
    """lam in the budget head's reward r (1 - lam NFE / L): how much of a right answer's worth slowness costs."""

    @property
    def needs(self) -> Needs:
        """What is kept of policies; a token trajectory always holds everything else."""
        reference = Needs.REFERENCE if self.kl_weight > 0 else Needs(0)
        return Needs.FINAL | reference | (Needs.OLD if self.uses_ratio else Needs(0))

    @property
    def uses_ratio(self) -> bool:
        """Whether the loss asks for the policy of the step's beginning."""
        return True

    @property
    def rollout_policy(self) -> RolloutPolicy:
        return "current"

    def check_sampler(self, sampler: Any) -> None:
        """Raise ConfigError, with the remedy, for rollouts that the algorithm cannot score; takes all by default."""


class Scores(NamedTuple):
    """One estimate under three policies: the learner's has a gradient, the others none; no reference, no third."""

    learner: torch.Tensor
    rollout: torch.Tensor
    ref: torch.Tensor | None


class TokenAlgorithm(ABC):
    """See the module. A subclass gives `policy_loss` and `policy_metrics`, and overrides what else its paper does."""

    policy_metrics: ClassVar[tuple[str, ...]] = ()
    """Names that `policy_loss` reports beside "loss/policy" (and "loss/kl" with a reference): always all of them."""

    def __init__(self, config: TokenAlgorithmConfig, setting: LossSetting) -> None:
        if setting.vocabulary is None:
            raise ShapeError("an algorithm for text needs the policy's vocabulary; load a text model")
        config.check_sampler(setting.sampler)
        self.config = config
        self.setting = setting
        self.vocabulary: Vocabulary = setting.vocabulary
        sampler = setting.sampler.config
        self._budget_std: float | None = None
        if getattr(sampler, "budget", None) == "learned":
            self._budget_std, self._log_gamma = float(sampler.budget_std), math.log(sampler.gamma)
        self.metrics: tuple[str, ...] = ("loss/policy", *self.policy_metrics)
        if config.kl_weight > 0:
            self.metrics += ("loss/kl",)
        if self._budget_std is not None:
            self.metrics += ("loss/budget",)

    @abstractmethod
    def policy_loss(self, scorer: Scorer, batch: TokenBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The loss of each row's item, (N,) with gradient, and one number per row for each name of `metrics` but
        "loss/budget". What is summed over items is divided by the sum of `shares`."""

    def scores(self, scorer: Scorer, estimator: Estimator) -> Scores:
        """The estimate of every policy the loss compares, asked in the order that the gradient's graph wants.

        Without a ratio the rollout's is the learner's own.
        """
        ref = estimator(scorer.reference) if self.config.kl_weight > 0 else None
        if self.config.uses_ratio:
            return Scores(*scorer.both(estimator), ref)
        learner = estimator(scorer.learner)
        return Scores(learner, learner.detach(), ref)

    def with_kl(
        self, loss_N: torch.Tensor, metrics: Mapping[str, torch.Tensor], kl_N: torch.Tensor | None
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The loss and its metrics with `kl_weight` times the distance added, where there is a reference."""
        if kl_N is None:
            return loss_N, metrics
        return loss_N + self.config.kl_weight * kl_N, {**metrics, "loss/kl": kl_N}

    def token_kl(self, scores: Scores, counted_NL: torch.Tensor) -> torch.Tensor | None:
        """Summed distance to the reference over the counted tokens of scores (N, L): (N,)."""
        if scores.ref is None:
            return None
        return masked_sum(kl_penalty(scores.learner, scores.ref, self.config.kl_estimator), counted_NL)

    @property
    def needs(self) -> Needs:
        return self.config.needs

    @property
    def rollout_policy(self) -> RolloutPolicy:
        return self.config.rollout_policy

    def credit(self, groups: Sequence[RolloutGroup]) -> list[Advantage]:
        """Group-relative advantages of the rewards, and for a learned budget those of r (1 - lam NFE / L).

        The budget's are centred and never divided by a deviation: NFE varies in every group and rewards do not, so a
        standardised (or additive) speed term drives the budget to one call whatever it costs (measured).
        """
        rewards = [group_rewards(group) for group in groups]
        advantages = relative_advantages(rewards, self.config.baseline, self.config.advantage_std)
        if self._budget_std is None:
            return advantages
        worth = [self._worth(group, values) for group, values in zip(groups, rewards, strict=True)]
        budget = relative_advantages(worth)
        return [replace(one, budget_adv_G=other.adv_G) for one, other in zip(advantages, budget, strict=True)]

    def items(self, group: RolloutGroup, run_seed: int, step: int) -> torch.Tensor:
        """One item per sample: what is summed inside a ratio cannot be split over backward passes."""
        return torch.zeros(group.group_size, 1, dtype=torch.int64)

    def shares(self, group: RolloutGroup) -> torch.Tensor:
        """Every sample counts alike."""
        return torch.ones(group.group_size)

    def loss(self, policies: PolicySet, batch: TokenBatch) -> ItemLosses:
        loss_N, metrics = self.policy_loss(Scorer(policies, batch, self.vocabulary), batch)
        found = {name: value.detach() for name, value in metrics.items()}
        if self._budget_std is not None:
            budget_N = self._budget_loss(policies, batch, self._budget_std)
            loss_N = loss_N + budget_N
            found["loss/budget"] = budget_N.detach()
        return ItemLosses(loss_N, found)

    def decay(self, relative: Relative, num_optimiser_steps: int, step: int) -> float:
        """The policy of a step's beginning is an exact copy; the reference is frozen, or moves now and then."""
        if relative == "old":
            return 0.0
        every = self.config.reference_sync_steps
        return 1.0 - self.config.reference_sync_alpha if every is not None and step % every == 0 else 1.0

    def _worth(self, group: RolloutGroup, rewards: Sequence[float | None]) -> list[float | None]:
        """r (1 - lam NFE / L) of each sibling."""
        tokens = group.tokens
        length = tokens.tokens_GL.shape[1]
        costs = [1.0 - self.config.speed_weight * nfe / length for nfe in tokens.nfe_G.tolist()]
        return [None if reward is None else reward * cost for reward, cost in zip(rewards, costs, strict=True)]

    def _budget_loss(self, policies: PolicySet, batch: TokenBatch, std: float) -> torch.Tensor:
        """The controller's loss, at the first item of each sample."""
        tokens = batch.tokens
        if tokens.log_gamma_G is None or tokens.budget_features_GD is None:
            raise ShapeError("a learned budget needs rollouts that recorded it; set sampler.budget = 'learned' in both")
        mean_N = self._log_gamma + policies.policy.log_budget(tokens.budget_features_GD)
        loss_N = budget_loss(tokens.log_gamma_G, mean_N, std, batch.budget_adv_N)
        return torch.where(batch.item_N.to(loss_N.device) == 0, loss_N, 0.0)


def token_shares(group: RolloutGroup, vocabulary: Vocabulary) -> torch.Tensor:
    """The number of tokens up to and including the first end token, (G,): for losses that are means over tokens."""
    return response_mask(group.tokens.tokens_GL, vocabulary.eos_id).sum(dim=1).float()


def clipped_token_loss(
    scores: Scores, adv_N: torch.Tensor, counted_NL: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped surrogate per token of scores (N, L), summed over the counted ones, (N,); with its metrics."""
    policy_NL, ratio_NL = clipped_ratio_loss(scores.learner, scores.rollout, adv_N[:, None], clip_range, clip_range)
    loss_N = masked_sum(policy_NL, counted_NL)
    return loss_N, {"loss/policy": loss_N, **ratio_metrics(ratio_NL, clip_range, clip_range, counted_NL)}


def ratio_metrics(
    ratio_N: torch.Tensor, clip_low: float, clip_high: float, counted_NL: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Per row: the ratio, its distance from 1 (its greatest is what is logged), and whether a clip bound is passed.

    Of (N,) ratios, or of (N, L) ones over the counted positions (all, if not said).
    """
    rows_NL = ratio_N.detach().reshape(len(ratio_N), -1)
    counted_NL = torch.ones_like(rows_NL, dtype=torch.bool) if counted_NL is None else counted_NL
    outside_NL = (rows_NL < 1 - clip_low) | (rows_NL > 1 + clip_high)
    return {
        "ratio/mean": masked_mean(rows_NL, counted_NL),
        "ratio/deviation_max": torch.where(counted_NL, (rows_NL - 1).abs(), 0.0).amax(dim=1),
        "ratio/clip_fraction": masked_mean(outside_NL.float(), counted_NL),
    }


RATIO_METRICS = ("ratio/mean", "ratio/deviation_max", "ratio/clip_fraction")
