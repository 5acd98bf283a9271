"""MixGRPO (2507.21802): Flow-GRPO's step inside a window that slides over the trajectory, the ODE outside of it.

Only the window's steps are trained, and what they change is all that sets siblings apart: they start from one noise.
Windows are the sampler's (`raylign.samplers.window`): 4 steps that move on by 1 every 25 learner steps, and start over.
Each reward is normalised in its group before they are added by weight; deviations are unbiased. Steps after the window
are plain Euler steps, not the compressed multistep ones of MixGRPO-Flash. The last step of all is never trained.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from learner.advantages import AdvantageStd
from learner.algorithms.step_base import StepAlgorithm, StepAlgorithmConfig
from raylign.errors import ConfigError
from raylign.samplers import ImageSamplerConfig
from raylign.samplers.base import SdeSamplerConfig


class MixGrpoConfig(StepAlgorithmConfig):
    """MixGRPO with its setting for FLUX.1."""

    published_sampler: ClassVar[str] = "sampler.type = 'flow_sde'"

    type: Literal["mix_grpo"] = "mix_grpo"
    advantage_std: AdvantageStd = "per_reward"
    """Normalise each reward by its own group's deviation, then add them by weight."""
    advantage_eps: float = Field(default=1e-8, gt=0)
    """Added to the deviation that advantages are divided by."""
    advantage_unbiased: bool = True
    """Divide by the deviation with one degree of freedom less."""

    def check_sampler(self, sampler: ImageSamplerConfig) -> None:
        super().check_sampler(sampler)
        if isinstance(sampler, SdeSamplerConfig) and (sampler.window is None or not sampler.shared_noise):
            missing = "no window" if sampler.window is None else "shared_noise = false"
            raise ConfigError(
                f"{self.name} trains a window of stochastic steps of siblings that start from one noise, and the "
                f"sampler has {missing}; as published: sampler.window = {{ strategy = 'progressive', size = 4 }}, "
                "sampler.shared_noise = true. Without them take algorithm.type = 'flow_grpo'"
            )


class MixGrpo(StepAlgorithm):
    """See the module's docstring."""
