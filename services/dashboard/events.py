"""What changes in a run, as server-sent events.

The run's directory is the source, looked at a few times a second; nothing has to be told. Where the run also writes its
rows to a Redis stream (`tracking.events`), they are pushed from there, and the directory is looked at less often, for
the rest. A Redis that goes away costs nothing but that.

event: rows      new or rewritten lines of metrics.jsonl, as {"generation": n, "rows": [...]}
event: groups    the newest recorded step of each kind
event: state     the run began, ended, or was changed
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.dashboard.columns import Columns
from services.dashboard.redis_rows import RowStream
from services.dashboard.runs import RunFiles, is_live
from services.page_server import Stopping, never
from services.record_files import RECORD_FOLDER, recorded

POLL_S = 0.2
PUSHED_POLL_S = 1.0
"""Longest wait for a pushed row between two looks at the directory."""
_BEAT_S = 10.0
MAX_ROWS = 200
"""Rows sent at once; a reader that missed more is told to load the curves again."""


@dataclass(slots=True)
class Watch:
    """What one reader has seen of a run."""

    run: RunFiles
    last_step: int
    last_row: dict[str, float] = field(default_factory=dict[str, float])
    generation: int = -1
    folder_mtime: int = -1
    newest: dict[str, int] = field(default_factory=dict[str, int])
    status: tuple[bool, int] | None = None

    def changes(self) -> list[tuple[str, dict[str, Any]]]:
        """Events since the last call."""
        return [*self._rows(), *self._groups(), *self._state()]

    def pushed(self, rows: Sequence[Mapping[str, float]]) -> list[tuple[str, dict[str, Any]]]:
        """The events of rows that came by the stream. Past a gap there are none: the directory has what is missing."""
        fresh: list[dict[str, float]] = []
        for row in rows:
            step = int(row["step"])
            if step in (self.last_step, self.last_step + 1):
                before = self.last_row if step == self.last_step else {}
                self.last_step, self.last_row = step, before | {name: row[name] for name in row if name != "step"}
                fresh.append(dict(row))
        return [("rows", {"generation": self.generation, "rows": fresh})] if fresh else []

    def _rows(self) -> list[tuple[str, dict[str, Any]]]:
        columns = self.run.tail.refresh()
        generation = self.run.tail.generation
        if self.generation not in (-1, generation):
            self.generation = generation
            return self._reload(columns)
        self.generation = generation
        places = len(columns.steps)
        while places and columns.steps[places - 1] > self.last_step:
            places -= 1
        fresh = columns.steps[places:]
        if len(fresh) > MAX_ROWS:
            return self._reload(columns)
        rows = [{"step": step, **_finite(columns.row(step) or {})} for step in fresh]
        if not rows and columns.steps and columns.steps[-1] == self.last_step:
            row = _finite(columns.row(self.last_step) or {})
            if self.last_row and row != self.last_row:  # an evaluation joined the step's line
                rows = [{"step": self.last_step, **row}]
            self.last_row = row
        elif rows:
            self.last_step = int(rows[-1]["step"])
            self.last_row = {name: value for name, value in rows[-1].items() if name != "step"}
        return [("rows", {"generation": generation, "rows": rows})] if rows else []

    def _reload(self, columns: Columns) -> list[tuple[str, dict[str, Any]]]:
        """Tell the reader to load the curves anew; it is up to date then."""
        self.last_step = columns.steps[-1] if columns.steps else -1
        self.last_row = _finite(columns.row(self.last_step) or {})
        return [("reload", {"generation": self.generation})]

    def _groups(self) -> list[tuple[str, dict[str, Any]]]:
        try:
            mtime = (self.run.path / RECORD_FOLDER).stat().st_mtime_ns
        except FileNotFoundError:
            return []
        if mtime == self.folder_mtime:
            return []
        first, self.folder_mtime = self.folder_mtime == -1, mtime
        newest = {str(kind): steps[-1] if steps else -1 for kind, steps in recorded(self.run.path).items()}
        if newest == self.newest:
            return []
        self.newest = newest
        return [] if first else [("groups", {"newest": newest})]

    def _state(self) -> list[tuple[str, dict[str, Any]]]:
        summary = self.run.folder.summary
        status = (is_live(self.run.folder, time.time()), summary.stat().st_mtime_ns if summary.exists() else 0)
        first, changed = self.status is None, status != self.status
        self.status = status
        return [("state", {"live": status[0]})] if changed and not first else []


async def stream(run: RunFiles, since: int, stopping: Stopping = never) -> AsyncGenerator[bytes]:
    """Events of a run for a reader that has its steps up to `since`, until it goes away or the server is stopping."""
    yield b"retry: 1000\n\n"
    # Opened before the directory is looked at, so that no row falls between the two.
    source = await RowStream.opened(run.path)
    watch, beat_s = Watch(run, since), time.monotonic()
    try:
        while not stopping():
            for name, data in await asyncio.to_thread(watch.changes):
                yield _event(name, data)
                beat_s = time.monotonic()
            if time.monotonic() - beat_s > _BEAT_S:
                yield b": still here\n\n"
                beat_s = time.monotonic()
                source = source or await RowStream.opened(run.path)
            if source is None:
                await asyncio.sleep(POLL_S)
                continue
            rows = await source.rows(PUSHED_POLL_S)
            if rows is None:
                await source.close()
                source = None
                continue
            for name, data in watch.pushed(rows):
                yield _event(name, data)
                beat_s = time.monotonic()
    finally:
        if source is not None:
            await source.close()


def _event(name: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n".encode()


def _finite(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if math.isfinite(value)}
