"""Samplers for picture algorithms, each a kind that the algorithm takes, and short."""

from __future__ import annotations

from typing import Any

from learner.algorithms.base import ImageAlgorithmConfig
from learner.algorithms.dance_grpo import DanceGrpoConfig
from learner.algorithms.ddpo import DdpoConfig
from learner.algorithms.flow_grpo_fast import FlowGrpoFastConfig
from learner.algorithms.mix_grpo import MixGrpoConfig
from raylign.models.schedule import FlowSchedule
from raylign.samplers import ImageSamplerConfig, Sampler, make_sampler
from raylign.samplers.cps import CpsConfig
from raylign.samplers.dance_sde import DanceSdeConfig
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.samplers.flow_sde import FlowSdeConfig
from raylign.samplers.gddim import GddimConfig
from raylign.samplers.window import WindowConfig
from raylign.types import Needs

SLIDING = WindowConfig(size=2, advance_every=1)
ANYWHERE = WindowConfig(strategy="random", size=2)
_PUBLISHED: dict[type, tuple[type[ImageSamplerConfig], dict[str, Any]]] = {
    FlowGrpoFastConfig: (CpsConfig, {"window": ANYWHERE}),
    MixGrpoConfig: (FlowSdeConfig, {"window": SLIDING, "shared_noise": True}),
    DanceGrpoConfig: (DanceSdeConfig, {"shared_noise": True}),
    # The level next to 0 of flow schedules leaves a step almost no noise, whose log-prob drowns the others.
    DdpoConfig: (GddimConfig, {"halve_last_level": True}),
}


def sampler_for(config: ImageAlgorithmConfig, num_steps: int = 5) -> Sampler:
    """The published kind of sampler, its windows cut down to two steps."""
    plain = FlowSdeConfig if Needs.LOGPROBS in config.needs else EulerOdeConfig
    kind, options = _PUBLISHED.get(type(config), (plain, {}))
    return draw_with(kind(num_steps=num_steps, **options))


def draw_with(config: ImageSamplerConfig) -> Sampler:
    """A sampler on the schedule of the toy models."""
    return make_sampler(config, FlowSchedule(3.0))
