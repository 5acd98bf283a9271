"""Gradients of one batch from several Python threads, each with its own part of the batch.

Tensors this small gain nothing from threads inside an operation (with `OMP_WAIT_POLICY=PASSIVE` they lose), while
whole backward passes run side by side well. The number of shards is a setting and not the number of cores, and the
sum is taken in shard order, so the result does not depend on the machine's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch


class ShardedBackward:
    """Fills `.grad` of the parameters with the mean over shards."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], num_shards: int) -> None:
        self.parameters = list(parameters)
        self.num_shards = num_shards
        self.pool = ThreadPoolExecutor(num_shards)

    def __call__(self, loss_of_shard: Callable[[int], torch.Tensor]) -> float:
        """`loss_of_shard(i)` is the mean loss of the i-th part; parts are equally large. Returns the mean loss."""

        def gradients(shard: int) -> tuple[float, tuple[torch.Tensor, ...]]:
            loss = loss_of_shard(shard)
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
            return loss.item(), found

        results = list(self.pool.map(gradients, range(self.num_shards)))
        for index, parameter in enumerate(self.parameters):
            total = results[0][1][index]
            for _, found in results[1:]:
                total = total + found[index]
            parameter.grad = total / self.num_shards
        return sum(loss for loss, _ in results) / self.num_shards
