"""What a learner's state is made of; `Learner` makes and takes it, `checkpoint` writes and reads it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from raylign.types import JsonValue


@dataclass(frozen=True, slots=True)
class LearnerState:
    """Everything a learner needs to go on exactly: named tensors on the CPU, and plain values."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    values: dict[str, JsonValue] = field(default_factory=dict[str, JsonValue])


def policy_tensors(state: LearnerState) -> dict[str, torch.Tensor]:
    """The trained policy's tensors, by the names `trainable_parameters` gives them: its running mean, if one was kept,
    as that is what was evaluated."""
    section = "average/" if any(name.startswith("average/") for name in state.tensors) else "params/"
    return {name.removeprefix(section): tensor for name, tensor in state.tensors.items() if name.startswith(section)}
