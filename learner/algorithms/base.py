"""What an algorithm is: what it needs recorded, how it credits, which items of a sample it trains, and its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch

from learner.policies import PolicySet
from raylign.errors import ConfigError
from raylign.models.tokens import Vocabulary
from raylign.types import Advantage, Needs, RolloutGroup

BatchT_contra = TypeVar("BatchT_contra", contravariant=True)
RolloutPolicy = Literal["current", "old"]
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

    def old_decay(self, num_optimiser_steps: int) -> float:
        """How much of the old policy survives one learner step; asked only if OLD is needed."""
        ...

    def reference_decay(self, step: int) -> float:
        """How much of the reference survives learner step `step`: 1 for a frozen one. Asked only if it is needed."""
        ...


def usable_steps(num_steps: int) -> int:
    """How many of a sampler's steps the papers train: int(.99 S), which drops one of 10; at least 1."""
    return max(1, int(0.99 * num_steps))


def check_count(asked: int, available: int, key: str) -> int:
    """`asked`, if there are that many sampler steps to train; else ConfigError naming `key`."""
    if asked > available:
        raise ConfigError(f"{key} is {asked}, but only {available} sampler steps can be trained; lower it")
    return asked
