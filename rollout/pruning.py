"""Early pruning: drafts that promise little contrast are dropped before they are drawn to the end and decoded.

After a few steps the sampler's estimate of the clean latent, x0 = x_t - sigma v, tells roughly what the picture will
be. A predictor gives every draft of a batch a priority from it; those of the lowest end there. They are no failures:
they are not candidates, and cost neither further steps nor decoding nor a reward. To add a predictor: a class with its
configuration, and a row in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from pydantic import Field

from raylign.config import Config
from raylign.shapes import check_shape


class PruneConfig(Config):
    """The keys of `[rollout.explore.prune]`."""

    type: Literal["x0_spread"] = "x0_spread"
    """What says which drafts are worth going on with. x0_spread: those furthest from their batch's mean picture."""
    at_step: int = Field(ge=1)
    """Draft steps after which the rest is dropped; below the drafts' num_steps."""
    keep: float = Field(default=0.5, gt=0, lt=1)
    """Share of each batch of drafts that is drawn to the end, rounded up."""

    def num_kept(self, count: int) -> int:
        """How many drafts of a batch of `count` are drawn to the end."""
        # Without the guard 0.07 x 100 keeps 8.
        return math.ceil(self.keep * count - 1e-9)


class Predictor(Protocol):
    """Says which drafts are worth going on with."""

    def priority(self, x0_NCHW: torch.Tensor) -> torch.Tensor:
        """One number per draft of a batch, (N,) fp32; the greatest go on."""
        ...


class X0Spread:
    """Root-mean-square distance of a draft's clean estimate from the mean over its batch.

    Selection wants both ends of the reward. What lies near the mean picture of its prompt is unlikely to be at either.
    """

    def priority(self, x0_NCHW: torch.Tensor) -> torch.Tensor:
        check_shape(x0_NCHW, "x0_NCHW")
        x0 = x0_NCHW.float()
        return (x0 - x0.mean(dim=0)).square().mean(dim=(1, 2, 3)).sqrt()


PREDICTORS: dict[str, Callable[[], Predictor]] = {"x0_spread": X0Spread}


def survivors(config: PruneConfig, x0_NCHW: torch.Tensor) -> list[int]:
    """Places of the drafts of a batch that go on, ascending; equal priorities in the batch's order.

    A draft that is not finite is judged by nobody, moves no mean, and goes on only where the others are too few.
    """
    finite_N = torch.isfinite(x0_NCHW).flatten(1).all(dim=1)
    judged, broken = finite_N.nonzero().flatten().tolist(), (~finite_N).nonzero().flatten().tolist()
    priority_N = PREDICTORS[config.type]().priority(x0_NCHW[finite_N])
    order = torch.argsort(priority_N, descending=True, stable=True).tolist()
    return sorted([*(judged[place] for place in order), *broken][: config.num_kept(len(finite_N))])
