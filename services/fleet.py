"""The rollout fleet on Ray: a queue of chunks over actors that may die and come back.

RLlib's FaultTolerantActorManager keeps the actors' health, in-flight calls and restarts; this file adds what a
rollout fleet needs on top: chunks go to whichever actor is free, a chunk whose actor died goes to another
(samples are keyed, so the result is the same), and an actor that came back pulls the newest weights before it
works. The manager's own LearnerGroup is not used: RLlib's learners eat episodes, ours eats rollout groups.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from ray.actor import ActorHandle
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.rllib.utils.actor_manager import CallResult, FaultTolerantActorManager

from raylign.errors import ClusterError, RaylignError
from raylign.types import RolloutGroup
from rollout.drawn import Pulled, Slot
from rollout.engine import ChunkRequest, Probe, WeightSlot
from services.ray_errors import NotPulledError, actor_name, unwrap
from services.ray_learner import Publication
from services.roles import SnapshotHandle

# A second chunk waits at each actor, so that it never idles for a round trip.
_IN_FLIGHT_PER_ACTOR = 2
_POLL_S = 0.002
_PROBE_EVERY_S = 1.0
_PROBE_TIMEOUT_S = 0.2
# A lost actor reloads its model; a whole fleet lost for this long will not come back by itself.
_FLEET_LOST_AFTER_S = 300.0


@dataclass(slots=True)
class _Call:
    """One call on its way to an actor.

    A chunk goes to any actor. A pinned call is about one actor (a pull, a probe); if that actor dies, its answer is
    None. A restoring pull brings an actor back into service, so its failure is the fleet's.
    """

    verb: str
    kwargs: dict[str, Any]
    future: asyncio.Future[Any]
    actor_id: int | None = None
    pinned: bool = False
    restoring: bool = False


@dataclass(slots=True)
class _Pool:
    """Calls not yet sent, and calls sent, by tag."""

    waiting: deque[_Call] = field(default_factory=deque)
    sent: dict[str, _Call] = field(default_factory=dict)


class RayFleet:
    """A Fleet of worker actors; see the module."""

    def __init__(self, actors: Sequence[ActorHandle]) -> None:
        self._manager = FaultTolerantActorManager(
            list(actors), max_remote_requests_in_flight_per_actor=_IN_FLIGHT_PER_ACTOR
        )
        self._actor_names = {number: actor_name(actor) for number, actor in self._manager.actors().items()}
        self._pool = _Pool()
        self._snapshots: dict[WeightSlot, SnapshotHandle] = {}
        self._tags = (f"call-{n}" for n in itertools.count())
        self._pump_task: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._next_probe_s = 0.0
        self._last_healthy_s = time.monotonic()

    async def generate(self, request: ChunkRequest) -> list[RolloutGroup]:
        return await self._submit("generate", {"request": request})

    async def probe_all(self, text: str, slot: Slot = "rollout") -> list[Probe]:
        """One per healthy actor; when none is left, the first that comes back."""
        asked = {"text": text, "slot": slot}
        answers = await self._on_every_actor("probe", asked)
        probes = [probe for probe in answers if probe is not None]
        return probes or [await self._submit("probe", asked)]

    async def precision_report(self) -> Mapping[Slot, str]:
        """Any actor's: all are of one kind."""
        return await self._submit("precision_report", {})

    async def pull(self, snapshot: SnapshotHandle, slot: WeightSlot) -> list[Pulled]:
        """Every healthy actor loads it; one that is away pulls it when it comes back. One report per healthy actor."""
        whole, newest = snapshot, snapshot
        if isinstance(snapshot, Publication):
            whole, newest = snapshot.whole, snapshot.newest
        self._snapshots[slot] = whole
        reports = await self._on_every_actor("pull", {"snapshot": newest, "slot": slot})
        return [report for report in reports if report is not None]

    @property
    def num_restarts(self) -> int:
        """How often an actor came back."""
        return self._manager.total_num_restarts()

    async def close(self) -> None:
        if self._pump_task is not None:
            self._pump_task.cancel()
            await asyncio.gather(self._pump_task, return_exceptions=True)
        for call in self._unfinished():
            call.future.cancel()
        self._pool = _Pool()
        self._manager.clear()

    async def _on_every_actor(self, verb: str, kwargs: dict[str, Any]) -> list[Any]:
        """One answer per healthy actor, None for those that die meanwhile."""
        return await asyncio.gather(
            *(self._submit(verb, kwargs, actor_id) for actor_id in self._manager.healthy_actor_ids())
        )

    async def _submit(self, verb: str, kwargs: dict[str, Any], actor_id: int | None = None) -> Any:
        if self._failure is not None:
            raise self._failure
        future = asyncio.get_running_loop().create_future()
        self._pool.waiting.append(_Call(verb, kwargs, future, actor_id, pinned=actor_id is not None))
        if self._pump_task is None or self._pump_task.done():
            self._pump_task = asyncio.create_task(self._pump(), name="rollout fleet")
        return await future

    async def _pump(self) -> None:
        """Send, fetch and restore until nothing is left to do. Only this task touches the manager's calls."""
        try:
            while self._pool.waiting or self._pool.sent:
                self._restore()
                self._send()
                self._fetch()
                await asyncio.sleep(_POLL_S)
        except Exception as error:  # noqa: BLE001 - whatever stops the pump must reach those who wait on it, not hang them
            self._failure = error
            for call in self._unfinished():
                # Nobody waits on a restoring pull, and asyncio complains of errors that nobody takes.
                call.future.cancel() if call.restoring else call.future.set_exception(error)
            self._pool = _Pool()

    def _unfinished(self) -> list[_Call]:
        return [call for call in [*self._pool.waiting, *self._pool.sent.values()] if not call.future.done()]

    def _in_service(self) -> list[int]:
        """Actors that may draw: healthy, and done with the pulls that bring them back."""
        restoring = {call.actor_id for call in self._pool.sent.values() if call.restoring}
        return [actor_id for actor_id in self._manager.healthy_actor_ids() if actor_id not in restoring]

    def _send(self) -> None:
        """Hand waiting calls to actors: pinned ones to theirs at once, chunks to the least busy with room."""
        load = dict.fromkeys(self._in_service(), 0)
        for call in self._pool.sent.values():
            if not call.pinned and call.actor_id in load:
                load[call.actor_id] += 1
        held: deque[_Call] = deque()
        while self._pool.waiting:
            call = self._pool.waiting.popleft()
            if call.future.cancelled():
                continue
            actor_id = call.actor_id if call.pinned else min(load, key=lambda a: (load[a], a), default=None)
            if not call.pinned:
                if actor_id is None or load[actor_id] >= _IN_FLIGHT_PER_ACTOR:
                    held.append(call)
                    continue
                load[actor_id] += 1
            self._dispatch(call, actor_id)
        self._pool.waiting.extend(held)

    def _dispatch(self, call: _Call, actor_id: int | None) -> None:
        call.actor_id = actor_id
        tag = next(self._tags)
        sent = actor_id is not None and self._manager.foreach_actor_async(
            call.verb, tag=tag, kwargs=call.kwargs, remote_actor_ids=[actor_id]
        )
        if sent:
            self._pool.sent[tag] = call
        else:
            self._give_up_actor(call)

    def _fetch(self) -> None:
        results = cast("Iterator[CallResult]", iter(self._manager.fetch_ready_async_reqs(timeout_seconds=0.0)))
        for result in results:
            call = self._pool.sent.get(result.tag)
            outcome = result.get()
            if call is None or (not result.ok and self._is_away(result.actor_id, outcome)):
                continue  # what an actor that is away has not done is taken back below
            del self._pool.sent[result.tag]
            if call.future.done():
                continue
            if result.ok:
                call.future.set_result(outcome)
            elif call.restoring:
                # The actor would go on with other weights than the rest, or none.
                raise _plain(call, outcome)
            else:
                # An error of the work itself would come again on any actor: it ends the run.
                call.future.set_exception(_plain(call, outcome))
        self._reclaim()

    def _reclaim(self) -> None:
        """Take back what lies with actors that went out of service: the manager drops all their calls at once."""
        healthy = set(self._manager.healthy_actor_ids())
        lost = [tag for tag, call in self._pool.sent.items() if call.actor_id not in healthy]
        for tag in reversed(lost):
            self._give_up_actor(self._pool.sent.pop(tag))

    def _give_up_actor(self, call: _Call) -> None:
        """The call's actor died: a chunk goes first in the queue, for any other; a pinned call is over."""
        if call.pinned and not call.future.done():
            call.future.set_result(None)
        elif not call.pinned:
            call.actor_id = None
            self._pool.waiting.appendleft(call)

    def _is_away(self, actor_id: int, error: Exception) -> bool:
        """Whether the called actor itself died, and not, say, the one that made a call's argument."""
        if isinstance(error, RayTaskError):
            # The actor lived to report it. One that Ray restarted unseen has no weights: it must be restored.
            fresh = unwrap(error)
            return isinstance(fresh, NotPulledError) and fresh.slot in self._snapshots
        if isinstance(error, RayActorError):
            return error.actor_id in (None, self._actor_names[actor_id])
        return isinstance(error, (WorkerCrashedError, NodeDiedError, OutOfMemoryError))

    def _restore(self) -> None:
        """Bring actors back that Ray restarted; they draw when they hold the newest weights of every slot."""
        now = time.monotonic()
        if self._in_service():
            self._last_healthy_s = now
        elif now - self._last_healthy_s > _FLEET_LOST_AFTER_S:
            raise ClusterError(
                f"all {self._manager.num_actors()} rollout actors have been away for {_FLEET_LOST_AFTER_S:.0f} s; "
                "look at the cluster's nodes and the actors' logs, then `raylign resume`"
            )
        if now < self._next_probe_s or self._manager.num_healthy_actors() == self._manager.num_actors():
            return
        self._next_probe_s = now + _PROBE_EVERY_S
        for actor_id in self._manager.probe_unhealthy_actors(timeout_seconds=_PROBE_TIMEOUT_S, mark_healthy=True):
            for slot, snapshot in self._snapshots.items():
                future = asyncio.get_running_loop().create_future()
                kwargs = {"snapshot": snapshot, "slot": slot}
                self._dispatch(_Call("pull", kwargs, future, actor_id, pinned=True, restoring=True), actor_id)


def _plain(call: _Call, error: Exception) -> BaseException:
    """The error for whoever waits on a call: Raylign's own as it was, a lost argument with what to do about it."""
    plain = unwrap(error)
    reason = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(plain, RaylignError) or not isinstance(reason, RayError):
        return plain
    what = (
        f"the {call.kwargs['slot']} weights that were to be pulled"
        if call.verb == "pull"
        else f"what {call.verb} needs"
    )
    lost = ClusterError(
        f"rollout actor {call.actor_id} lives but {what} are lost ({type(reason).__name__}): the learner that made "
        "them, or its node, is gone. Look at the cluster's nodes and the learner's log, then `raylign resume`"
    )
    lost.__cause__ = reason
    return lost
