"""Samplers. To add one: a file with its config and class, and a row here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from raylign.samplers.base import Sampler, Transition
from raylign.samplers.euler_ode import EulerOde, EulerOdeConfig
from raylign.samplers.flow_sde import FlowSde, FlowSdeConfig
from raylign.samplers.schedule import flow_sigmas

SamplerConfig = Annotated[EulerOdeConfig | FlowSdeConfig, Field(discriminator="type")]
SAMPLERS = {
    EulerOdeConfig: EulerOde,
    FlowSdeConfig: FlowSde,
}


def make_sampler(config: EulerOdeConfig | FlowSdeConfig, model_shift: float) -> Sampler:
    """The sampler a configuration names, on its own shift or the model's."""
    sigmas_S1 = flow_sigmas(config.num_steps, model_shift if config.shift is None else config.shift)
    return SAMPLERS[type(config)](config, sigmas_S1)  # type: ignore[arg-type]  # the table pairs them


__all__ = ["SAMPLERS", "Sampler", "SamplerConfig", "Transition", "flow_sigmas", "make_sampler"]
