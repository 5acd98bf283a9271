"""What an algorithm is: what it needs recorded, how it credits, which items of a sample it trains, and its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from pydantic import Field

from learner.advantages import AdvantageStd
from learner.policies import PolicySet, Relative
from raylign.config import Config
from raylign.errors import ConfigError
from raylign.models.tokens import Vocabulary
from raylign.samplers.base import ImageSamplerConfig
from raylign.types import Advantage, Needs, RolloutGroup

BatchT_contra = TypeVar("BatchT_contra", contravariant=True)
RolloutPolicy = Literal["current", "old", "sampling"]
"""Whose weights rollout actors are given."""


@dataclass(frozen=True, slots=True)
class LossSetting:
    """What an algorithm is told of the run: the rollouts' sampler and guidance, passes per step, and for text the
    vocabulary."""

    sampler: Any
    guidance_scale: float = 1.0
    vocabulary: Vocabulary | None = None
    num_epochs: int = 1


@dataclass(frozen=True, slots=True)
class ItemLosses:
    """What a loss returns for one micro-batch, before masking: everything is one number per item, (N,).

    `loss_N` carries the gradient. `metrics` are detached; they are averaged over the valid items of all ranks, and
    those whose name ends in "_max" reduced to their maximum.
    """

    loss_N: torch.Tensor
    metrics: Mapping[str, torch.Tensor]


class Algorithm(Protocol[BatchT_contra]):
    """One training method, on MicroBatches (pictures) or TokenBatches; `learner/algorithms/__init__.py` lists them."""

    metrics: tuple[str, ...]
    """Names that `loss` reports: always all of them, so that ranks agree on what to reduce."""

    @property
    def needs(self) -> Needs:
        """What must be recorded by the rollout and kept by the learner."""
        ...

    @property
    def rollout_policy(self) -> RolloutPolicy:
        """Whose weights the rollouts use."""
        ...

    def credit(self, groups: Sequence[RolloutGroup]) -> list[Advantage]:
        """One Advantage per group, from rewards and what the rollout cost."""
        ...

    def items(self, group: RolloutGroup, run_seed: int, step: int) -> torch.Tensor:
        """What each sample is trained on, one backward pass each: (G, K) int64, drawn by key; ABSENT fills up."""
        ...

    def shares(self, group: RolloutGroup) -> torch.Tensor:
        """What each sample counts in the denominator of its update's loss, (G,); the loss is a sum over items."""
        ...

    def loss(self, policies: PolicySet, batch: BatchT_contra) -> ItemLosses:
        """The loss of each item of a micro-batch."""
        ...

    def decay(self, relative: Relative, num_optimiser_steps: int, step: int) -> float:
        """How much of a relative survives learner step `step`: 1 keeps it as it is, 0 makes it the current policy.

        Asked at the end of the step for each relative that is needed; `num_optimiser_steps` counts the run's.
        """
        ...


@dataclass(frozen=True, slots=True)
class SurveyedItems:
    """What a first pass without gradient found of every item of one update, those of other ranks included.

    P groups of the step, G siblings, K items each. numbers_PGKF: fp64, what `survey` gave. present_PGK: bool, the items
    of this update's valid samples; all else is 0. adv_PG: fp64.
    """

    numbers_PGKF: torch.Tensor
    present_PGK: torch.Tensor
    adv_PG: torch.Tensor


@runtime_checkable
class Surveys(Protocol[BatchT_contra]):
    """An algorithm whose loss of one item depends on the others: it sees all of them once without gradient, then each
    with what was settled. The gradient is that of the whole update, however it is cut into micro-batches."""

    num_surveyed: int
    """F."""

    def survey(self, policies: PolicySet, batch: BatchT_contra) -> torch.Tensor:
        """What the other items need to know of each item, (N, F) fp64."""
        ...

    def settle(self, items: SurveyedItems) -> torch.Tensor:
        """What `loss` finds of each item in `batch.settled_NF`, (P, G, K, any) fp64."""
        ...


class ImageAlgorithmConfig(Config):
    """What every picture algorithm's configuration has; a subclass adds `type` and its own keys."""

    adv_clip: float = Field(default=5.0, gt=0)
    """Largest advantage."""
    advantage_std: AdvantageStd = "global"
    """Divide by the deviation of the whole step, or of each group. per_reward: each reward by its own group's, then
    weigh; gdpo: and divide by the whole step's after that."""

    @property
    def needs(self) -> Needs:
        """What must be recorded by the rollout and kept by the learner."""
        return Needs.FINAL

    @property
    def rollout_policy(self) -> RolloutPolicy:
        """Whose weights rollouts are drawn with."""
        return "current"

    @property
    def guidance_free(self) -> bool:
        """Whether the method trains without guidance, so that guided rollouts would come from another policy."""
        return False

    @property
    def smallest_clip(self) -> float | None:
        """The narrowest clip range of its ratios; None without any."""
        return None

    def check_sampler(self, sampler: ImageSamplerConfig) -> None:
        """Raise ConfigError, with the remedy, for rollouts the method was not made for; takes all by default."""

    def check_updates(self, max_staleness: int, num_updates: int) -> None:
        """Raise ConfigError, with the remedy, for samples of an age, or optimiser steps per learner step, that the
        method has no means against; takes all by default."""

    def check_group_size(self, group_size: int) -> None:
        """Raise ConfigError, with the remedy, for groups the method cannot credit; takes all by default."""


def usable_steps(num_steps: int) -> int:
    """How many of a sampler's steps the papers train: int(.99 S), which drops one of 10; at least 1."""
    return max(1, int(0.99 * num_steps))


def check_count(asked: int, available: int, key: str) -> int:
    """`asked`, if there are that many sampler steps to train; else ConfigError naming `key`."""
    if asked > available:
        raise ConfigError(f"{key} is {asked}, but only {available} sampler steps can be trained; lower it")
    return asked
