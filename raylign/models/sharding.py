"""FSDP2: a network whose weights lie spread over the learner's ranks and are gathered block by block when asked.

Units are the blocks that a network is a list of, its output layer (text networks call it by itself), and the rest.
A unit's weights are whole on a rank only while it computes, forward or backward. Gradients are summed over ranks, not
averaged: losses are divided by the denominators of all ranks before. Every rank must ask the network the same number
of times, with or without gradient alike, or the ranks wait for each other for ever.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

OUTPUT = "lm_head"


class Shardable(Protocol):
    """What a learner with `sharding = "fsdp"` asks of a policy beyond its family's protocol."""

    network: Any
    """An FSDPModule once it is sharded."""

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]: ...

    def shard(self, mesh: DeviceMesh) -> None:
        """Spread the network over a mesh of processes and onto their devices.

        From now on `trainable_parameters` are DTensors, and an export needs tensors that were gathered.
        """
        ...


def sharding_units(network: nn.Module) -> list[nn.Module]:
    """The parts of a network that are gathered one at a time, without the rest: what it is a list of, and its output.

    diffusers' transformers are lists of blocks; its U-Nets are lists of stages, each a few blocks, which are the unit.
    """
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    blocks = [block for one in lists for block in one if next(block.parameters(), None) is not None]
    output = getattr(network, OUTPUT, None)
    return [*blocks, *([output] if isinstance(output, nn.Module) else [])]


def shard_network(network: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the weights of `network`, which may lie on the CPU, over a mesh of processes and onto their devices.

    Parameters keep their names and become DTensors, each cut along its first axis into equal parts but for the last.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    # It tells of outputs that are views, which something might then change in place. Nothing does in these networks:
    # the contract tests compare the gradients of every family.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for unit in (*sharding_units(network), network):
        # The root's weights too are let go after a forward: the next one may be of other tensors (`swapping.using`).
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
