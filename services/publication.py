"""One published version on its way from the learner to the fleet, as the controller's process passes it on.

RayLearner.publish ──▶ Publication ──▶ RayFleet.pull      newest: for those who hold the version before
                                                          whole:  for those who come, or come back
                                                          again:  when it arrived torn
                                                          seat:   when it is broadcast, to whom
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from torch import distributed

from services.config import RunConfig
from services.weight_store_checks import broadcast_backend
from services.weight_stores import GONE, Backend, CollectiveStoreConfig, Seat

_TIMES_AGAIN = 2
"""How often one version is published anew because it arrived torn: after that something else is wrong."""


@dataclass(frozen=True, slots=True)
class Publication:
    """References to the tickets of one version. again: publish it anew; None where nobody can.

    seat: (actors' numbers) -> their places in a broadcast, which begins at once; None where nothing is broadcast.
    """

    newest: Any
    whole: Any
    again: Callable[[], Awaitable[Any]] | None = None
    seat: Callable[[Iterable[int]], Broadcast] | None = None


@dataclass(frozen=True, slots=True)
class Broadcast:
    """One broadcast under way. tickets: each seated actor's. ended: wait until the learner is done with it.

    lost: say that an actor does not, or did not, take its seat.
    """

    tickets: Mapping[int, Seat]
    lost: Callable[[int], None]
    ended: Callable[[], Awaitable[None]]


class Broadcasts:
    """Seats actors around the learner's first rank; a new group whenever others are to be seated, or one broke."""

    def __init__(self, sender: ActorHandle, backend: Backend, timeout_s: float, host: str) -> None:
        """`sender` has `send(seat)`; members meet at a port of `host`, which is this process's node."""
        self._sender = sender
        self._meeting = distributed.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        self._address = f"{host}:{self._meeting.port}"
        self._backend: Backend = backend
        self._timeout_s = timeout_s
        self._members: tuple[int, ...] = ()
        self._group = ""
        self._rounds = itertools.count()

    def begin(self, actor_ids: Iterable[int], which: str, sha256: str, whole: Any) -> Broadcast:
        """Ask the learner to broadcast what it put last, to these actors. Their seats are their tickets."""
        members = tuple(sorted(actor_ids))
        if not self._group or members != self._members:
            self._members, self._group, self._rounds = members, uuid.uuid4().hex[:8], itertools.count()
        first = Seat(
            meeting=self._address,
            group=self._group,
            round=next(self._rounds),
            rank=0,
            size=len(members) + 1,
            backend=self._backend,
            timeout_s=self._timeout_s,
            which=which,
            sha256=sha256,
            whole=whole,
        )
        seats = {actor_id: replace(first, rank=rank) for rank, actor_id in enumerate(members, 1)}
        if not members:
            return Broadcast({}, lambda actor_id: None, _nothing)
        sending: Any = self._sender.send.remote(first)

        async def ended() -> None:
            try:
                failed: str = await sending
            except RayError as error:
                # Its actors have the version by the object store; whoever calls the learner next is told of its death.
                failed = str(error)
            if failed:
                self._break_up(first.group)

        def lost(actor_id: int) -> None:
            self._meeting.set(seats[actor_id].key(seats[actor_id].rank), GONE)
            self._break_up(first.group)

        return Broadcast(seats, lost, ended)

    def _break_up(self, group: str) -> None:
        """Form another next time: who is of this one is not known, or connections to them are broken."""
        if self._group == group:
            self._group = ""


async def _nothing() -> None:
    """For a broadcast to nobody."""


class Mending:
    """Publishes one version anew when actors got it torn: it must not end a run whose learner still has it."""

    def __init__(self, again: Callable[[], Awaitable[Any]] | None, mended: Callable[[Any], None]) -> None:
        """`mended` is told the new whole."""
        self._again = again
        self._mended = mended
        self._times = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def is_torn(self) -> bool:
        """Whether it is no use to pull the whole: it was torn, and no other was published yet."""
        task = self._task
        return task is not None and (not task.done() or task.cancelled() or task.exception() is not None)

    def may_mend(self, ticket: Any, whole: Any) -> bool:
        """An actor got `ticket` torn, and `whole` is what it would pull next. False if nothing can be done about it."""
        if ticket is not whole or self.is_torn:
            return True
        if self._again is None or self._times == _TIMES_AGAIN:
            return False
        self._times += 1
        self._task = asyncio.create_task(self._publish(self._again), name="publish again")
        # A learner that cannot publish it again is dead, which its caller is told, or has gone on to the next version.
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return True

    async def _publish(self, again: Callable[[], Awaitable[Any]]) -> None:
        self._mended(await again())

    def close(self) -> None:
        """Drop what is under way."""
        if self._task is not None:
            self._task.cancel()


def make_broadcasts(config: RunConfig, sender: ActorHandle) -> Broadcasts | None:
    """For a run whose weights are broadcast from `sender`, the learner's first rank."""
    store = config.weight_store
    if not isinstance(store, CollectiveStoreConfig):
        return None
    backend = broadcast_backend(store, config.rollout.num_gpus, config.learner.num_gpus_per_rank)
    return Broadcasts(sender, backend, store.timeout_s, ray.util.get_node_ip_address())
