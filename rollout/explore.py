"""Explore and exploit (Sol-RL, 2604.06916): many cheap drafts of a prompt, the most telling few drawn again to train.

    pool_size keys ──▶ drafts ──reward──▶ select group_size of them ──▶ the same keys at full quality ──reward──▶ group

Drafts say which noise is worth training on and nothing else: they carry no trajectory, so nothing can train on them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raylign.config import Config
from raylign.precision import RolloutPrecision
from raylign.samplers import SamplerConfig

Selection = Literal["best_worst", "random", "mean_deviation", "extremes_random"]


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
    """Which drafts are drawn again: half from either end, any, those furthest from the mean, or ends and any."""
    regenerate: bool = True
    """Draw the selected again. false draws the whole pool as rollouts are, and trains on the selected of those."""
