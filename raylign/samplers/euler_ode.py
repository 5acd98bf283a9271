"""Euler steps along the probability-flow ODE: x' = x + (sigma' - sigma) v. Deterministic."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from raylign.config import Config
from raylign.samplers.base import Transition


class EulerOdeConfig(Config):
    """Deterministic Euler sampler: the default of forward-process algorithms and of every evaluation."""

    type: Literal["euler_ode"] = "euler_ode"
    num_steps: int = Field(default=10, ge=1)
    """Denoising steps."""
    guidance_scale: float = Field(default=1.0, ge=1.0)
    """Classifier-free guidance; 1 is off."""
    shift: float | None = Field(default=None, gt=0)
    """Time shift of the schedule; the model's own when not given."""


class EulerOde:
    """See the module's docstring."""

    stochastic = False

    def __init__(self, config: EulerOdeConfig, sigmas_S1: torch.Tensor) -> None:
        self.config = config
        self.sigmas_S1 = sigmas_S1

    @property
    def num_steps(self) -> int:
        return len(self.sigmas_S1) - 1

    def transition(self, velocity_BCHW: torch.Tensor, state_BCHW: torch.Tensor, step: int) -> Transition:
        delta = self.sigmas_S1[step + 1] - self.sigmas_S1[step]
        mean = state_BCHW.float() + delta * velocity_BCHW.float()
        return Transition(mean, torch.zeros(len(mean), device=mean.device))
