"""The current policy and its frozen relatives: "old" (a slow copy that losses compare with), "sampling" (another,
which makes the rollouts), "reference" (weight version 0) and "average" (a running mean that is evaluated).

A relative is a set of tensors, not a second network. To ask it something, its tensors are swapped into the network's
parameters for the length of one forward without gradient: no copy, and no second model in memory. Of a sharded network
a rank holds its part of each relative.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from raylign.errors import WeightError
from raylign.models.base import Conditioning, guided_velocity
from raylign.models.swapping import PolicyTensors, Trainable, clone_tensors, is_sharded, own_part, using
from raylign.models.tokens import TokenPrediction, TokenPrompts
from raylign.precision import Precision, autocast
from raylign.types import Needs

Relative = Literal["old", "sampling", "reference", "average"]
_NEEDED: Mapping[Needs, Relative] = {
    Needs.OLD: "old",
    Needs.SAMPLING: "sampling",
    Needs.REFERENCE: "reference",
}


def check_names(got: Mapping[str, torch.Tensor], policy: Trainable, what: str) -> None:
    """Raise WeightError naming the first tensor of `got` that does not fit the policy's trainable ones."""
    parameters = policy.trainable_parameters()
    for name in sorted(set(parameters) ^ set(got)):
        fault = "lacks" if name in parameters else "has the foreign tensor"
        raise WeightError(f"{what} {fault} {name}; it belongs to another model or adapter")
    for name, parameter in parameters.items():
        if got[name].shape != parameter.shape:
            raise WeightError(f"{what}: {name} must be {tuple(parameter.shape)}, got {tuple(got[name].shape)}")


def decay_towards(policy: Trainable, tensors: PolicyTensors, decay: float) -> None:
    """In place: tensors <- decay * tensors + (1 - decay) * current. At decay 0 an exact copy."""
    for name, parameter in policy.trainable_parameters().items():
        held = own_part(parameter).detach()
        if decay == 0.0:
            tensors[name].copy_(held)
        else:
            tensors[name].mul_(decay).add_(held, alpha=1 - decay)


class PolicySet:
    """The current policy with the relatives an algorithm needs; what a loss asks for velocities or logits."""

    def __init__(self, policy: Any, precision: Precision, needs: Needs, average: bool = False) -> None:
        """`policy` is a DenoisingPolicy, which answers velocities, or a TokenPolicy, which answers logits.

        `needs` are the algorithm's: which relatives there are. `average`: whether there is a running mean too.
        """
        self.policy = policy
        self.precision: Precision = precision
        # A cast of a weight that was gathered for one block must not stay when the weight goes.
        self._cache_casts = not any(is_sharded(one) for one in policy.trainable_parameters().values())
        wanted: list[Relative] = [relative for need, relative in _NEEDED.items() if need in needs]
        if average:
            wanted.append("average")
        self.relatives: dict[Relative, PolicyTensors] = {relative: clone_tensors(policy) for relative in wanted}

    def velocity(
        self,
        state_NCHW: torch.Tensor,
        sigma_N: torch.Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
    ) -> torch.Tensor:
        """The current policy's velocity, (N, C, H, W) fp32, with gradient where the caller records one."""
        # One autocast region per forward: its cache of cast weights must not outlive a swap.
        with autocast(self.precision, self.policy.device, self._cache_casts):
            velocity = guided_velocity(self.policy, state_NCHW, sigma_N, conditioning, guidance_scale)
        return velocity.float()

    def velocity_of(
        self,
        relative: Relative,
        state_NCHW: torch.Tensor,
        sigma_N: torch.Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
    ) -> torch.Tensor:
        """A relative's velocity, without gradient. Ask before the current policy's: its graph reads the parameters."""
        with using(self.policy, self.relatives[relative]):
            return self.velocity(state_NCHW, sigma_N, conditioning, guidance_scale)

    def predict_tokens(
        self,
        canvas_NL: torch.Tensor,
        prompts: TokenPrompts,
        relative: Relative | None = None,
        span: slice | None = None,
    ) -> TokenPrediction:
        """The logits of a canvas or a span of it: the current policy's, with gradient where one is recorded, or a
        relative's.

        Ask relatives before the current policy: its graph reads the parameters.
        """
        if relative is not None:
            with using(self.policy, self.relatives[relative]):
                return self.predict_tokens(canvas_NL, prompts, span=span)
        with autocast(self.precision, self.policy.device, self._cache_casts):
            return self.policy.predict(canvas_NL, prompts, span)
