"""Noise levels of a sampler: which ones a model walks through in S steps.

A model family's policy has a `NoiseSchedule`; the sampler's configuration asks it for so many levels. `initial_scale`
and `final_scale` bring pure noise to the first level and the last state to a clean latent; both are 1 for flow models,
whose levels go from 1 to 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


class NoiseSchedule(Protocol):
    """The noise levels a model was made for."""

    def levels(self, num_steps: int, shift: float | None) -> torch.Tensor:
        """The S + 1 falling levels of an S-step run, fp32. `shift` replaces the model's own time shift.

        Raises ConfigError for a shift where there is none to replace.
        """
        ...


@dataclass(frozen=True, slots=True)
class FlowSchedule:
    """A statically shifted flow schedule: Stable Diffusion 3."""

    shift: float = 1.0

    def levels(self, num_steps: int, shift: float | None = None) -> torch.Tensor:
        return flow_sigmas(num_steps, self.shift if shift is None else shift)


def initial_scale(sigmas_S1: torch.Tensor) -> float:
    """Standard deviation of the first state, |(1 - t, t)|: below 1 where a schedule starts short of pure noise."""
    return math.hypot(1 - float(sigmas_S1[0]), float(sigmas_S1[0]))


def final_scale(sigmas_S1: torch.Tensor) -> float:
    """Factor from the last state to the latent the decoder knows; not 1 where a schedule ends short of no noise."""
    return 1 / math.hypot(1 - float(sigmas_S1[-1]), float(sigmas_S1[-1]))


def flow_sigmas(num_steps: int, shift: float, num_train_timesteps: int = 1000) -> torch.Tensor:
    """The S + 1 noise levels of an S-step run, fp32, from 1 to 0.

    Spaced exactly as diffusers' FlowMatchEulerDiscreteScheduler does it, with the static shift of Stable Diffusion 3
    (2403.03206, eq. 23), sigma <- s sigma / (1 + (s - 1) sigma). Like the scheduler, the smallest level is the shifted
    1/num_train_timesteps, and the shift is applied to the spaced levels once more. Example: 10 steps at shift 3 start
    1, .9601, .9133 and end .2780, .0089, 0.
    """
    levels = np.linspace(1, num_train_timesteps, num_train_timesteps, dtype=np.float32)[::-1] / num_train_timesteps
    shifted = shift * levels / (1 + (shift - 1) * levels)
    timesteps = np.linspace(
        float(shifted[0]) * num_train_timesteps, float(shifted[-1]) * num_train_timesteps, num_steps
    )
    spaced = timesteps / num_train_timesteps
    spaced = shift * spaced / (1 + (shift - 1) * spaced)
    return torch.cat([torch.from_numpy(spaced.astype(np.float32)), torch.zeros(1)])
