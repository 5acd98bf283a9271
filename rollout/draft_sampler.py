"""How drafts are drawn: from the rollouts' sampler, cheaper and without noise.

A draft is worth something as long as it ranks the noise as the full drawing of the same key would. So it follows the
rollouts' schedule and guidance in fewer steps. Where the rollouts add noise on the way, it takes the ODE of the same
marginals: noise of other steps would be other noise.
"""

from __future__ import annotations

from typing import Any

from raylign.config import parse_config
from raylign.errors import ConfigError
from raylign.samplers import IMAGE_SAMPLERS, ImageSamplerConfig, SamplerConfig
from raylign.samplers.entropy_bounded import EntropyBoundedConfig
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.samplers.sa_solver import SaSolverConfig
from raylign.samplers.tokens import TokenSamplerConfig
from rollout.explore import ExploreConfig


def draft_sampler(sampler: SamplerConfig, explore: ExploreConfig) -> SamplerConfig:
    """The sampler of drafts for rollouts that `sampler` draws; `explore.sampler` is it where one is given.

    Pictures: the rollouts' own in `explore.num_steps` steps, or the Euler ODE on their noise levels if that one adds
    noise. Texts: the rollouts' own, with `explore.gamma` as the entropy budget of every draft. Raises ConfigError for
    what the rollouts' model cannot draw, or a budget for a sampler without one.
    """
    if explore.sampler is not None:
        if (type(explore.sampler) in IMAGE_SAMPLERS) != (type(sampler) in IMAGE_SAMPLERS):
            raise ConfigError(
                f"rollout.explore.sampler.type {explore.sampler.type!r} cannot draw drafts for sampler.type "
                f"{sampler.type!r}: one is of pictures, the other of texts; choose another, or leave it out"
            )
        return explore.sampler
    if isinstance(sampler, ImageSamplerConfig):
        return _fewer_steps(sampler, explore.num_steps)
    return _greater_budget(sampler, explore.gamma)


def adds_noise(sampler: ImageSamplerConfig) -> bool:
    """Whether any step is stochastic, with a density or without."""
    return sampler.has_density or (isinstance(sampler, SaSolverConfig) and sampler.tau > 0)


def _fewer_steps(sampler: ImageSamplerConfig, num_steps: int) -> Any:
    if adds_noise(sampler):
        kept = {name: getattr(sampler, name) for name in ("guidance_scale", "shift", "halve_last_level")}
        return parse_config(EulerOdeConfig, {**kept, "num_steps": num_steps}, "the drafts' sampler")
    return parse_config(type(sampler), {**sampler.model_dump(), "num_steps": num_steps}, "the drafts' sampler")


def _greater_budget(sampler: TokenSamplerConfig, gamma: float | None) -> Any:
    if gamma is None:
        return sampler
    if not isinstance(sampler, EntropyBoundedConfig):
        raise ConfigError(
            f"rollout.explore.gamma = {gamma:g} is an entropy budget, which sampler.type "
            f"{getattr(sampler, 'type', '')!r} does not have; set sampler.type = 'entropy_bounded', or give "
            "rollout.explore.sampler"
        )
    return parse_config(
        type(sampler), {**sampler.model_dump(), "gamma": gamma, "budget": "fixed"}, "the drafts' sampler"
    )
