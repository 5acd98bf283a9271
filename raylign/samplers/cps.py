"""CPS: coefficients-preserving sampling, whose states hold exactly the noise their level says.

Source: CPS (2509.05952), as Flow-GRPO-Fast draws with it. With clean and noise predictions x0 and eps:

    std  = sigma' sin(a pi / 2)
    mean = (1 - sigma') x0 + sqrt(sigma'^2 - std^2) eps

Fresh noise replaces a share of the predicted noise, never adds to it: std <= sigma'. The share is one of each step,
whatever its length, so no stochastic differential equation is approached as steps grow. A step to level 0 adds no
noise and has no density.

The published log-prob is -(x' - mean)^2 alone, without 1 / (2 std^2) and constants: ratios, and with them clip ranges,
are not comparable with those of the other samplers. `density = "gaussian"` makes them so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from raylign.samplers.base import Density, Past, SdeSamplerConfig, Transition, predictions


class CpsConfig(SdeSamplerConfig):
    """Stochastic sampler with clean pictures at few steps."""

    type: Literal["cps"] = "cps"
    noise_level: float = Field(default=0.8, gt=0, le=1)
    """a in the formula: 1 replaces all predicted noise by fresh noise."""
    density: Density = "squared"
    """squared: the log-prob is -(x' - mean)^2, as published. gaussian: the true log-density."""


class Cps:
    """See the module's docstring."""

    def __init__(self, config: CpsConfig, sigmas_S1: torch.Tensor) -> None:
        self.config = config
        self.sigmas_S1 = sigmas_S1
        self.stochastic_S = tuple(following > 0 for following in sigmas_S1[1:].tolist())

    def transition(
        self, velocity_BCHW: torch.Tensor, state_BCHW: torch.Tensor, step: int, past: Sequence[Past] = ()
    ) -> Transition:
        sigma, following = self.sigmas_S1[step : step + 2].tolist()
        clean, noise = predictions(velocity_BCHW, state_BCHW, sigma)
        angle = self.config.noise_level * math.pi / 2
        mean = (1 - following) * clean + following * math.cos(angle) * noise
        std_B = torch.full((len(mean),), following * math.sin(angle), device=mean.device)
        return Transition(mean, std_B, self.config.density)
