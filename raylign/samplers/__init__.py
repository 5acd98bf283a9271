"""Samplers, of pictures and of text. To add one: a file with its config and class, and a row here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from raylign.samplers.base import Sampler, Transition
from raylign.samplers.dream import Dream, DreamConfig
from raylign.samplers.entropy_bounded import EntropyBounded, EntropyBoundedConfig
from raylign.samplers.euler_ode import EulerOde, EulerOdeConfig
from raylign.samplers.factor import Factor, FactorConfig
from raylign.samplers.flow_sde import FlowSde, FlowSdeConfig
from raylign.samplers.left_to_right import LeftToRight, LeftToRightConfig
from raylign.samplers.low_confidence import LowConfidence, LowConfidenceConfig
from raylign.samplers.schedule import flow_sigmas
from raylign.samplers.threshold import Threshold, ThresholdConfig
from raylign.samplers.tokens import Candidates, TokenSampler, TokenSamplerConfig, TokenTransition

SamplerConfig = Annotated[
    EulerOdeConfig
    | FlowSdeConfig
    | LowConfidenceConfig
    | ThresholdConfig
    | FactorConfig
    | EntropyBoundedConfig
    | DreamConfig
    | LeftToRightConfig,
    Field(discriminator="type"),
]
IMAGE_SAMPLERS = {
    EulerOdeConfig: EulerOde,
    FlowSdeConfig: FlowSde,
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


def make_sampler(config: EulerOdeConfig | FlowSdeConfig, model_shift: float) -> Sampler:
    """The image sampler a configuration names, on its own shift or the model's."""
    sigmas_S1 = flow_sigmas(config.num_steps, model_shift if config.shift is None else config.shift)
    return IMAGE_SAMPLERS[type(config)](config, sigmas_S1)  # type: ignore[arg-type]  # the table pairs them


def make_token_sampler(config: TokenSamplerConfig, canvas_length: int) -> TokenSampler:
    """The text sampler a configuration names, on a canvas. Raises ConfigError where steps or blocks do not fit it."""
    return TOKEN_SAMPLERS[type(config)](config, canvas_length)  # type: ignore[index,arg-type]  # the table pairs them


__all__ = [
    "IMAGE_SAMPLERS",
    "SAMPLERS",
    "TOKEN_SAMPLERS",
    "Candidates",
    "Sampler",
    "SamplerConfig",
    "TokenSampler",
    "TokenSamplerConfig",
    "TokenTransition",
    "Transition",
    "flow_sigmas",
    "make_sampler",
    "make_token_sampler",
]
