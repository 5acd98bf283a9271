"""Which noise levels a forward-process method trains at: integer places in a table of levels, drawn by key.

    grid "sampler": the rollouts' own levels        "dense": 1000 levels s u / (1 + (s - 1) u), u = 1, .999, ..., .001
    draw "permutation": the first ones of a random order      "stratified": one of each of K equal parts, in order

A table makes the draw exact: an item is an index, the noise is keyed by it, and no level occurs twice in a sample.
"dense" is the training grid of diffusers' FlowMatchEulerDiscreteScheduler, scaled to the rollouts' first level for
models that start short of pure noise.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field

from raylign.config import Config
from raylign.errors import ConfigError
from raylign.samplers import Sampler, num_steps

NUM_DENSE = 1000
"""Levels of the dense grid."""


class TrainTimes(Config):
    """Which noise levels samples are noised to."""

    grid: Literal["sampler", "dense"] = "sampler"
    """The rollouts' own levels, or 1000 between pure noise and none."""
    draw: Literal["permutation", "stratified"] = "permutation"
    """Any levels, or one of each of equal parts of the grid."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the grid that is drawn from, counted in levels from pure noise."""
    with_first: bool = True
    """Whether the first level, pure noise, may be drawn."""
    shift: float = Field(default=3.0, gt=0)
    """Time shift of the dense grid."""

    def places(self, num_steps: int) -> range:
        """Which levels may be drawn, beside a sampler of so many steps. Raises ConfigError for none."""
        num_levels = num_steps if self.grid == "sampler" else NUM_DENSE
        found = range(0 if self.with_first else 1, int(self.fraction * num_levels))
        if not found:
            raise ConfigError(
                f"algorithm.times leaves none of {num_levels} levels to train at (fraction {self.fraction}, "
                f"with_first {self.with_first}); raise the fraction, or sampler.num_steps"
            )
        return found


class NoiseLevels:
    """The table of levels, `sigmas` (fp32, falling), and the draw of one sample's."""

    def __init__(self, config: TrainTimes, sampler: Sampler) -> None:
        self._stratified = config.draw == "stratified"
        self._places = config.places(num_steps(sampler))
        self.sigmas = sampler.sigmas_S1[: num_steps(sampler)]
        if config.grid == "dense":
            self.sigmas = dense_levels(config.shift) * float(sampler.sigmas_S1[0])

    def draw(self, count: int, draw: torch.Generator) -> torch.Tensor:
        """One sample's levels, (count,) int64 indices into `sigmas`, no two alike."""
        first, available = self._places.start, len(self._places)
        if not self._stratified:
            return first + torch.randperm(available, generator=draw)[:count]
        bounds = [first + available * part // count for part in range(count + 1)]
        return torch.cat([torch.randint(low, high, (1,), generator=draw) for low, high in pairwise(bounds)])


def dense_levels(shift: float) -> torch.Tensor:
    """1000 falling levels from 1, fp32: s u / (1 + (s - 1) u) of u = 1, .999, ..., .001 (2403.03206, eq. 23)."""
    u = torch.arange(NUM_DENSE, 0, -1, dtype=torch.float64) / NUM_DENSE
    return (shift * u / (1 + (shift - 1) * u)).float()
