"""What an image sampler is: noise levels and, for each step, the distribution of the next state.

Flow convention used everywhere: sigma = t in [0, 1], 1 is noise, x_t = (1 - t) x_0 + t eps, the model predicts
v = eps - x_0, and sampling walks sigma downwards. A model trained on another noise process (Stable Diffusion 1.5) is
brought into it by an exact change of variables in its family's file, so every sampler serves every model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import Field, model_validator

from raylign.config import Config
from raylign.errors import ShapeError
from raylign.samplers.window import WindowConfig, window_starts
from raylign.shapes import check_shape

Density = Literal["gaussian", "squared"]
"""gaussian: the log-density. squared: -(x' - mean)² alone, as CPS is published; a clip range fits one of them only."""


@dataclass(frozen=True, slots=True)
class Transition:
    """The distribution of the next state: a diagonal Gaussian, or a point when `std_B` is zero.

    Sampling and scoring come from this one object, so they cannot drift apart.
    mean_BCHW: fp32. std_B: fp32, one standard deviation per item.
    """

    mean_BCHW: torch.Tensor
    std_B: torch.Tensor
    density: Density = "gaussian"

    def sample(self, noise_BCHW: torch.Tensor) -> torch.Tensor:
        """Mean + std * noise, (B, C, H, W)."""
        return self.mean_BCHW + self.std_B.view(-1, 1, 1, 1) * noise_BCHW

    def logprob(self, next_BCHW: torch.Tensor) -> torch.Tensor:
        """Log-density of a next state, averaged over latent dims (Flow-GRPO's convention): (B,), fp32.

        Raises ShapeError for a deterministic step: a point mass has no density.
        """
        check_shape(next_BCHW, "next_BCHW")
        if not bool((self.std_B > 0).all()):
            raise ShapeError("log-prob of a deterministic step asked for (std 0); use a stochastic sampler")
        squared = (next_BCHW.float() - self.mean_BCHW) ** 2
        if self.density == "squared":
            return -squared.mean(dim=(1, 2, 3))
        std = self.std_B.view(-1, 1, 1, 1)
        density = -squared / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
        return density.mean(dim=(1, 2, 3))


@dataclass(frozen=True, slots=True)
class Past:
    """An earlier step, for samplers that look back: where it started, and the velocity there."""

    state_BCHW: torch.Tensor
    velocity_BCHW: torch.Tensor


class ImageSamplerConfig(Config):
    """Keys that every image sampler has; a subclass adds `type` and its own."""

    num_steps: int = Field(default=10, ge=1)
    """Denoising steps."""
    guidance_scale: float = Field(default=1.0, ge=1.0)
    """Classifier-free guidance; 1 is off."""
    shift: float | None = Field(default=None, gt=0)
    """Time shift of the schedule; the model's own when not given."""
    halve_last_level: bool = False
    """Raise the level before the end to half of the one before it, where the schedule's is lower."""

    @property
    def has_density(self) -> bool:
        """Whether steps have a log-prob that policy-ratio algorithms can use."""
        return False

    @property
    def history(self) -> int:
        """How many earlier steps a step looks back to; such steps cannot be scored one by one."""
        return 0


class SdeSamplerConfig(ImageSamplerConfig):
    """Keys of samplers whose steps have a density."""

    num_steps: int = Field(default=10, ge=2)
    """Denoising steps."""
    window: WindowConfig | None = None
    """Only these steps are stochastic, the others follow the ODE; all that can be when not given."""
    shared_noise: bool = False
    """All siblings of a prompt start from the same noise, so that only the steps' noise sets them apart."""

    @model_validator(mode="after")
    def _refuse_a_window_that_does_not_fit(self) -> SdeSamplerConfig:
        if self.window is not None:
            window_starts(self.window, self.num_steps)
        return self

    @property
    def has_density(self) -> bool:
        return True


class Sampler(Protocol):
    """One step's distribution, bound to a schedule. Adding one: `samplers/__init__.py` holds the table."""

    @property
    def config(self) -> ImageSamplerConfig:
        """As configured."""
        ...

    @property
    def sigmas_S1(self) -> torch.Tensor:
        """Noise levels of the S + 1 states, fp32, falling; 1 to 0 for flow models."""
        ...

    @property
    def stochastic_S(self) -> tuple[bool, ...]:
        """Which steps add noise, before any window."""
        ...

    def transition(
        self, velocity_BCHW: torch.Tensor, state_BCHW: torch.Tensor, step: int, past: Sequence[Past] = ()
    ) -> Transition:
        """The distribution of state `step + 1` given state `step` and the model's velocity there, in fp32.

        past: the last `config.history` steps at most, newest last.
        """
        ...


def num_steps(sampler: Sampler) -> int:
    """S."""
    return len(sampler.sigmas_S1) - 1


def ode_transition(
    sigmas_S1: torch.Tensor, velocity_BCHW: torch.Tensor, state_BCHW: torch.Tensor, step: int
) -> Transition:
    """The Euler step along the probability-flow ODE, x + (sigma' - sigma) v, in fp32."""
    delta = sigmas_S1[step + 1] - sigmas_S1[step]
    mean = state_BCHW.float() + delta * velocity_BCHW.float()
    return Transition(mean, torch.zeros(len(mean), device=mean.device))


def predictions(
    velocity_BCHW: torch.Tensor, state_BCHW: torch.Tensor, sigma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a velocity says the state is made of, x = (1 - sigma) x0 + sigma eps: (x0, eps), fp32."""
    velocity, state = velocity_BCHW.float(), state_BCHW.float()
    return state - sigma * velocity, state + (1 - sigma) * velocity


def halve_last_level(sigmas_S1: torch.Tensor) -> torch.Tensor:
    """The levels with the last but one raised to half of the one before it, if it was lower; a copy.

    Schedules made as diffusers makes them end .278, .0089, 0 at 10 steps. That one step is as long as several in
    log-SNR: first-order steps err most in it, and multistep solvers carry a line on too far.
    """
    levels_S1 = sigmas_S1.clone()
    if len(levels_S1) > 3:
        levels_S1[-2] = torch.maximum(levels_S1[-2], levels_S1[-3] / 2)
    return levels_S1
