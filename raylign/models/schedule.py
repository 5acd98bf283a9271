"""Noise levels of a sampler: which ones a model walks through in S steps.

A model family's policy has a `NoiseSchedule`; the sampler's configuration asks it for so many levels. `initial_scale`
and `final_scale` bring pure noise to the first level and the last state to a clean latent; both are 1 for flow models,
whose levels go from 1 to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch


class NoiseSchedule(Protocol):
    """The noise levels a model was made for."""

    def levels(self, num_steps: int, shift: float | None) -> torch.Tensor:
        """The S + 1 falling levels of an S-step run, fp32. `shift` replaces the model's own time shift.

        Raises ConfigError for a shift where there is none to replace.
        """
        ...


Spacing = Literal["trained", "even", "solver"]
"""How levels are spaced before the time shift.

trained: over the trained levels and shifted once more, `flow_sigmas` (Stable Diffusion 3, SANA with Euler). even:
`even_flow_sigmas` (FLUX.1). solver: `solver_flow_sigmas` (SANA with DPM-Solver).
"""


@dataclass(frozen=True, slots=True)
class FlowSchedule:
    """A time-shifted flow schedule. A shift that depends on the picture's size is a number by the time it is here."""

    shift: float = 1.0
    spacing: Spacing = "trained"

    def levels(self, num_steps: int, shift: float | None = None) -> torch.Tensor:
        return _SPACINGS[self.spacing](num_steps, self.shift if shift is None else shift)


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
    shifted = _shifted(levels, shift)
    timesteps = np.linspace(
        float(shifted[0]) * num_train_timesteps, float(shifted[-1]) * num_train_timesteps, num_steps
    )
    return _ending_at_zero(_shifted(timesteps / num_train_timesteps, shift))


def even_flow_sigmas(num_steps: int, shift: float) -> torch.Tensor:
    """Evenly spaced from 1 to 1/S, then shifted, and 0: how `FluxPipeline` asks its scheduler. (S + 1,), fp32.

    Example: 4 steps at shift 3 are 1, .9, .75, .5, 0.
    """
    return _ending_at_zero(_shifted(np.linspace(1.0, 1 / num_steps, num_steps), shift))


def solver_flow_sigmas(num_steps: int, shift: float, num_train_timesteps: int = 1000) -> torch.Tensor:
    """As DPMSolverMultistepScheduler spaces flow models: from 1 - 1/1000 down by equal parts, shifted, and 0.

    (S + 1,), fp32. The first level is short of 1, at shift 3 it is .99967. Example: 2 steps at shift 1 are .999,
    .4995, 0.
    """
    sigmas = 1 - np.linspace(1, 1 / num_train_timesteps, num_steps + 1)[::-1]
    return _ending_at_zero(_shifted(sigmas[:-1], shift))


def _shifted(levels: np.ndarray, shift: float) -> np.ndarray:
    return shift * levels / (1 + (shift - 1) * levels)


def _ending_at_zero(levels: np.ndarray) -> torch.Tensor:
    return torch.cat([torch.from_numpy(levels.astype(np.float32)), torch.zeros(1)])


_SPACINGS: dict[Spacing, Callable[[int, float], torch.Tensor]] = {
    "trained": flow_sigmas,
    "even": even_flow_sigmas,
    "solver": solver_flow_sigmas,
}
