"""Samplers, of pictures and of text. To add one: a file with its config and class, and a row here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from raylign.models.schedule import FlowSchedule, NoiseSchedule, flow_sigmas
from raylign.samplers.base import (
    ImageSamplerConfig,
    Past,
    Sampler,
    Transition,
    halve_last_level,
    num_steps,
    ode_transition,
)
from raylign.samplers.cps import Cps, CpsConfig
from raylign.samplers.dance_sde import DanceSde, DanceSdeConfig
from raylign.samplers.dpm_solver import DpmSolver, DpmSolverConfig
from raylign.samplers.dream import Dream, DreamConfig
from raylign.samplers.entropy_bounded import EntropyBounded, EntropyBoundedConfig
from raylign.samplers.euler_ode import EulerOde, EulerOdeConfig
from raylign.samplers.factor import Factor, FactorConfig
from raylign.samplers.flow_sde import FlowSde, FlowSdeConfig
from raylign.samplers.gddim import Gddim, GddimConfig
from raylign.samplers.left_to_right import LeftToRight, LeftToRightConfig
from raylign.samplers.low_confidence import LowConfidence, LowConfidenceConfig
from raylign.samplers.sa_solver import SaSolver, SaSolverConfig
from raylign.samplers.threshold import Threshold, ThresholdConfig
from raylign.samplers.tokens import Candidates, TokenSampler, TokenSamplerConfig, TokenTransition

SamplerConfig = Annotated[
    EulerOdeConfig
    | DpmSolverConfig
    | FlowSdeConfig
    | DanceSdeConfig
    | CpsConfig
    | GddimConfig
    | SaSolverConfig
    | LowConfidenceConfig
    | ThresholdConfig
    | FactorConfig
    | EntropyBoundedConfig
    | DreamConfig
    | LeftToRightConfig,
    Field(discriminator="type"),
]
IMAGE_SAMPLERS: dict[type[ImageSamplerConfig], Callable[..., Sampler]] = {
    EulerOdeConfig: EulerOde,
    DpmSolverConfig: DpmSolver,
    FlowSdeConfig: FlowSde,
    DanceSdeConfig: DanceSde,
    CpsConfig: Cps,
    GddimConfig: Gddim,
    SaSolverConfig: SaSolver,
}
TOKEN_SAMPLERS = {
    LowConfidenceConfig: LowConfidence,
    ThresholdConfig: Threshold,
    FactorConfig: Factor,
    EntropyBoundedConfig: EntropyBounded,
    DreamConfig: Dream,
    LeftToRightConfig: LeftToRight,
}
SAMPLERS = {**IMAGE_SAMPLERS, **TOKEN_SAMPLERS}


def make_sampler(config: ImageSamplerConfig, schedule: NoiseSchedule) -> Sampler:
    """The image sampler a configuration names, on the model's noise levels."""
    sigmas_S1 = schedule.levels(config.num_steps, config.shift)
    return IMAGE_SAMPLERS[type(config)](config, halve_last_level(sigmas_S1) if config.halve_last_level else sigmas_S1)


def make_token_sampler(config: TokenSamplerConfig, canvas_length: int) -> TokenSampler:
    """The text sampler a configuration names, on a canvas. Raises ConfigError where steps or blocks do not fit it."""
    return TOKEN_SAMPLERS[type(config)](config, canvas_length)  # type: ignore[index,arg-type]  # the table pairs them


__all__ = [
    "IMAGE_SAMPLERS",
    "SAMPLERS",
    "TOKEN_SAMPLERS",
    "Candidates",
    "FlowSchedule",
    "ImageSamplerConfig",
    "NoiseSchedule",
    "Past",
    "Sampler",
    "SamplerConfig",
    "TokenSampler",
    "TokenSamplerConfig",
    "TokenTransition",
    "Transition",
    "flow_sigmas",
    "make_sampler",
    "make_token_sampler",
    "num_steps",
    "ode_transition",
]
