"""SA-Solver: stochastic Adams predictor and corrector, two steps deep; how AWM draws its rollouts.

Source: SA-Solver (2309.05019), data prediction, predictor and corrector of order 2, one call of the network per step
(PEC), as AWM (2509.25050) configures it. With clean predictions m_k = x_k - t_k v_k, steps of length h in half
log-SNR, h0 that of the step before, and tau the stochasticity at the level a step leads to:

    corrector  y_k  = x_k + c ((m_k - m_k-1) - (h / h0) (m_k-1 - m_k-2))                c = (1 - t_k) (1 + tau^2) h / 2
    predictor  mean = (t'/t) q y_k + (1 - t') (1 - q e^-h') m_k + c' (h' / h) (m_k - m_k-1)    q = e^-(tau^2 h')
               std  = t' sqrt(1 - q^2)

h, h0, c belong to the step that led to x_k, h', c' to the one that leaves it. The corrector replaces the slope that
the predictor had to extrapolate by the one now known; level and noise of the step are the same in both and cancel, so
two earlier states suffice. Of first order the predictor is gDDIM with eta = tau. The h / 2 in the slopes' weights is
the authors' few-step variant of the exact integral, as in diffusers; the first step is not corrected, and the last,
to level 0, gives m_k.

Steps depend on what came before them, so none has a density of its own: for forward-process algorithms.

Deviations from AWM's code: it moves the first level to .999 to avoid lambda(1), here the limit is taken. It halves the
third-last level into the second-last, in the model's own schedule; `halve_last_level` does so in a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from raylign.samplers.base import ImageSamplerConfig, Past, Transition, predictions
from raylign.samplers.log_snr import length_ratio, noise_ratio


class SaSolverConfig(ImageSamplerConfig):
    """Stochastic multistep sampler: noise in the middle of the way, good pictures at few steps."""

    type: Literal["sa_solver"] = "sa_solver"
    num_steps: int = Field(default=14, ge=1)
    """Denoising steps."""
    halve_last_level: bool = True
    """Raise the last level above 0 to half of the one before it, where the schedule's is lower."""
    tau: float = Field(default=0.4, ge=0)
    """Stochasticity; 0 is the ODE, 1 as noisy as DDIM's ancestral sampling."""
    tau_low: float = Field(default=0.3, ge=0, le=1)
    """Steps that lead below this level add no noise."""
    tau_high: float = Field(default=0.9, ge=0, le=1)
    """Steps that lead above this level add no noise."""

    @property
    def history(self) -> int:
        return 2


class SaSolver:
    """See the module's docstring."""

    def __init__(self, config: SaSolverConfig, sigmas_S1: torch.Tensor) -> None:
        self.config = config
        self.sigmas_S1 = sigmas_S1
        self._levels: list[float] = self.sigmas_S1.tolist()
        self._taus = [config.tau if config.tau_low <= level <= config.tau_high else 0.0 for level in self._levels[1:]]
        self.stochastic_S = tuple(
            tau > 0 and level > 0 for tau, level in zip(self._taus, self._levels[1:], strict=True)
        )

    def transition(
        self, velocity_BCHW: torch.Tensor, state_BCHW: torch.Tensor, step: int, past: Sequence[Past] = ()
    ) -> Transition:
        sigma, following = self._levels[step : step + 2]
        decay = noise_ratio(sigma, following)
        kept = decay ** self._taus[step] ** 2
        clean, _ = predictions(velocity_BCHW, state_BCHW, sigma)
        earlier = [
            predictions(one.velocity_BCHW, one.state_BCHW, self._levels[step - age])[0]
            for age, one in enumerate(reversed(past), start=1)
        ]
        start = self._corrected(state_BCHW.float(), step, [clean, *earlier])
        mean = following / sigma * kept * start + (1 - following) * (1 - kept * decay) * clean
        if earlier and step < self.config.num_steps - 1:
            carried_on = length_ratio(*self._levels[step - 1 : step + 2])
            mean = mean + self._slope_weight(step) * carried_on * (clean - earlier[0])
        std = following * math.sqrt(1 - kept**2)
        return Transition(mean, torch.full((len(mean),), std, device=mean.device))

    def _corrected(self, state_BCHW: torch.Tensor, step: int, clean: Sequence[torch.Tensor]) -> torch.Tensor:
        """y_k from x_k and m_k, m_k-1, m_k-2; x_k where there is no second step to look back to."""
        if len(clean) < 3:
            return state_BCHW
        extrapolated = length_ratio(*self._levels[step - 2 : step + 1]) * (clean[1] - clean[2])
        return state_BCHW + self._slope_weight(step - 1) * (clean[0] - clean[1] - extrapolated)

    def _slope_weight(self, step: int) -> float:
        """c of the step that leaves level `step`."""
        sigma, following = self._levels[step : step + 2]
        return (1 - following) * (1 + self._taus[step] ** 2) * -math.log(noise_ratio(sigma, following)) / 2
