"""The trained tensors as they lie on a rank, with their gradients: whole on each (`Replicated`) or in part (`Sharded`).

What a learner does with them element by element (AdamW, slow copies, moments, checkpoints) is the same for both, on
`tensors`. Replicated ranks meet once per update, to sum gradients. Sharded ones meet in every forward and backward too,
so they must take the same number of micro-batches, and in whatever makes a tensor whole again (`gather`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from learner.parallel import GradientBucket, RankGroup
from learner.state import Rows
from raylign.models.sharding import Shardable
from raylign.models.swapping import is_sharded, own_part


class Trained(Protocol):
    """See the module."""

    tensors: dict[str, torch.Tensor]
    """This rank's part of each trained tensor; `.grad` is that of the update after `sum_gradients`."""
    rows: Mapping[str, Rows]
    """Which part it is, of those that are not whole."""

    def begin_update(self) -> None:
        """Forget all gradients."""
        ...

    def before_backward(self, is_last: bool) -> None:
        """Told before each micro-batch's backward; the last one of an update is followed by `sum_gradients`."""
        ...

    def sum_gradients(self) -> None:
        """Make `.grad` of `tensors` the sum over ranks; 0 where no loss reached."""
        ...

    def clip(self, names: Sequence[str], limit: float) -> float:
        """Clip the summed gradients of these tensors to a norm of `limit` together; returns what it was."""
        ...

    def gather(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        """All of a set of which every rank holds its part, on rank 0, on a device; nothing on the others."""
        ...


class Replicated:
    """Every rank has everything. Starts all ranks from rank 0's weights."""

    def __init__(self, policy: Any, ranks: RankGroup) -> None:
        self._ranks = ranks
        parameters: dict[str, torch.nn.Parameter] = policy.trainable_parameters()
        self.tensors: dict[str, torch.Tensor] = {**parameters}
        self.rows: Mapping[str, Rows] = {}
        ranks.broadcast([parameter.data for parameter in parameters.values()])
        self._bucket = GradientBucket(parameters.values())

    def begin_update(self) -> None:
        self._bucket.zero()

    def before_backward(self, is_last: bool) -> None:
        """Gradients add up in the bucket."""

    def sum_gradients(self) -> None:
        self._ranks.all_reduce_gradients(self._bucket)

    def clip(self, names: Sequence[str], limit: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_([self.tensors[name] for name in names], limit))

    def gather(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        """As they are: the device is for what comes from elsewhere."""
        return dict(tensors)


class Sharded:
    """Each rank has a part of everything, by FSDP2. Starts all ranks from rank 0's weights.

    Gradients of an adapter are added up whole and reduced once per update; those of a whole network are reduced with
    every micro-batch, because unreduced ones would not be sharded.
    """

    def __init__(self, policy: Shardable, ranks: RankGroup, device: torch.device) -> None:
        self._ranks = ranks
        ranks.broadcast([parameter.data for parameter in policy.trainable_parameters().values()])
        num_weights = sum(weight.numel() for weight in policy.network.parameters())
        policy.shard(ranks.mesh(device))
        self._network = policy.network
        self._parameters = policy.trainable_parameters()
        self._reduce_always = 2 * sum(p.numel() for p in self._parameters.values()) > num_weights
        self.tensors: dict[str, torch.Tensor] = {name: own_part(p) for name, p in self._parameters.items()}
        self.rows: Mapping[str, Rows] = {
            name: Rows.of_rank(ranks.rank, ranks.num_ranks, p.shape[0])
            for name, p in self._parameters.items()
            if is_sharded(p)
        }
        whole = [p for p in self._parameters.values() if not is_sharded(p)]
        self._bucket = GradientBucket(whole) if whole else None

    def begin_update(self) -> None:
        for name in self.rows:
            self._parameters[name].grad = self.tensors[name].grad = None
        if self._bucket is not None:
            self._bucket.zero()

    def before_backward(self, is_last: bool) -> None:
        self._network.set_requires_gradient_sync(is_last or self._reduce_always)

    def sum_gradients(self) -> None:
        if self._bucket is not None:
            self._ranks.all_reduce_gradients(self._bucket)
        for name in self.rows:
            held, gradient = self.tensors[name], self._parameters[name].grad
            held.grad = torch.zeros_like(held) if gradient is None else own_part(gradient)

    def clip(self, names: Sequence[str], limit: float) -> float:
        own = [self.tensors[name] for name in names]
        parts = [self._gradient(name) for name in names if name in self.rows]
        whole = [self._gradient(name) for name in names if name not in self.rows]
        squared = torch.nn.utils.get_total_norm(parts).double() ** 2
        self._ranks.sum_(squared)
        norm = (squared + torch.nn.utils.get_total_norm(whole).to(squared) ** 2).sqrt().float()
        torch.nn.utils.clip_grads_with_norm_(own, limit, norm)
        return float(norm)

    def gather(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, part in tensors.items():
            rows = self.rows.get(name)
            whole = part if rows is None else self._ranks.gather_rows(part, rows.total)
            if whole is not None and self._ranks.rank == 0:
                found[name] = whole.to(device)
        return found

    def _gradient(self, name: str) -> torch.Tensor:
        gradient = self.tensors[name].grad
        assert gradient is not None
        return gradient


def hold(policy: Any, ranks: RankGroup, sharded: bool, device: torch.device) -> Trained:
    """What a configuration asks for; with one rank there is nothing to shard."""
    return Sharded(policy, ranks, device) if sharded and ranks.num_ranks > 1 else Replicated(policy, ranks)
