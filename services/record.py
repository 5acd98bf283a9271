"""A run's record of its groups, written beside the loop: what the dashboard's group browser reads.

    observer ──take──▶ queue (bounded) ──▶ writer thread ──▶ groups/train_00000012.json, .pictures, failures.jsonl

The loop only puts a step's groups into the queue. Where the writer cannot keep up, a step is left out and counted in
the next one's record; the loop never waits for it. What stops the writer (a full disk) stops the run, at the next step
or at the end.

The disk is bounded by `record.max_mib`: when the groups of training steps outgrow it, the older ones are thinned to
every second, fourth, eighth … step, and the newest `record.keep_newest` stay as long as they fit. Held-out groups, of
which there are few, have a quarter of it, and lines of failures are no more than MAX_FAILURES.

A training step's record also tells when each piece of its work began and ended (services.timeline).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from raylign.config import Config
from raylign.types import LatentTrajectory, RolloutGroup, RolloutStatus, Work
from services.group_rows import failure_rows, pack_groups
from services.record_files import (
    FAILURES_FILE,
    RECORD_FOLDER,
    RECORD_KINDS,
    RecordedStep,
    RecordKind,
    pictures_path,
    record_path,
    recorded,
    sized_steps,
)
from services.timeline import LOOP, as_evaluation, step_timeline, work_of

if TYPE_CHECKING:
    from learner.algorithms import AlgorithmUnion
    from rollout.drawn import WeightSlot

MAX_FAILURES = 20_000
"""Lines of `failures.jsonl`; a run that fails more often is past reading them."""
MAX_FAILURES_PER_STEP = 8
_QUEUE_LENGTH = 4
_MIB = 2**20
_EVAL_SHARE = 0.25
_ROOM_AFTER_THINNING = 0.8


class RecordConfig(Config):
    """What a run keeps of its groups to look at; nothing of it decides a step."""

    every_steps: int = Field(default=1, ge=0)
    """Steps between those whose groups are recorded, and evaluations, which are recorded whenever made; 0 records
    nothing."""
    max_groups: int = Field(default=32, ge=1)
    """Groups of a step to record: its first ones, in the order of its prompts."""
    max_mib: int = Field(default=1024, ge=1)
    """What the record may take on the disk; older steps are thinned out to stay below."""
    keep_newest: int = Field(default=100, ge=1)
    """Newest steps that thinning leaves alone, as long as they fit."""
    picture_size: int = Field(default=512, ge=16)
    """Longer side of recorded pictures, in pixels; larger ones are scaled down."""


@dataclass(frozen=True, slots=True)
class _Task:
    kind: RecordKind
    step: int
    groups: tuple[RolloutGroup, ...]
    over_s: float
    """When it was over, in Unix seconds."""
    step_s: float | None
    """How long it took, where that is known."""
    beside: tuple[Work, ...]
    """The loop's phases, pulls and evaluations since the training step before it."""


