"""What a model family offers the rest of Raylign: five verbs over latents, text conditioning and weights.

One class serves actor and learner, so what the learner scores is what the actor sampled from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from raylign.errors import ShapeError
from raylign.models.schedule import NoiseSchedule
from raylign.types import WeightVersion
from raylign.weights import WeightSnapshot

Role = Literal["rollout", "learner"]
"""A rollout policy has every component; a learner's has only what training touches."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the network is told about prompts; the leading axis is P prompts (or B samples).

    prompt_embeds_PLD: text states. pooled_PD: one vector per prompt, where the family has one. mask_PL: bool or int,
    which states count, where the family tells its network. negative: what the empty prompt says, where it was asked
    for.
    """

    prompt_embeds_PLD: torch.Tensor
    pooled_PD: torch.Tensor | None = None
    mask_PL: torch.Tensor | None = None
    negative: Conditioning | None = None

    def repeat(self, count: int) -> Conditioning:
        """Each row `count` times in a row."""
        return self._each(lambda tensor: tensor.repeat_interleave(count, dim=0))

    def rows(self, index: slice | torch.Tensor) -> Conditioning:
        """A selection of rows."""
        return self._each(lambda tensor: tensor[index])

    def to(self, device: torch.device) -> Conditioning:
        return self._each(lambda tensor: tensor.to(device))

    def without_negative(self) -> Conditioning:
        """The prompts alone."""
        return Conditioning(self.prompt_embeds_PLD, self.pooled_PD, self.mask_PL)

    def need_pooled(self) -> torch.Tensor:
        """The pooled vectors. Raises ShapeError for a family's conditioning without them."""
        if self.pooled_PD is None:
            raise ShapeError("this network takes a pooled text vector, and the conditioning has none")
        return self.pooled_PD

    def need_negative(self) -> Conditioning:
        """What the empty prompt says. Raises ShapeError where it was not asked for."""
        if self.negative is None:
            raise ShapeError("guidance needs negative conditioning, and this has none; encode with_negative=True")
        return self.negative

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Conditioning:
        def maybe(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else change(tensor)

        return Conditioning(
            change(self.prompt_embeds_PLD),
            maybe(self.pooled_PD),
            maybe(self.mask_PL),
            None if self.negative is None else self.negative._each(change),
        )


def join_conditioning(parts: Sequence[Conditioning]) -> Conditioning:
    """Rows of several conditionings, one after the other. A negative is kept where all of them have one."""

    def join(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        given = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(given) if len(given) == len(tensors) else None

    negatives = [part.negative for part in parts if part.negative is not None]
    return Conditioning(
        torch.cat([part.prompt_embeds_PLD for part in parts]),
        join([part.pooled_PD for part in parts]),
        join([part.mask_PL for part in parts]),
        join_conditioning(negatives) if len(negatives) == len(parts) else None,
    )


class DenoisingPolicy(Protocol):
    """An image flow model as Raylign sees it."""

    device: torch.device
    schedule: NoiseSchedule
    """The noise levels it was made for."""
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
    both = join_conditioning([conditioning.need_negative(), conditioning.without_negative()])
    velocity = policy.predict(torch.cat([state_BCHW, state_BCHW]), torch.cat([sigma_B, sigma_B]), both)
    unconditional, conditional = velocity.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)
