"""A policy with other tensors in its parameters for a while: no copy, and no second model in memory."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch

PolicyTensors = dict[str, torch.Tensor]
"""Trainable tensors by name, detached from any graph."""


class Trainable(Protocol):
    """All that swapping tensors asks of a policy."""

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]: ...


def clone_tensors(policy: Trainable) -> PolicyTensors:
    """A copy of the policy's trainable tensors as they are now: of a policy just loaded, those of version 0."""
    return {name: parameter.detach().clone() for name, parameter in policy.trainable_parameters().items()}


@contextmanager
def using(policy: Trainable, tensors: Mapping[str, torch.Tensor]) -> Generator[None]:
    """Inside, the policy's parameters hold `tensors`, and no gradient is recorded; afterwards they are as before.

    Do not nest it inside an autocast region: autocast would serve casts of the tensors it saw first.
    """
    parameters = policy.trainable_parameters()
    current = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = tensors[name]
        with torch.no_grad():
            yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = current[name]
