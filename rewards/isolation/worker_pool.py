"""Worker processes that can be killed: for library calls that may never return and cannot be interrupted in a thread.

A worker is a program of its own (not a fork, so it is safe beside threads and Ray) that writes the line `{}` when it
has loaded, then answers each line of JSON on its standard input with one on its standard output. Nothing is pickled.
A worker that misses its deadline is killed and replaced. Workers leave when their input ends, so none outlives its
owner by more than the task in hand, which it bounds itself (`limit_s` of the task).
"""

from __future__ import annotations

import json
import os
import queue
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from raylign.types import JsonValue
from rewards.isolation.child_process import Child, ChildEndedError, ChildError, ChildTimeoutError

START_TIMEOUT_S = 120.0
"""Longest wait for a worker's imports."""
MAX_ANSWER_BYTES = 2**20


class WorkerTimeoutError(Exception):
    """A task was not done in time; its worker was killed."""


class WorkerDiedError(Exception):
    """A worker ended, or wrote no JSON; the next task gets a new one."""


class WorkerPool:
    """A fixed number of workers, started when first needed or by `warm`; any thread may call."""

    def __init__(self, command: Sequence[str], num_workers: int) -> None:
        """`command` starts a worker; it gets this process's environment."""
        self._command = list(command)
        self._slots: queue.LifoQueue[Child | None] = queue.LifoQueue()
        for _ in range(num_workers):
            self._slots.put(None)
        self._num_workers = num_workers
        self.close = weakref.finalize(self, _close, self._slots)
        """End the idle workers; also happens when the pool is dropped and at exit."""

    def warm(self) -> None:
        """Start every worker. Raises WorkerDiedError if one does not come up."""
        slots = [self._slots.get() for _ in range(self._num_workers)]
        try:
            slots = [worker or self._start() for worker in slots]
        finally:
            for worker in slots:
                self._slots.put(worker)

    def call(self, task: Mapping[str, JsonValue], timeout_s: float) -> dict[str, Any]:
        """The worker's answer to `task`. Waits for an idle worker first, which does not count as the task's time.

        Raises WorkerTimeoutError and WorkerDiedError.
        """
        worker = self._slots.get()
        kept: Child | None = None
        try:
            if worker is not None and not worker.alive:
                worker.kill()
                worker = None
            worker = worker or self._start()
            worker.send(json.dumps({**task, "limit_s": 2 * timeout_s}).encode() + b"\n")
            answer = json.loads(worker.read_line(timeout_s))
            kept = worker
        except ChildTimeoutError:
            raise WorkerTimeoutError(f"a worker was killed after {timeout_s} s") from None
        except (ChildError, ValueError) as error:
            raise WorkerDiedError(f"a worker ended in its task: {type(error).__name__}") from None
        finally:
            if kept is None and worker is not None:
                worker.kill()
            self._slots.put(kept)
        return answer

    def _start(self) -> Child:
        worker = Child(self._command, env=os.environ, max_bytes=MAX_ANSWER_BYTES)
        try:
            ready = worker.read_line(START_TIMEOUT_S)
        except ChildError as error:
            worker.kill()
            said = worker.unread.decode(errors="replace")[-500:] if isinstance(error, ChildEndedError) else ""
            raise WorkerDiedError(f"a worker did not start: {type(error).__name__} {said}") from None
        if ready != b"{}":
            worker.kill()
            raise WorkerDiedError(f"a worker did not start: {ready[:500]!r}")
        return worker


def _close(slots: queue.LifoQueue[Child | None]) -> None:
    while True:
        try:
            worker = slots.get_nowait()
        except queue.Empty:
            return
        if worker is not None:
            worker.kill()
