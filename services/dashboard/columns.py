"""A run's `metrics.jsonl` as columns, kept up with while the run writes it.

A run adds lines, and writes its last line anew when an evaluation adds to it; a resumed run replaces the file. So a
refresh reads from the start of the last line on, and the whole file only when it is another one.
"""

from __future__ import annotations

import json
import math
import threading
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Row = Mapping[str, Any]


@dataclass(slots=True)
class Columns:
    """Metrics by name, one number per step; NaN where a step does not have it, or it was not finite."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: dict[str, array[float]] = field(default_factory=dict[str, "array[float]"])

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Columns:
        columns = cls()
        for row in rows:
            columns.append(row)
        return columns

    def copy(self) -> Columns:
        return Columns(self.steps[:], {name: column[:] for name, column in self.values.items()})

    def append(self, row: Row) -> None:
        count = len(self.steps)
        self.steps.append(int(row["step"]))
        for name in row:
            if name in self.values or name == "step":
                continue
            self.values[name] = array("d", [math.nan]) * count
        for name, column in self.values.items():
            value = row.get(name)
            column.append(math.nan if value is None else float(value))

    def pop(self) -> None:
        self.steps.pop()
        for column in self.values.values():
            column.pop()

    def column(self, name: str) -> np.ndarray:
        """A metric as an array (rows,), all NaN if no step has it."""
        found = self.values.get(name)
        return np.full(len(self.steps), np.nan) if found is None else np.array(found, dtype=np.float64)

    def points(self, name: str) -> list[tuple[int, float]]:
        """The steps that have a metric, and what it was."""
        column = self.values.get(name)
        if column is None:
            return []
        return [(step, value) for step, value in zip(self.steps, column, strict=True) if not math.isnan(value)]

    def tail(self, name: str, count: int) -> list[float]:
        """A metric's values among the last so many rows."""
        column = self.values.get(name)
        return [] if column is None else [value for value in column[-count:] if not math.isnan(value)]

    def row(self, step: int) -> dict[str, float] | None:
        """One step's metrics; None if there is no such step."""
        place = int(np.searchsorted(np.array(self.steps), step))
        if place == len(self.steps) or self.steps[place] != step:
            return None
        return {name: column[place] for name, column in self.values.items() if not math.isnan(column[place])}


class MetricsTail:
    """See the module. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._last_offset = 0
        self.generation = 0
        """Counts the times that the file became another one."""
        self.columns = Columns()

    def refresh(self) -> Columns:
        """What is there now; what was returned before stays as it was. Lines that are no rows are passed over."""
        with self._lock:
            try:
                status = self._path.stat()
            except FileNotFoundError:
                self._reset()
                self._seen = None
                return self.columns
            seen = (status.st_ino, status.st_size, status.st_mtime_ns)
            if seen != self._seen:
                if self._seen is not None and (status.st_ino != self._seen[0] or status.st_size < self._last_offset):
                    self._reset()
                self._read()
                self._seen = seen
            return self.columns

    def _reset(self) -> None:
        if self.columns.steps:
            self.generation += 1
        self.columns, self._last_offset = Columns(), 0

    def _read(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._last_offset)
            data = file.read()
        self.columns = self.columns.copy()
        lines = data.split(b"\n")[:-1]  # what follows the last newline is still being written
        offset = self._last_offset
        if lines and self.columns.steps:
            last = _parsed(lines[0])
            if last is None or last["step"] != self.columns.steps[-1]:
                self._start_over()
                return
            self.columns.pop()
        for line in lines:
            row = _parsed(line)
            if row is not None:
                self._last_offset = offset
                self.columns.append(row)
            offset += len(line) + 1

    def _start_over(self) -> None:
        """The last line is another step's: the file was cut and grew again since."""
        self._reset()
        self._read()


def sampled_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The first rows of a metrics file and others spread over it, without reading it whole; and all of its end."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return []
    rows: dict[int, dict[str, Any]] = {}
    end = 128 * 1024
    with path.open("rb") as file:
        for place in range(count):
            offset = max(size - end, 0) * place // count
            file.seek(offset)
            if offset:
                file.readline()
            row = _parsed(file.readline())
            if row is not None:
                rows[int(row["step"])] = row
        file.seek(max(size - end, 0))
        for row in map(_parsed, file.read().split(b"\n")[:-1]):
            if row is not None:
                rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
