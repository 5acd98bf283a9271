"""Flow-GRPO-Fast: Flow-GRPO (2505.05470) on a window of a few stochastic steps; all others follow the ODE.

The loss is Flow-GRPO's. The published setting draws with CPS, whose "squared" log-prob lacks 1 / (2 std²): hence a clip
range of 1e-5 where Flow-GRPO has 1e-4. The window is 3 steps, placed at random in the first half of the trajectory anew
each learner step. Deviation: its place is one for all samples of a learner step, the code draws one per batch.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from learner.algorithms.step_base import StepAlgorithm, StepAlgorithmConfig
from learner.losses import KlSpace
from raylign.errors import ConfigError
from raylign.samplers import ImageSamplerConfig
from raylign.samplers.base import SdeSamplerConfig


class FlowGrpoFastConfig(StepAlgorithmConfig):
    """Flow-GRPO-Fast with its setting for Stable Diffusion 3.5 Medium without guidance."""

    published_sampler: ClassVar[str] = "sampler.type = 'cps'"

    type: Literal["flow_grpo_fast"] = "flow_grpo_fast"
    clip_range: float = Field(default=1e-5, gt=0, lt=1)
    """Ratios beyond 1 ± this get no gradient in the advantage's direction; made for CPS' squared log-prob."""
    kl_space: KlSpace = "exact_gaussian"
    """How the distance to the reference is measured; CPS has no noise per unit of time."""

    def check_sampler(self, sampler: ImageSamplerConfig) -> None:
        super().check_sampler(sampler)
        if isinstance(sampler, SdeSamplerConfig) and sampler.window is None:
            last = max(2, sampler.num_steps // 2 - 1)
            raise ConfigError(
                f"{self.name} trains a window of stochastic steps, and the sampler has none; as published: "
                f"{self.published_sampler}, sampler.window = {{ strategy = 'random', size = 3, last = {last} }}. "
                "To train all steps take algorithm.type = 'flow_grpo'"
            )


class FlowGrpoFast(StepAlgorithm):
    """See the module's docstring."""
