"""What a model family offers the rest of Raylign: five verbs over latents, text conditioning and weights.

One class serves actor and learner, so what the learner scores is what the actor sampled from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from raylign.types import WeightVersion
from raylign.weights import WeightSnapshot

Role = Literal["rollout", "learner"]
"""A rollout policy has every component; a learner's has only what training touches."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the network is told about prompts; the leading axis is P prompts (or B samples).

    prompt_embeds_PLD, pooled_PD: text encodings. The `negative` pair is there when guidance is on.
    """

    prompt_embeds_PLD: torch.Tensor
    pooled_PD: torch.Tensor
    negative_embeds_PLD: torch.Tensor | None = None
    negative_pooled_PD: torch.Tensor | None = None

    def repeat(self, count: int) -> Conditioning:
        """Each row `count` times in a row."""
        return self._each(lambda tensor: tensor.repeat_interleave(count, dim=0))

    def rows(self, index: slice | torch.Tensor) -> Conditioning:
        """A selection of rows."""
        return self._each(lambda tensor: tensor[index])

    def to(self, device: torch.device) -> Conditioning:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Conditioning:
        negative = self.negative_embeds_PLD, self.negative_pooled_PD
        return Conditioning(
            change(self.prompt_embeds_PLD),
            change(self.pooled_PD),
            *(None if tensor is None else change(tensor) for tensor in negative),
        )


def join_conditioning(parts: Sequence[Conditioning]) -> Conditioning:
    """Rows of several conditionings, one after the other."""
    negatives = [p.negative_embeds_PLD for p in parts], [p.negative_pooled_PD for p in parts]
    return Conditioning(
        torch.cat([p.prompt_embeds_PLD for p in parts]),
        torch.cat([p.pooled_PD for p in parts]),
        *(None if tensors[0] is None else torch.cat([t for t in tensors if t is not None]) for tensors in negatives),
    )


class DenoisingPolicy(Protocol):
    """An image flow model as Raylign sees it."""

    device: torch.device
    schedule_shift: float
    """Time shift of the model's own noise schedule."""
    latent_shape: tuple[int, int, int]
    """(C, H, W) of one latent."""

    def encode(self, text: str, with_negative: bool) -> Conditioning:
        """One prompt's conditioning, P = 1. One at a time, so that it never depends on its neighbours."""
        ...

    def predict(self, state_BCHW: torch.Tensor, sigma_B: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The velocity v = eps - x_0, fp32, of states at noise levels `sigma_B` in [0, 1]."""
        ...

    def decode(self, state_BCHW: torch.Tensor) -> np.ndarray:
        """Pictures of clean latents: uint8 RGB (B, height, width, 3)."""
        ...

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """By name, in a fixed order: an adapter's tensors, or all of the network's."""
        ...

    def enable_gradient_checkpointing(self) -> None:
        """From now on recompute activations in the backward pass instead of keeping them."""
        ...

    def export_weights(self, version: WeightVersion, tensors: dict[str, torch.Tensor] | None = None) -> WeightSnapshot:
        """Publish the trainable tensors, or another set of the same names and shapes (an `old` policy)."""
        ...

    def load_weights(self, snapshot: WeightSnapshot) -> None:
        """Verify, then swap in a snapshot. Raises WeightError and changes nothing when it does not fit."""
        ...


def guided_velocity(
    policy: DenoisingPolicy,
    state_BCHW: torch.Tensor,
    sigma_B: torch.Tensor,
    conditioning: Conditioning,
    guidance_scale: float,
) -> torch.Tensor:
    """Velocity under classifier-free guidance (2207.12598): u + w (c - u) in one doubled batch; plain at w = 1."""
    if guidance_scale == 1.0:
        return policy.predict(state_BCHW, sigma_B, conditioning)
    if conditioning.negative_embeds_PLD is None or conditioning.negative_pooled_PD is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs negative conditioning; encode with_negative=True")
    both = Conditioning(
        torch.cat([conditioning.negative_embeds_PLD, conditioning.prompt_embeds_PLD]),
        torch.cat([conditioning.negative_pooled_PD, conditioning.pooled_PD]),
    )
    velocity = policy.predict(torch.cat([state_BCHW, state_BCHW]), torch.cat([sigma_B, sigma_B]), both)
    unconditional, conditional = velocity.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)
