"""Tensors of a checkpoint, read from its safetensors files when they are asked for, whole or some rows.

A tensor lies in one file, or in several, one for each rank that had rows of it. Which rows those are is said in the
file's own header, under ROWS: a JSON object of [first row, all rows] by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from learner.state import LearnerState
from raylign.errors import CheckpointError

ROWS = "rows"


@dataclass(slots=True)
class _Stored:
    """One tensor: its whole shape, and its pieces by first row; a tensor that was never cut is one piece."""

    shape: tuple[int, ...]
    is_cut: bool
    pieces: list[tuple[int, int, Any]] = field(default_factory=list[tuple[int, int, Any]])


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint's files by name, on the CPU; what is read is a copy."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises CheckpointError for a file that cannot be read, and for a tensor of which rows are missing."""
        self._tensors: dict[str, _Stored] = {}
        for path in paths:
            try:
                self._add(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"checkpoint file {path} cannot be read: {error}") from error
        for name, stored in self._tensors.items():
            stored.pieces.sort(key=lambda piece: piece[0])
            self._check(name, stored)

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._tensors[name]
        if not stored.is_cut:
            return stored.pieces[0][2].get_tensor(name)
        return self.rows_of(name, 0, stored.shape[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor; reads no value."""
        return self._tensors[name].shape

    def rows_of(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor; reads no others."""
        found = [
            file.get_slice(name)[max(start, first) - first : min(stop, last) - first]
            for first, last, file in self._tensors[name].pieces
            if first < stop and start < last
        ]
        # A rank of many may have no row of a small tensor.
        return torch.cat(found) if found else self._tensors[name].pieces[0][2].get_slice(name)[0:0]

    def _add(self, file: Any) -> None:
        cut: dict[str, list[int]] = json.loads((file.metadata() or {}).get(ROWS, "{}"))
        for name in file.keys():  # noqa: SIM118  # an open file is no mapping
            shape = tuple(file.get_slice(name).get_shape())
            start, total = cut.get(name, (0, shape[0] if shape else 1))
            whole = (total, *shape[1:]) if shape else shape
            stored = self._tensors.setdefault(name, _Stored(whole, name in cut))
            if stored.shape != whole:
                raise CheckpointError(f"{name} is {stored.shape} in one file of the checkpoint, {whole} in another")
            stored.pieces.append((start, start + (shape[0] if shape else 1), file))

    def _check(self, name: str, stored: _Stored) -> None:
        """Raise CheckpointError unless the pieces are all rows, each once."""
        at = 0
        for first, last, _ in stored.pieces:
            if first != at:
                raise CheckpointError(f"{name}: rows {at} to {first} are in no file of the checkpoint, or in two")
            at = last
        if at != (stored.shape[0] if stored.shape else 1):
            raise CheckpointError(f"{name}: rows from {at} on are in no file of the checkpoint")


def write_rows(path: Path, state: LearnerState, with_whole: bool) -> None:
    """One rank's part of a state as one file, with the tensors that are whole on all ranks or without.

    Parts without rows are left out, unless no rank has any.
    """
    kept = {
        name: tensor
        for name, tensor in state.tensors.items()
        if (with_whole if name not in state.rows or state.rows[name].total == 0 else len(tensor) > 0)
    }
    rows = {name: [state.rows[name].start, state.rows[name].total] for name in kept if name in state.rows}
    save_file(kept, path, {ROWS: json.dumps(rows)})
