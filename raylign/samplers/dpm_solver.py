"""DPM-Solver++ 2M: second-order multistep solver of the probability-flow ODE. Deterministic.

Source: DPM-Solver++ (2211.01095), algorithm 2, as DiffusionNFT (2509.16117) draws its rollouts (`dpm2`). With clean
predictions x0 = x - t v of this step and m of the step before, and h the steps' lengths in half log-SNR:

    x' = (t'/t) x + (1 - t') (1 - e^-h) (x0 + (h / (2 h0)) (x0 - m))

The first and the last step are first-order, which is Euler's step: (t'/t) x + (1 - t')(1 - e^-h) x0 = x + (t' - t) v.
The second is first-order as well after a start at t = 1, where h0 is infinite. Coefficients are computed in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from raylign.samplers.base import ImageSamplerConfig, Past, Transition, ode_transition, predictions
from raylign.samplers.log_snr import length_ratio, noise_ratio


class DpmSolverConfig(ImageSamplerConfig):
    """Deterministic second-order sampler: fewer steps than Euler for the same picture."""

    type: Literal["dpm_solver"] = "dpm_solver"

    @property
    def history(self) -> int:
        return 1


class DpmSolver:
    """See the module's docstring."""

    def __init__(self, config: DpmSolverConfig, sigmas_S1: torch.Tensor) -> None:
        self.config = config
        self.sigmas_S1 = sigmas_S1
        self.stochastic_S = (False,) * config.num_steps

    def transition(
        self, velocity_BCHW: torch.Tensor, state_BCHW: torch.Tensor, step: int, past: Sequence[Past] = ()
    ) -> Transition:
        euler = ode_transition(self.sigmas_S1, velocity_BCHW, state_BCHW, step)
        if not past or step == self.config.num_steps - 1:
            return euler
        before, sigma, following = self.sigmas_S1[step - 1 : step + 2].tolist()
        weight = (1 - following) * (1 - noise_ratio(sigma, following)) * length_ratio(before, sigma, following) / 2
        clean, _ = predictions(velocity_BCHW, state_BCHW, sigma)
        clean_before, _ = predictions(past[-1].velocity_BCHW, past[-1].state_BCHW, before)
        return Transition(euler.mean_BCHW + weight * (clean - clean_before), euler.std_B)
