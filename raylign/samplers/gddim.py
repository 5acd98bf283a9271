"""gDDIM at any stochasticity eta: 0 is the ODE's Euler step, 1 is DDPM's and DDIM's ancestral step, above 1 is noisier.

Source: generalised DDIM (2206.05564), as the study of the reward gap (2510.10767) varies stochasticity with it. Walked
backwards, dx = [v + eta^2 / (1 - t) eps] dt + eta sqrt(2 t / (1 - t)) dw has the ODE's marginals for every eta; a step
is its exact solution but for the change of the prediction on the way. In flow time, t -> t' < t:

    q    = (t' (1 - t) / (t (1 - t')))^(eta^2)
    mean = (1 - t') x0 + t' q eps
    std  = t' sqrt(1 - q^2)

Flow-SDE is the Euler-Maruyama step of the same equation with a = eta sqrt(2). At t = 1 noise is redrawn whole (q = 0)
if eta > 0; a step to t' = 0 gives x0 and has no density. Unlike DDIM's own eta, which scales std, this one stays real
above 1.

Variance-preserving models are walked in flow time too: with x = x_vp |(1 - t, t)| and abar = ((1 - t) / |(1 - t, t)|)^2
a step of eta = 1 is exactly DDPO's (2305.13301), var = (1 - abar') / (1 - abar) (1 - abar / abar').
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from pydantic import field_validator

from raylign.samplers.base import Past, SdeSamplerConfig, Transition, predictions
from raylign.samplers.log_snr import noise_ratio


class GddimConfig(SdeSamplerConfig):
    """Sampler of any stochasticity; the way to compare noisy training with noiseless use."""

    type: Literal["gddim"] = "gddim"
    eta: float = 1.0
    """Stochasticity, 0 or more: 0 is the ODE, 1 is DDIM's ancestral sampling."""
    eta_end: float | None = None
    """Stochasticity of the last step, reached linearly from `eta`; constant when not given."""

    @field_validator("eta", "eta_end")
    @classmethod
    def _refuse_negative_stochasticity(cls, eta: float | None) -> float | None:
        if eta is not None and eta < 0:
            raise ValueError(
                "stochasticity cannot be negative; 0 is the deterministic ODE, 1 DDIM's ancestral sampling"
            )
        return eta

    @property
    def has_density(self) -> bool:
        return self.eta > 0 or (self.eta_end or 0) > 0


def gddim_coefficients(sigma: float, following: float, eta: float) -> tuple[float, float]:
    """(q, std) of a step; see the module's docstring."""
    q = noise_ratio(sigma, following) ** eta**2
    return q, following * math.sqrt(1 - q**2)


class Gddim:
    """See the module's docstring."""

    def __init__(self, config: GddimConfig, sigmas_S1: torch.Tensor) -> None:
        self.config = config
        self.sigmas_S1 = sigmas_S1
        end, last = config.eta if config.eta_end is None else config.eta_end, config.num_steps - 1
        self._coefficients = [
            gddim_coefficients(sigma, following, config.eta + (end - config.eta) * step / last)
            for step, (sigma, following) in enumerate(pairwise(sigmas_S1.tolist()))
        ]
        self.stochastic_S = tuple(std > 0 for _, std in self._coefficients)

    def transition(
        self, velocity_BCHW: torch.Tensor, state_BCHW: torch.Tensor, step: int, past: Sequence[Past] = ()
    ) -> Transition:
        sigma, following = self.sigmas_S1[step : step + 2].tolist()
        q, std = self._coefficients[step]
        clean, noise = predictions(velocity_BCHW, state_BCHW, sigma)
        mean = (1 - following) * clean + following * q * noise
        return Transition(mean, torch.full((len(mean),), std, device=mean.device))
