"""Flow-GRPO (2505.05470): PPO's clipped ratio on the steps of a stochastic sampler, and a distance to the reference.

    rho = exp(log p(x' | x) - rollout's)      L = max(-A rho, -A clip(rho, 1 ± eps)) + beta KL

per step; log-probs and KL are means over latent dims. A = (r - mean of the prompt's group) / deviation of all the
step's samples, as in the code (the paper's is the group's own: `advantage_std = "group"`), clipped to ±5. The last
hundredth of the steps is not trained: at 10 steps the last one.

Guidance is the rollouts', and the same when the learner scores their steps. The KL is by default the code's, which
leaves the step's length out of the variance: the exact one times -dt, about a tenth of it at 10 steps.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from learner.algorithms.step_base import StepAlgorithm, StepAlgorithmConfig


class FlowGrpoConfig(StepAlgorithmConfig):
    """Flow-GRPO with its setting for Stable Diffusion 3.5 Medium (OCR and GenEval)."""

    type: Literal["flow_grpo"] = "flow_grpo"
    kl_weight: float = Field(default=0.04, ge=0)
    """Weight of the distance to the reference; .01 for PickScore in the paper, 0 for FLUX."""


class FlowGrpo(StepAlgorithm):
    """See the module's docstring."""
