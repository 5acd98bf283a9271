"""A policy with other tensors in its parameters for a while: no copy, and no second model in memory.

Where a network is sharded over processes (`raylign.models.sharding`), a process holds, swaps and copies its own part of
each tensor; there a swap is a copy of that part, as the network gathers from the memory that it was given at first.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from raylign.errors import WeightError

PolicyTensors = dict[str, torch.Tensor]
"""Trainable tensors by name, detached from any graph; of a sharded network this process's part of each."""


class Trainable(Protocol):
    """All that swapping tensors asks of a policy."""

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]: ...


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether other processes hold parts of it."""
    return hasattr(tensor, "to_local")


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor lies in this process, in the same memory: all of it, unless it is sharded."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
    return sharded.to_local()


def clone_tensors(policy: Trainable) -> PolicyTensors:
    """A copy of the policy's trainable tensors as they are now: of a policy just loaded, those of version 0."""
    return {name: own_part(parameter).detach().clone() for name, parameter in policy.trainable_parameters().items()}


@contextmanager
def using(policy: Trainable, tensors: Mapping[str, torch.Tensor]) -> Generator[None]:
    """Inside, the policy's parameters hold `tensors`, and no gradient is recorded; afterwards they are as before.

    Do not nest it inside an autocast region: autocast would serve casts of the tensors it saw first. Raises WeightError
    for tensors of other shapes.
    """
    parameters = policy.trainable_parameters()
    for name, parameter in parameters.items():
        if tensors[name].shape != (held := own_part(parameter)).shape:
            raise WeightError(f"{name} is {tuple(held.shape)} here, and {tuple(tensors[name].shape)} was to be used")
    sharded = {name: own_part(parameter) for name, parameter in parameters.items() if is_sharded(parameter)}
    whole = {name: parameter for name, parameter in parameters.items() if name not in sharded}
    current = {name: parameter.data for name, parameter in whole.items()}
    current |= {name: part.clone() for name, part in sharded.items()}
    try:
        for name, parameter in whole.items():
            parameter.data = tensors[name]
        for name, part in sharded.items():
            part.copy_(tensors[name])
        with torch.no_grad():
            yield
    finally:
        for name, parameter in whole.items():
            parameter.data = current[name]
        for name, part in sharded.items():
            part.copy_(current[name])
