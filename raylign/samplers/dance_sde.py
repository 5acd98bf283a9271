"""Dance-SDE: the stochastic sampler of DanceGRPO, with noise of one strength at every level.

Source: DanceGRPO (2505.07818) and its `flux_step`. With dt = sigma' - sigma < 0 and the noise prediction
eps = x + (1 - sigma) v, whose score is -eps / sigma:

    mean = x + dt v + eta^2 / (2 sigma) dt eps
    std  = eta sqrt(-dt)

The last step follows the ODE and has no density: the published recipe decodes its clean prediction and never trains
on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from raylign.samplers.base import Past, SdeSamplerConfig, Transition, ode_transition, predictions


class DanceSdeConfig(SdeSamplerConfig):
    """Stochastic sampler with a density per step, the last one excepted."""

    type: Literal["dance_sde"] = "dance_sde"
    num_steps: int = Field(default=16, ge=2)
    """Denoising steps."""
    eta: float = Field(default=0.3, gt=0)
    """Noise per square root of time, the same at every level."""


class DanceSde:
    """See the module's docstring."""

    def __init__(self, config: DanceSdeConfig, sigmas_S1: torch.Tensor) -> None:
        self.config = config
        self.sigmas_S1 = sigmas_S1
        self.stochastic_S = (True,) * (config.num_steps - 1) + (False,)

    def transition(
        self, velocity_BCHW: torch.Tensor, state_BCHW: torch.Tensor, step: int, past: Sequence[Past] = ()
    ) -> Transition:
        euler = ode_transition(self.sigmas_S1, velocity_BCHW, state_BCHW, step)
        if not self.stochastic_S[step]:
            return euler
        sigma, following = self.sigmas_S1[step : step + 2].tolist()
        _, noise = predictions(velocity_BCHW, state_BCHW, sigma)
        pull = self.config.eta**2 / (2 * sigma) * (following - sigma)
        std = self.config.eta * math.sqrt(sigma - following)
        return Transition(euler.mean_BCHW + pull * noise, torch.full_like(euler.std_B, std))
