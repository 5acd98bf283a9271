"""How long an actor may take over a call before it counts as hung. Pure: the fleet says what calls took.

A stopped process (SIGSTOP, a dead GPU driver, a network that swallows everything) raises no error, so time is all there
is to tell it by. The limit is a multiple of the slowest of the last calls of the same kind, so no key of the
configuration has to guess it. A call that was taken from one actor gets twice the time on the next: a fleet that is
merely slow gives up on a call a few times at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

_REMEMBERED = 16
_MAX_DOUBLINGS = 10


class Patience:
    """Limits by kind of call. Calls are of one kind if they should take as long as each other."""

    def __init__(
        self,
        factor: float = 10.0,
        least_s: float = 60.0,
        unmeasured_s: float = 1800.0,
        restart_after_s: float = 60.0,
    ) -> None:
        """least_s: below it nobody is hung. unmeasured_s: the limit of a kind of which no call has been answered.

        restart_after_s: when a hung actor that still does not answer is killed, so that Ray starts it anew.
        """
        self._restart_after_s = restart_after_s
        self._factor = factor
        self._least_s = least_s
        self._unmeasured_s = unmeasured_s
        self._took_s: dict[Hashable, deque[float]] = {}

    def learn(self, kind: Hashable, took_s: float) -> None:
        """A call was answered."""
        self._took_s.setdefault(kind, deque(maxlen=_REMEMBERED)).append(took_s)

    def limit_s(self, kind: Hashable, tries: int = 0) -> float:
        """Seconds that a call may take which was given up `tries` times before."""
        took_s = self._took_s.get(kind)
        once_s = max(self._least_s, self._factor * max(took_s)) if took_s else self._unmeasured_s
        return once_s * 2.0 ** min(tries, _MAX_DOUBLINGS)

    def silence_s(self, hung: bool) -> float:
        """How long an actor that is away may say nothing, not even that it is starting, before it is killed."""
        return self._restart_after_s if hung else self._unmeasured_s
