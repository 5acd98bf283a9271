"""Flow-SDE: the stochastic sampler of Flow-GRPO, with the ODE's marginals in the limit of many steps.

Source: Flow-GRPO (2505.05470), eq. 9 and its `sde_step_with_logprob`. With dt = sigma' - sigma < 0 and
sigma* = sigma, except that a first level of 1, or nearly, uses the second level (the coefficient is singular at 1):

    s    = a sqrt(sigma / (1 - sigma*))
    mean = x (1 + s^2 / (2 sigma) dt) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt
    std  = s sqrt(-dt)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from raylign.samplers.base import Past, SdeSamplerConfig, Transition

NEARLY_PURE = 0.995
"""From here on a first level counts as 1: SANA's solver schedules start at .9997, where a / sqrt(1 - sigma) is 38 a."""


class FlowSdeConfig(SdeSamplerConfig):
    """Stochastic sampler with a density per step: what policy-ratio algorithms (Flow-GRPO) need."""

    type: Literal["flow_sde"] = "flow_sde"
    noise_level: float = Field(default=0.7, gt=0)
    """a in the formula: .7 for Stable Diffusion 3.5 Medium, .9 for FLUX."""


class FlowSde:
    """See the module's docstring."""

    def __init__(self, config: FlowSdeConfig, sigmas_S1: torch.Tensor) -> None:
        self.config = config
        self.sigmas_S1 = sigmas_S1
        self.stochastic_S = (True,) * config.num_steps

    def transition(
        self, velocity_BCHW: torch.Tensor, state_BCHW: torch.Tensor, step: int, past: Sequence[Past] = ()
    ) -> Transition:
        sigma = float(self.sigmas_S1[step])
        delta = float(self.sigmas_S1[step + 1]) - sigma
        regular = float(self.sigmas_S1[1]) if step == 0 and sigma >= NEARLY_PURE else sigma
        noise_scale = self.config.noise_level * math.sqrt(sigma / (1 - regular))
        pull = noise_scale**2 / (2 * sigma) * delta
        push = (1 + noise_scale**2 * (1 - sigma) / (2 * sigma)) * delta
        mean = state_BCHW.float() * (1 + pull) + velocity_BCHW.float() * push
        std = noise_scale * math.sqrt(-delta)
        return Transition(mean, torch.full((len(mean),), std, device=mean.device))
