"""What every way of sending weights does: the learner's process puts a snapshot, an actor's process fetches it.

    learner's actor          controller              rollout actor
    put ──▶ ticket ────────▶ passes it on ─────────▶ fetch ──▶ snapshot ──▶ verify, load   (`take`)

A ticket is small, or is what Ray's object store maps into the actor. Whatever way it came, a snapshot is verified by
the one who loads it, by names, shapes and hashes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from raylign.weights import TornSnapshotError, WeightSnapshot

Ticket = Any
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Fetched:
    """A snapshot, not yet verified. detour: why it did not come the configured way; empty when it did."""

    snapshot: WeightSnapshot
    detour: str = ""


class WeightStore(Protocol):
    """One process's end of the way; the learner's puts, an actor's fetches."""

    num_fetches: int
    """How often a ticket is fetched before what arrives torn is given up."""

    def put(self, snapshot: WeightSnapshot, which: str) -> Ticket:
        """Make a snapshot of one policy fetchable. Raises ClusterError if it cannot be sent at all."""
        ...

    def fetch(self, ticket: Ticket, attempt: int = 0) -> Fetched:
        """What was put. Raises TornSnapshotError, naming what is torn, missing or foreign.

        `attempt` counts from 0: a further one may wait before it reads again, or take another way.
        """
        ...


def take(store: WeightStore, ticket: Ticket, load: Callable[[WeightSnapshot], _T]) -> tuple[_T, Fetched]:
    """Fetch and load; what arrives torn, or turns out so while it is loaded, is fetched again, so often and no more.

    Raises TornSnapshotError after the last, and at once whatever else `load` raises (a foreign snapshot stays foreign).
    """
    for attempt in range(store.num_fetches - 1):
        try:
            fetched = store.fetch(ticket, attempt)
            return load(fetched.snapshot), fetched
        except TornSnapshotError:
            continue
    fetched = store.fetch(ticket, store.num_fetches - 1)
    return load(fetched.snapshot), fetched