class GroupRecorder:
    """See the module. Must be closed; an error of the writer is raised by the next call."""

    def __init__(
        self,
        config: RecordConfig,
        algorithm: AlgorithmUnion,
        run: Path,
        resumed_step: int | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`resumed_step` is the last finished step of the checkpoint the run goes on from; None starts anew."""
        self._clock = clock
        self._beside: list[Work] = []
        self._config = config
        self._algorithm = algorithm
        self._run = run
        drop_after(run, -1 if resumed_step is None else resumed_step)
        self._num_failures = _num_lines(run / RECORD_FOLDER / FAILURES_FILE)
        self._kept = {kind: deque(sized_steps(run, kind)) for kind in RECORD_KINDS}
        self._queue: queue.Queue[_Task | None] = queue.Queue(_QUEUE_LENGTH)
        self._error: BaseException | None = None
        self._closed = False
        self.num_skipped = 0
        """Steps left out because the writer was behind."""
        self._thread = threading.Thread(target=self._work, name="record of groups", daemon=True)
        self._thread.start()

    def phase(self, name: str, seconds: float) -> None:
        """A phase of the loop has just ended, and took so long; the next training step's record tells of it."""
        if self._config.every_steps:
            self._beside.append(Work(LOOP, name, self._clock() - seconds, seconds))

    def pulled(self, slot: WeightSlot, works: Sequence[Work]) -> None:
        """Actors pulled weights; the next training step's record tells when."""
        if self._config.every_steps:
            self._beside.extend(as_evaluation(works) if slot == "eval" else works)

    def note_evaluation(self, groups: Sequence[RolloutGroup]) -> None:
        """Held-out groups were drawn and scored; the next training step's record tells when."""
        if self._config.every_steps:
            self._beside.extend(as_evaluation(work_of(groups)))

    def take(self, kind: RecordKind, step: int, groups: Sequence[RolloutGroup], step_s: float | None = None) -> None:
        """Record a step's groups, soon. Raises what stopped the writer.

        step_s: how long a training step took that is over now.
        """
        self._raise_error()
        beside: list[Work] = []
        if kind == "train":
            beside, self._beside = self._beside, beside
        else:
            self.note_evaluation(groups)
        every = self._config.every_steps
        if every == 0 or (kind == "train" and step % every and not _any_failed(groups)):
            return
        shown = tuple(map(shown_part, groups))
        try:
            self._queue.put_nowait(_Task(kind, step, shown, self._clock(), step_s, tuple(beside)))
        except queue.Full:
            self.num_skipped += 1

    def close(self) -> None:
        """Write what was taken, and stop. Raises what stopped the writer. Calling it twice is fine."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()
            self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self) -> None:
        """The thread: takes tasks until None comes. After an error it empties the queue, so that nobody waits."""
        failed = False
        while (task := self._queue.get()) is not None:
            if failed:
                continue
            try:
                self._write(task)
            except BaseException as error:  # noqa: BLE001  # a thread's edge: the run raises it at its next step
                self._error, failed = error, True

    def _write(self, task: _Task) -> None:
        from services.recorded_credit import credit_of

        path = record_path(self._run, task.kind, task.step)
        path.parent.mkdir(exist_ok=True)
        training = task.kind == "train"
        self._note_failures(task)
        if training and task.step % self._config.every_steps:
            return
        credit = credit_of(self._algorithm, task.groups) if training else None
        shown = task.groups[: self._config.max_groups]
        newest = task.step - 1 if training else None
        packed = pack_groups(shown, credit, newest, self._config.picture_size)
        told = {"step": task.step, "kind": task.kind, "num_groups": len(task.groups), "num_skipped": self.num_skipped}
        whole: dict[str, Any] = {**told, "groups": packed.groups}
        if training and task.step_s is not None:
            whole["timeline"] = step_timeline(work_of(task.groups), task.beside, task.over_s, task.step_s)
        data = json.dumps(whole, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        if packed.pictures:
            _replace(pictures_path(path), packed.pictures)
        _replace(path, data)
        self._make_room(task.kind, RecordedStep(task.step, len(data) + len(packed.pictures)))

    def _note_failures(self, task: _Task) -> None:
        room = min(MAX_FAILURES_PER_STEP, MAX_FAILURES - self._num_failures)
        rows = failure_rows(task.step, task.kind, task.groups, max(room, 0))
        if rows:
            with (self._run / RECORD_FOLDER / FAILURES_FILE).open("ab") as file:
                file.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
            self._num_failures += len(rows)

    def _make_room(self, kind: RecordKind, written: RecordedStep) -> None:
        kept = self._kept[kind]
        if kept and kept[-1].step == written.step:
            kept.pop()
        kept.append(written)
        share = _EVAL_SHARE if kind == "eval" else 1.0 - _EVAL_SHARE
        most = int(self._config.max_mib * _MIB * share)
        dropped = thinned(tuple(kept), most, self._config.keep_newest)
        for step in dropped:
            _remove(record_path(self._run, kind, step))
        if dropped:
            self._kept[kind] = deque(one for one in kept if one.step not in dropped)


def thinned(kept: Sequence[RecordedStep], most_bytes: int, keep_newest: int) -> set[int]:
    """The steps to drop so that the rest fits; none while everything fits. Pure.

    Older steps stay if they are multiples of 2, 4, 8 … (the first always does), until a fifth of the room is free;
    where the newest alone are too large, the oldest of them go.
    """
    if sum(one.num_bytes for one in kept) <= most_bytes:
        return set()
    goal = _ROOM_AFTER_THINNING * most_bytes
    older, newest = list(kept[:-keep_newest]), list(kept[-keep_newest:])
    stride, left = 1, older
    while sum(one.num_bytes for one in (*left, *newest)) > goal and len(left) > 1:
        stride *= 2
        left = [one for one in older if one is older[0] or one.step % stride == 0]
    while sum(one.num_bytes for one in (*left, *newest)) > goal and len(newest) > 1:
        left, newest = [], newest[1:]
    return {one.step for one in kept} - {one.step for one in (*left, *newest)}


def drop_after(run: Path, step: int) -> None:
    """Drop the record of every later step, and what a kill left half written; a run that starts anew drops all."""
    folder = run / RECORD_FOLDER
    if step < 0:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for kind, steps in recorded(run).items():
        for later in steps:
            if later > step:
                _remove(record_path(run, kind, later))
    for partial in folder.glob(".*.partial"):
        partial.unlink()
    failures = folder / FAILURES_FILE
    if failures.exists():
        lines = failures.read_bytes().split(b"\n")[:-1]
        _replace(failures, b"".join(line + b"\n" for line in lines if _step_of(line) <= step))


def shown_part(group: RolloutGroup) -> RolloutGroup:
    """The group without what only training needs: states on the way, and what the network was told."""
    trajectory = group.trajectory
    if isinstance(trajectory, LatentTrajectory):
        trajectory = LatentTrajectory(trajectory.final_GCHW, trajectory.sigmas_S1)
    return replace(group, trajectory=trajectory, conditioning=None)


def _any_failed(groups: Sequence[RolloutGroup]) -> bool:
    return any(rollout.status is not RolloutStatus.OK for group in groups for rollout in group.rollouts)


def _step_of(line: bytes) -> int:
    return int(json.loads(line)["step"])


def _num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _remove(record: Path) -> None:
    for path in (record, pictures_path(record)):
        path.unlink(missing_ok=True)


def _replace(path: Path, data: bytes) -> None:
    """Old bytes or new ones after a crash of the process. Without fsync: after a power cut a step may be missing."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
