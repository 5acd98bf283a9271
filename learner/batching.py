"""From groups to what one optimiser step eats: rows, blocks, micro-batches, and the denominators.

    groups ──▶ units ──▶ epochs × updates ──▶ ranks ──▶ blocks ──▶ micro-batches (one item of each of a block's rows)

An *item* is what one backward pass takes of a sample: a sampler step of a picture, one noised canvas of a text.

A *unit* is what is never cut. For an algorithm that needs CHUNKS it is `micro_batch_size` consecutive rows, failed
ones included; with the rollouts' chunk size these are the very rows that went through the network together (a chunk
is several whole groups or an even part of one), so the learner re-scores tensors of the rollout's shapes and an
on-policy ratio is exactly 1. Failed rows are zeros there, and masked. For one that needs GROUPS it is a whole group.
For other algorithms a unit is one valid sample; a block is then up to `micro_batch_size` valid samples.

Units keep the order of the groups; update u of U takes the u-th contiguous part, rank r of R the r-th contiguous part
of that, parts differing by one unit at most. Nothing is shuffled, so nothing depends on where a sample was made. Each
epoch goes over all units again. A loss is a sum over items divided by the `denominator` of the whole update, so
neither the cut into micro-batches nor the number of ranks changes a gradient (up to rounding).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch

from raylign.errors import ConfigError, NumericsError, ShapeError
from raylign.models.base import Conditioning, join_conditioning
from raylign.models.tokens import TokenPrompts, join_prompts
from raylign.types import Advantage, Needs, RolloutGroup, SampleKey, TokenTrajectory, WeightVersion

T = TypeVar("T")
ABSENT = -1
"""The item number of a sample that has fewer items than others."""


class Row(NamedTuple):
    """A sibling of a group, by position."""

    group: int
    sibling: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """N pictures, each at one of its trained steps; what an image loss sees. fp32, on the policy's device.

    item_N: index into the sampler's steps, on the CPU. valid_N: False for rows that only keep a chunk's shape.
    epoch: how often the step's samples were gone over before. reward_N: the mixed reward, 0 where there is none.
    age_N: int64 on the CPU, versions between the weights that drew each picture and those the step began with.
    rows: where each picture stands among the step's groups, and `place` which of its items this is. on_policy: the
    weights have not changed since the step began. states_NS1CHW and rollout_logprob_NS are there when the algorithm
    needs STEPS and LOGPROBS, settled_NF (fp64) when it surveys.
    """

    keys: tuple[SampleKey, ...]
    item_N: torch.Tensor
    adv_N: torch.Tensor
    valid_N: torch.Tensor
    epoch: int
    conditioning: Conditioning
    final_NCHW: torch.Tensor
    reward_N: torch.Tensor
    age_N: torch.Tensor
    rows: tuple[Row, ...] = ()
    place: int = 0
    on_policy: bool = True
    states_NS1CHW: torch.Tensor | None = None
    rollout_logprob_NS: torch.Tensor | None = None
    settled_NF: torch.Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            final_NCHW=self.final_NCHW.to(device),
            adv_N=self.adv_N.to(device),
            valid_N=self.valid_N.to(device),
            conditioning=self.conditioning.to(device),
            reward_N=self.reward_N.to(device),
            states_NS1CHW=move(self.states_NS1CHW),
            rollout_logprob_NS=move(self.rollout_logprob_NS),
            settled_NF=move(self.settled_NF),
        )

    def only_step(self) -> int:
        """The step all rows share. Raises ShapeError if they do not."""
        steps = set(self.item_N.tolist())
        if len(steps) != 1:
            raise ShapeError(f"this loss takes one sampler step per micro-batch, got steps {sorted(steps)}")
        return int(steps.pop())


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """N texts, each at one of its items; what a text loss sees. On the policy's device, `item_N` on the CPU.

    `tokens` is the trajectory of the rows, axis G read as N; `prompts` are padded to the longest of the rows.
    budget_adv_N: credit for the choice of entropy budget, 0 where there is none. on_policy: the weights have not
    changed since the step began.
    """

    keys: tuple[SampleKey, ...]
    item_N: torch.Tensor
    adv_N: torch.Tensor
    valid_N: torch.Tensor
    epoch: int
    prompts: TokenPrompts
    tokens: TokenTrajectory
    budget_adv_N: torch.Tensor
    on_policy: bool = True

    def to(self, device: torch.device) -> TokenBatch:
        return replace(
            self,
            adv_N=self.adv_N.to(device),
            valid_N=self.valid_N.to(device),
            prompts=self.prompts.to(device),
            tokens=self.tokens.to(device),
            budget_adv_N=self.budget_adv_N.to(device),
        )


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """What one optimiser step of one rank eats.

    `denominator` is the summed share of the valid samples of *all* ranks, which the update's loss is divided by;
    `num_items` counts their items, for means of metrics. on_policy: it is the first of its step. longest: the batch of
    the rank that has the most micro-batches, where all must take as many.
    """

    blocks: tuple[tuple[Row, ...], ...]
    denominator: float
    num_items: int
    epoch: int
    on_policy: bool
    data: StepData
    longest: TrainBatch | None = None

    @property
    def num_micro_batches(self) -> int:
        """How many `micro_batches` gives."""
        return self.longest.num_micro_batches if self.longest is not None else self._num_own

    @property
    def _num_own(self) -> int:
        kept = [rows for rows in self.blocks if any(self.data.is_valid(row) for row in rows)]
        return sum(int((self.data.items_NK(rows) != ABSENT).any(dim=0).sum()) for rows in kept)

    def micro_batches(self) -> Iterator[Any]:
        """MicroBatches of pictures or TokenBatches of texts, as the groups are: block by block, item by item, in order.

        Blocks without a valid row and absent items are left out. A rank with fewer than the longest goes on with what
        that one has at their places, none of it valid: it computes, and counts nothing.
        """
        yield from self._own()
        if self.longest is not None:
            for one in islice(self.longest.micro_batches(), self._num_own, None):
                yield replace(one, valid_N=torch.zeros_like(one.valid_N))

    def _own(self) -> Iterator[Any]:
        for rows in self.blocks:
            if not any(self.data.is_valid(row) for row in rows):
                continue
            items_NK = self.data.items_NK(rows)
            everyone = self.data.gather(rows, self.epoch)
            for k in range(items_NK.shape[1]):
                present = [row for row, item in zip(rows, items_NK[:, k].tolist(), strict=True) if item != ABSENT]
                if not present:
                    continue
                batch = everyone if len(present) == len(rows) else self.data.gather(present, self.epoch)
                batch = replace(batch, item_N=items_NK[items_NK[:, k] != ABSENT, k], on_policy=self.on_policy)
                yield batch if isinstance(batch, TokenBatch) else replace(batch, place=k)


@dataclass(frozen=True, slots=True)
class StepData:
    """All groups of one learner step, each with its credit.

    items: (G, K) int64 per group, the same K for all; ABSENT where a sample has fewer.
    shares: (G,) per group, what each sample counts in the loss's denominator.
    version: of the weights that the step begins with; None takes every sample as drawn with them.
    """

    groups: Sequence[RolloutGroup]
    advantages: Sequence[Advantage]
    items: Sequence[torch.Tensor]
    shares: Sequence[torch.Tensor]
    needs: Needs
    version: WeightVersion | None = None

    def is_valid(self, row: Row) -> bool:
        return bool(self.advantages[row.group].valid_G[row.sibling])

    def items_NK(self, rows: Sequence[Row]) -> torch.Tensor:
        return torch.stack([self.items[row.group][row.sibling] for row in rows])

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Groups P, siblings G and items K of each, the largest of them."""
        return len(self.groups), max(g.group_size for g in self.groups), max(one.shape[1] for one in self.items)

    def advantage_table(self) -> torch.Tensor:
        """Advantages of all samples, (P, G) fp64; 0 for those that have none."""
        adv_PG = torch.zeros(self.sizes[:2], dtype=torch.float64)
        for index, advantage in enumerate(self.advantages):
            adv_PG[index, : len(advantage.adv_G)] = advantage.adv_G.double()
        return adv_PG

    def num_items(self, row: Row) -> int:
        """How many items a sample has."""
        return int((self.items[row.group][row.sibling] != ABSENT).sum())

    def reward(self, row: Row) -> float:
        """A sample's mixed reward; 0 where there is none."""
        return self.groups[row.group].rollouts[row.sibling].total or 0.0

    def share(self, row: Row) -> float:
        """What a sample counts in the denominator."""
        return float(self.shares[row.group][row.sibling])

    def age(self, row: Row) -> int:
        """How many versions older than the step's a sample's weights were."""
        drawn = self.groups[row.group].rollouts[row.sibling].min_version
        return 0 if self.version is None else self.version - drawn

    def gather(self, rows: Sequence[Row], epoch: int) -> Any:
        """The rows as one batch, item_N still 0. Raises NumericsError naming a valid sample that is not finite."""
        keys = tuple(self.groups[row.group].rollouts[row.sibling].key for row in rows)
        item_N = torch.zeros(len(rows), dtype=torch.int64)
        adv_N = torch.stack([self.advantages[row.group].adv_G[row.sibling] for row in rows])
        valid_N = torch.tensor([self.is_valid(row) for row in rows])
        told = [self.groups[row.group].conditioning.rows(slice(0, 1)) for row in rows]
        if isinstance(self.groups[rows[0].group].trajectory, TokenTrajectory):
            prompts = join_prompts([one for one in told if isinstance(one, TokenPrompts)])
            return TokenBatch(keys, item_N, adv_N, valid_N, epoch, prompts, self._tokens(rows), self._budget_adv(rows))
        states = logprobs = None
        if Needs.STEPS in self.needs:
            states = torch.stack([self._row(row, "states_GS1CHW") for row in rows])
        if Needs.LOGPROBS in self.needs:
            logprobs = torch.stack([self._row(row, "rollout_logprob_GS") for row in rows])
        return MicroBatch(
            keys,
            item_N,
            adv_N,
            valid_N,
            epoch,
            conditioning=join_conditioning([one for one in told if isinstance(one, Conditioning)]),
            final_NCHW=torch.stack([self._row(row, "final_GCHW") for row in rows]),
            reward_N=torch.tensor([self.reward(row) for row in rows]),
            age_N=torch.tensor([self.age(row) for row in rows]),
            rows=tuple(rows),
            states_NS1CHW=states,
            rollout_logprob_NS=logprobs,
        )

    def _tokens(self, rows: Sequence[Row]) -> TokenTrajectory:
        """The rows' trajectories as one; every field of a valid row is finite."""
        first = self.groups[rows[0].group].tokens
        columns = [
            None if getattr(first, name) is None else torch.stack([self._row(row, name) for row in rows])
            for name in TokenTrajectory.__dataclass_fields__
        ]
        return TokenTrajectory(*columns)  # type: ignore[arg-type]  # in the order of its fields

    def _budget_adv(self, rows: Sequence[Row]) -> torch.Tensor:
        credit = [(self.advantages[row.group].budget_adv_G, row.sibling) for row in rows]
        return torch.stack([torch.zeros(()) if adv_G is None else adv_G[place] for adv_G, place in credit])

    def _row(self, row: Row, field: str) -> torch.Tensor:
        """One sibling's tensor; zeros for a failed one, whose values may be anything, NaN included."""
        group = self.groups[row.group]
        tensor: torch.Tensor | None = getattr(group.trajectory, field)
        if tensor is None:
            raise ShapeError(
                f"group {group.prompt.id!r} has no {field}, which the algorithm needs; record it in rollouts"
            )
        values = tensor[row.sibling]
        if values.is_floating_point():
            values = values.float()
        if not self.is_valid(row):
            return torch.zeros_like(values)
        if not bool(torch.isfinite(values).all()):
            raise NumericsError(f"{field} of sample {tuple(group.rollouts[row.sibling].key)} is not finite")
        return values


