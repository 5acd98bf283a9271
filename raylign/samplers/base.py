"""What a sampler is: a list of noise levels and, for each step, the distribution of the next state.

Flow convention used everywhere: sigma = t in [0, 1], 1 is noise, x_t = (1 - t) x_0 + t eps, the model predicts
v = eps - x_0, and sampling walks sigma downwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from raylign.errors import ShapeError
from raylign.shapes import check_shape


@dataclass(frozen=True, slots=True)
class Transition:
    """The distribution of the next state: a diagonal Gaussian, or a point when `std_B` is zero.

    Sampling and scoring come from this one object, so they cannot drift apart.
    mean_BCHW: fp32. std_B: fp32, one standard deviation per item.
    """

    mean_BCHW: torch.Tensor
    std_B: torch.Tensor

    def sample(self, noise_BCHW: torch.Tensor) -> torch.Tensor:
        """Mean + std * noise, (B, C, H, W)."""
        return self.mean_BCHW + self.std_B.view(-1, 1, 1, 1) * noise_BCHW

    def logprob(self, next_BCHW: torch.Tensor) -> torch.Tensor:
        """Log-density of a next state, averaged over latent dims (Flow-GRPO's convention): (B,), fp32.

        Raises ShapeError for a deterministic step: a point mass has no density.
        """
        check_shape(next_BCHW, "next_BCHW")
        if not bool((self.std_B > 0).all()):
            raise ShapeError("log-prob of a deterministic step asked for (std 0); use a stochastic sampler")
        std = self.std_B.view(-1, 1, 1, 1)
        squared = (next_BCHW.float() - self.mean_BCHW) ** 2
        density = -squared / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
        return density.mean(dim=(1, 2, 3))


class Sampler(Protocol):
    """One step's distribution, bound to a schedule. Adding one: `samplers/__init__.py` holds the table."""

    stochastic: bool
    """Whether steps have a density, so that LOGPROBS can be recorded."""
    sigmas_S1: torch.Tensor
    """Noise levels of the S + 1 states, fp32, from 1 down to 0."""

    @property
    def num_steps(self) -> int:
        """S."""
        ...

    def transition(self, velocity_BCHW: torch.Tensor, state_BCHW: torch.Tensor, step: int) -> Transition:
        """The distribution of state `step + 1` given state `step` and the model's velocity there, in fp32."""
        ...
