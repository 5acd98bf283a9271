"""The ranks of a data-parallel learner and the few things they say to each other.

Gradients are summed by one explicit all-reduce over one flat bucket instead of a DistributedDataParallel wrapper:
the sum happens once per optimiser step however many micro-batches it has, always in the same order (so a run
repeats bit for bit at a given number of ranks), and nothing hooks into parameters whose storage the learner swaps
in place to ask the old and the reference policy. Overlap with the backward pass is given up; with an adapter the
bucket is a few megabytes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import distributed

from raylign.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class GradientBucket:
    """One flat tensor whose slices are the parameters' `.grad`; autograd adds into them in place."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._parameters = list(parameters)
        if len({(p.dtype, p.device) for p in self._parameters}) != 1:
            raise ConfigError(
                "trainable parameters must share one dtype and device; load the policy with role='learner'"
            )
        self.flat = torch.zeros(
            sum(p.numel() for p in self._parameters),
            dtype=self._parameters[0].dtype,
            device=self._parameters[0].device,
        )
        self.zero()

    def zero(self) -> None:
        """Clear, and bind each `.grad` to its slice. A parameter the loss does not reach keeps gradient 0, not None."""
        self.flat.zero_()
        offset = 0
        for parameter in self._parameters:
            parameter.grad = self.flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()


class RankGroup:
    """This process's place among the learner's ranks. With one rank there is no process group and all is a no-op."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        """Use `single` or `connect`."""
        self.rank = rank
        self.num_ranks = num_ranks

    @classmethod
    def single(cls) -> RankGroup:
        """The only rank."""
        return cls(0, 1)

    @classmethod
    def connect(cls, rank: int, num_ranks: int, init_method: str, timeout_s: float = 600.0) -> RankGroup:
        """Join the group at `init_method` ("tcp://host:port" of rank 0); blocks until all ranks have.

        CPU tensors go over gloo, CUDA tensors over NCCL. A rank that dies makes the others' next call raise
        RuntimeError, at the latest after `timeout_s`; none hangs for ever.
        """
        if not 0 <= rank < num_ranks:
            raise ConfigError(f"learner rank must be in [0, {num_ranks}), got {rank}")
        if num_ranks > 1:
            both = torch.cuda.is_available() and distributed.is_nccl_available()
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if both else "gloo",
                init_method=init_method,
                rank=rank,
                world_size=num_ranks,
                timeout=timedelta(seconds=timeout_s),
            )
        return cls(rank, num_ranks)

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its sum over ranks; bit-identical on all of them afterwards."""
        if self.num_ranks > 1:
            distributed.all_reduce(tensor, op=distributed.ReduceOp.SUM)

    def max_(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its elementwise maximum over ranks."""
        if self.num_ranks > 1:
            distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)

    def all_reduce_gradients(self, bucket: GradientBucket) -> None:
        """Sum gradients over ranks, in place. Each rank's loss is already divided by the denominators of all."""
        self.sum_(bucket.flat)

    def broadcast(self, tensors: Sequence[torch.Tensor], source: int = 0) -> None:
        """Overwrite `tensors` with those of rank `source`."""
        if self.num_ranks > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, src=source)

    def gather_rows(self, part: torch.Tensor, total: int) -> torch.Tensor | None:
        """The whole of a tensor of `total` rows, of which every rank gives its part (`Rows.of_rank`); None but on rank
        0."""
        each = -(-total // self.num_ranks)
        padded = part.contiguous()
        if len(part) < each:
            padded = part.new_zeros(each, *part.shape[1:])
            padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.num_ranks)] if self.rank == 0 else None
        distributed.gather(padded, parts, dst=0)
        return None if parts is None else torch.cat(parts)[:total]

    def mesh(self, device: torch.device) -> DeviceMesh:
        """All ranks in a row, for what is sharded over them on this kind of device."""
        from torch.distributed.device_mesh import DeviceMesh

        world = distributed.group.WORLD
        assert world is not None
        return DeviceMesh.from_group(world, device.type)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum_(torch.zeros(1))

    def close(self) -> None:
        """Leave the group."""
        if self.num_ranks > 1 and distributed.is_initialized():
            distributed.destroy_process_group()
            # A cycle that still holds the group would end its threads after the interpreter, which aborts the process.
            gc.collect()