def cut(
    data: StepData,
    *,
    num_epochs: int,
    num_updates: int,
    rank: int,
    num_ranks: int,
    micro_batch_size: int,
    level: bool = False,
) -> tuple[TrainBatch, ...]:
    """The batches of one rank, one per update of each epoch, by the rules of the module's docstring.

    level: every rank takes as many micro-batches as the one with the most, as ranks must that share a network.
    Raises ConfigError if there are fewer units than updates: an update would have nothing to learn from.
    """
    rows = [Row(index, sibling) for index, group in enumerate(data.groups) for sibling in range(group.group_size)]
    if Needs.CHUNKS in data.needs:
        units = _blocks(rows, micro_batch_size)
    elif Needs.GROUPS in data.needs:
        units = [tuple(row for row in rows if row.group == index) for index in range(len(data.groups))]
    else:
        units = [(row,) for row in rows if data.is_valid(row)]
    if len(units) < num_updates:
        raise ConfigError(
            f"learner.updates_per_step is {num_updates}, but this step has only {len(units)} unit(s) to share out; "
            "lower it, or raise groups_per_step"
        )
    batches: list[TrainBatch] = []
    for epoch in range(num_epochs):
        for update in range(num_updates):
            mine = share(units, update, num_updates)
            valid = [row for unit in mine for row in unit if data.is_valid(row)]
            batch = TrainBatch(
                _rank_blocks(data, share(mine, rank, num_ranks), micro_batch_size),
                denominator=math.fsum(data.share(row) for row in valid),
                num_items=sum(data.num_items(row) for row in valid),
                epoch=epoch,
                on_policy=epoch == 0 and update == 0,
                data=data,
            )
            if level:
                # Everybody has all groups, so nobody need be asked; of equals the lowest rank's.
                shards = [share(mine, one, num_ranks) for one in range(num_ranks)]
                all_ranks = [replace(batch, blocks=_rank_blocks(data, shard, micro_batch_size)) for shard in shards]
                batch = replace(batch, longest=max(all_ranks, key=lambda one: one.num_micro_batches))
            batches.append(batch)
    return tuple(batches)


def share(items: Sequence[T], part: int, num_parts: int) -> Sequence[T]:
    """The `part`-th of `num_parts` contiguous parts, sizes differing by one at most (some may be empty)."""
    return items[len(items) * part // num_parts : len(items) * (part + 1) // num_parts]


def _rank_blocks(data: StepData, units: Sequence[tuple[Row, ...]], size: int) -> tuple[tuple[Row, ...], ...]:
    """What a rank's units are cut into: themselves where they are chunks, or blocks of their valid rows."""
    if Needs.CHUNKS in data.needs:
        return tuple(units)
    return tuple(_blocks([row for unit in units for row in unit if data.is_valid(row)], size))


def _blocks(rows: Sequence[Row], size: int) -> list[tuple[Row, ...]]:
    return [tuple(rows[start : start + size]) for start in range(0, len(rows), size)]
