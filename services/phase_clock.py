"""What the phases of the run's loop take."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager


class PhaseClock:
    """Seconds by phase since the last step was logged."""

    def __init__(self, heard: Callable[[str, float], None] | None = None) -> None:
        """`heard` is told of each phase when it ends."""
        self._seconds: dict[str, float] = {}
        self._heard = heard

    def add(self, phase: str, seconds: float) -> None:
        """A phase is over, and took so long."""
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
        if self._heard is not None:
            self._heard(phase, seconds)

    @contextmanager
    def timed(self, phase: str) -> Generator[None]:
        """Adds the block's wall time, however it ends."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - started_s)

    def drain(self) -> dict[str, float]:
        """The seconds by phase, which start anew."""
        drained, self._seconds = self._seconds, {}
        return drained
