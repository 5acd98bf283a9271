"""What a learner's state is made of; `Learner` makes and takes it, `checkpoint` writes and reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from raylign.types import JsonValue


class Rows(NamedTuple):
    """Which of a tensor's `total` rows (its first axis) a rank holds."""

    start: int
    stop: int
    total: int

    @classmethod
    def of_rank(cls, rank: int, num_ranks: int, total: int) -> Rows:
        """As FSDP2 and `torch.chunk` cut: equal parts, the last smaller, and empty ones where there are not enough."""
        each = -(-total // num_ranks)
        start = min(rank * each, total)
        return cls(start, min(start + each, total), total)


@dataclass(frozen=True, slots=True)
class LearnerState:
    """Everything a learner needs to go on exactly: named tensors on the CPU, and plain values.

    rows: of the tensors of which this is one rank's part only, by name; the others are whole, and equal on all ranks.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    values: dict[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    rows: Mapping[str, Rows] = field(default_factory=dict[str, Rows])


@runtime_checkable
class ReadsRows(Protocol):
    """Tensors that are read when they are asked for, whole or some rows."""

    def shape_of(self, name: str) -> tuple[int, ...]: ...

    def rows_of(self, name: str, start: int, stop: int) -> torch.Tensor: ...


def shapes_in(tensors: Mapping[str, torch.Tensor], section: str) -> dict[str, torch.Tensor]:
    """The tensors of a section by the rest of their names, as shapes without values."""
    prefix = f"{section}/"
    names = [name for name in tensors if name.startswith(prefix)]
    shapes = tensors.shape_of if isinstance(tensors, ReadsRows) else lambda name: tuple(tensors[name].shape)
    return {name.removeprefix(prefix): torch.empty(shapes(name), device="meta") for name in names}


def part_of(tensors: Mapping[str, torch.Tensor], name: str, rows: Rows | None) -> torch.Tensor:
    """A whole tensor, or these rows of it, and no more than that is read."""
    if rows is None:
        return tensors[name]
    if isinstance(tensors, ReadsRows):
        return tensors.rows_of(name, rows.start, rows.stop)
    return tensors[name][rows.start : rows.stop]


def policy_tensors(state: LearnerState) -> dict[str, torch.Tensor]:
    """The trained policy's tensors, by the names `trainable_parameters` gives them: its running mean, if one was kept,
    as that is what was evaluated."""
    section = "average/" if any(name.startswith("average/") for name in state.tensors) else "params/"
    return {name.removeprefix(section): state.tensors[name] for name in state.tensors if name.startswith(section)}
