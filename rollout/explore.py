"""Explore and exploit (Sol-RL, 2604.06916): many cheap drafts of a prompt, the most telling few drawn again to train.

    pool_size keys ──▶ drafts ──reward──▶ select group_size of them ──▶ the same keys at full quality ──reward──▶ group

Drafts say which noise is worth training on and nothing else: they carry no trajectory, so nothing can train on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from pydantic import Field

from raylign.config import Config
from raylign.precision import RolloutPrecision
from raylign.samplers import SamplerConfig
from raylign.types import Prompt, RewardBreakdown, RolloutGroup, SampleKey, Work
from rollout.pruning import PruneConfig
from rollout.selection import Selection


class ExploreConfig(Config):
    """The keys of `[rollout.explore]`; its presence switches exploration on. `group_size` drafts are drawn again."""

    pool_size: int = Field(default=96, ge=2)
    """Candidates of each prompt (N), each with a key of its own."""
    num_steps: int = Field(default=6, ge=1)
    """Denoising steps of a picture's draft (T)."""
    sampler: SamplerConfig | None = None
    """How drafts are drawn; by default as rollouts are, without noise and in `num_steps` steps for pictures."""
    gamma: float | None = Field(default=None, gt=0)
    """Entropy budget of a text's draft: a greater one takes fewer calls."""
    precision: RolloutPrecision | None = None
    """Number format of drafts; the rollouts' own when not given."""
    chunk_size: int | None = Field(default=None, ge=1)
    """Drafts per batch, a divisor of pool_size; rollout.chunk_size when not given."""
    select: Selection = "best_worst"
    """Which drafts are drawn again: half from either end, any, those furthest from the mean, or both ends and any."""
    regenerate: bool = True
    """Draw the selected again. false draws the whole pool as rollouts are, and trains on the selected of those."""
    prune: PruneConfig | None = None
    """Drop the least promising drafts of each batch before they are done; none when not given."""


@dataclass(frozen=True, slots=True)
class DraftGroup:
    """The scored drafts of one prompt, in the order of their sample indices.

    No trajectory, no conditioning and no `rollouts`: what credit and batches are made from is not there, so a draft
    cannot get into a training batch by mistake.
    """

    prompt: Prompt
    visit: int
    sequence: int
    keys: tuple[SampleKey, ...]
    """Shorter than the pool where drafts were pruned."""
    scores: tuple[RewardBreakdown, ...]
    """One per key; a failed draft has no total."""
    images_NHWC: np.ndarray | None = None
    texts: tuple[str, ...] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    """Busy seconds by phase ("sample", "decode", "reward")."""
    work: tuple[Work, ...] = ()
    """What drawing and scoring them took, piece by piece."""

    @property
    def totals(self) -> tuple[float | None, ...]:
        """The mixed rewards; None for a failed draft."""
        return tuple(score.total for score in self.scores)


def as_drafts(drawn: RolloutGroup) -> DraftGroup:
    """What is kept of drafts that were drawn and scored: everything but what could be trained on."""
    scores = tuple(rollout.reward for rollout in drawn.rollouts if rollout.reward is not None)
    if len(scores) != drawn.group_size:
        raise ValueError(f"drafts of prompt {drawn.prompt.id!r} are not scored yet; score them before they are kept")
    return DraftGroup(
        drawn.prompt,
        drawn.visit,
        drawn.sequence,
        tuple(rollout.key for rollout in drawn.rollouts),
        scores,
        drawn.images_GHWC,
        drawn.texts,
        drawn.seconds,
        drawn.work,
    )
