"""Euler steps along the probability-flow ODE: x' = x + (sigma' - sigma) v. Deterministic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from raylign.samplers.base import ImageSamplerConfig, Past, Transition, ode_transition


class EulerOdeConfig(ImageSamplerConfig):
    """Deterministic Euler sampler: the default of forward-process algorithms and of every evaluation."""

    type: Literal["euler_ode"] = "euler_ode"


class EulerOde:
    """See the module's docstring."""

    def __init__(self, config: EulerOdeConfig, sigmas_S1: torch.Tensor) -> None:
        self.config = config
        self.sigmas_S1 = sigmas_S1
        self.stochastic_S = (False,) * config.num_steps

    def transition(
        self, velocity_BCHW: torch.Tensor, state_BCHW: torch.Tensor, step: int, past: Sequence[Past] = ()
    ) -> Transition:
        return ode_transition(self.sigmas_S1, velocity_BCHW, state_BCHW, step)
