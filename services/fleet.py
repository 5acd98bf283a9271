"""The rollout fleet on Ray: a queue of chunks over actors that come, go, die, hang and come back.

    new ──▶ asked until it answers ──▶ pulls the newest weights ──▶ in service ──▶ leaving: finishes what it has
                     ▲                                                  │
                     └──────────── away: died, or took too long ◀───────┘

RLlib's FaultTolerantActorManager (in services/ray_actors.py) keeps the actors, their health and their calls in flight;
this file adds what a rollout fleet needs on top: chunks go to whichever actor is free, a chunk whose actor died or
hangs goes to another (samples are keyed, so the result is the same), and an actor that is new or came back pulls the
newest weights before it works. RLlib's LearnerGroup is not used: its learners eat episodes, ours eats rollout groups.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from raylign.errors import ClusterError, RaylignError
from raylign.types import RolloutGroup
from raylign.weights import TornSnapshotError
from rollout.drawn import Pulled, Slot
from rollout.engine import ChunkRequest, Probe, WeightSlot
from services.elastic import PoolStatus, who_leaves
from services.fleet_calls import Absence, Call, Pool, plain_error
from services.patience import Patience
from services.publication import Mending, Publication
from services.ray_actors import Actors, RayActors
from services.ray_errors import NotPulledError, unwrap
from services.roles import SnapshotHandle

# A second chunk waits at each actor, so that it never idles for a round trip.
_IN_FLIGHT_PER_ACTOR = 2
_POLL_S = 0.002
# Nothing is under way but actors that come, go or may come back.
_IDLE_POLL_S = 0.02
_PROBE_EVERY_S = 1.0
# A lost actor reloads its model; a whole fleet lost for this long will not come back by itself.
_FLEET_LOST_AFTER_S = 300.0
_PING = "ping"
# Longer gaps between two looks are the driver's own (it was stopped, or busy), not the actors'.
_MAX_TICK_S = 1.0


class RayFleet:
    """A Fleet of worker actors; see the module."""

    def __init__(
        self,
        actors: Sequence[ActorHandle],
        create: Callable[[], ActorHandle] | None = None,
        late: Sequence[ActorHandle] = (),
        patience: Patience | None = None,
        manager: Actors | None = None,
    ) -> None:
        """`actors` are up, `late` ones join when they are. `create` makes one more; without it the fleet is fixed."""
        self._manager: Actors = manager if manager is not None else RayActors(_IN_FLIGHT_PER_ACTOR)
        self._create = create
        self._patience = patience if patience is not None else Patience()
        self._pool = Pool()
        self._absent: dict[int, Absence] = {}
        self._new: set[int] = set()
        self._leaving: set[int] = set()
        self._snapshots: dict[WeightSlot, SnapshotHandle] = {}
        self._mending: dict[WeightSlot, Mending] = {}
        self._tags = (f"call-{n}" for n in itertools.count())
        self._pump_task: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._paused = False
        self._problem = ""
        self._num_restarts = self._num_hung = 0
        self._next_probe_s = 0.0
        self._watched_s = self._last_healthy_s = 0.0
        self._looked_s = time.monotonic()
        for actor in actors:
            self._add(actor)
        for actor in late:
            self._add(actor, new=True)

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
        """Every healthy actor loads it; one that is away pulls it when it comes back. One report per healthy actor.

        An actor that gets it torn is away until it was published again.
        """
        published = snapshot if isinstance(snapshot, Publication) else Publication(snapshot, snapshot)
        self._hold(published, slot)
        actor_ids = self._pulling()
        broadcast = published.seat(actor_ids) if published.seat is not None else None

        async def one(actor_id: int) -> Pulled | None:
            ticket = published.newest if broadcast is None else broadcast.tickets[actor_id]
            report = await self._submit("pull", {"snapshot": ticket, "slot": slot}, actor_id)
            if broadcast is not None and (report is None or report.detour):
                broadcast.lost(actor_id)
            return report

        reports = await asyncio.gather(*(one(actor_id) for actor_id in actor_ids))
        if broadcast is not None:
            await broadcast.ended()
        return [report for report in reports if report is not None]

    def _hold(self, published: Publication, slot: WeightSlot) -> None:
        """Whoever comes back pulls this from now on."""
        self._snapshots[slot] = published.whole
        if slot in self._mending:
            self._mending[slot].close()
        self._mending[slot] = Mending(published.again, lambda whole: self._snapshots.update({slot: whole}))

    @property
    def num_restarts(self) -> int:
        """How often an actor came back."""
        return self._num_restarts

    def resize(self, num_actors: int) -> None:
        """Change the number of actors. New ones join when they are up; those that go finish the chunks they have.

        Takes effect at once and returns at once. Must run on the fleet's event loop.
        """
        if self._create is None:
            raise ClusterError("this fleet was made without a way to make actors; its number is fixed")
        staying = self._staying()
        self._leaving.update(who_leaves(staying, self._in_service(), len(staying) - num_actors))
        for _ in range(num_actors - len(staying)):
            self._add(self._create(), new=True)
        self._start_pump()

    def pause(self) -> None:
        """Send no more chunks; those that are under way are finished."""
        self._paused = True

    def go_on(self) -> None:
        """End a pause."""
        self._paused = False

    def begin_again(self) -> None:
        """Forget the weights that were pulled, and what became of the fleet without them: another learner publishes.

        Actors work on. What nobody waits for any more is let go of.
        """
        for call in self._unfinished():
            call.future.cancel()
        self._forget_weights()
        self._failure = None

    def status(self) -> PoolStatus:
        """How many actors are in which state."""
        staying, in_service, joining = self._staying(), self._in_service(), self._new - self._leaving
        return PoolStatus(
            wanted=len(staying),
            in_service=len(in_service),
            joining=len(joining),
            away=len(staying) - len(in_service) - len(joining),
            leaving=len(self._leaving),
            restarts=self._num_restarts,
            hung=self._num_hung,
            paused=self._paused,
            problem=self._problem,
        )

    def handles(self) -> dict[int, ActorHandle]:
        """The actors in service, by number; numbers are not given twice."""
        return {actor_id: self._manager.handle(actor_id) for actor_id in self._in_service()}

    async def close(self) -> None:
        if self._pump_task is not None:
            self._pump_task.cancel()
            await asyncio.gather(self._pump_task, return_exceptions=True)
        for call in self._unfinished():
            call.future.cancel()
        self._forget_weights()
        self._pool = Pool()
        self._manager.clear()

    def _add(self, actor: ActorHandle, new: bool = False) -> None:
        actor_id = self._manager.add(actor)
        if new:
            self._new.add(actor_id)
            self._miss(actor_id)

    def _discard(self, actor_id: int) -> None:
        """Let go of an actor for good; its calls are taken back by whoever looks next."""
        self._manager.remove(actor_id)
        self._absent.pop(actor_id, None)
        self._new.discard(actor_id)
        self._leaving.discard(actor_id)

    def _miss(self, actor_id: int, hung: bool = False) -> None:
        """Take an actor out of service until it answers."""
        self._manager.set_healthy(actor_id, False)
        self._absent[actor_id] = Absence(self._watched_s, hung)

    def _forget_weights(self) -> None:
        for mending in self._mending.values():
            mending.close()
        self._mending.clear()
        self._snapshots.clear()

    def _pulling(self) -> list[int]:
        """Actors that take part in what concerns every healthy one."""
        return [actor_id for actor_id in self._manager.healthy() if actor_id not in self._leaving]

    def _staying(self) -> list[int]:
        return [actor_id for actor_id in self._manager.ids() if actor_id not in self._leaving]

    async def _on_every_actor(self, verb: str, kwargs: dict[str, Any]) -> list[Any]:
        """One answer per healthy actor, None for those that die meanwhile."""
        return await asyncio.gather(*(self._submit(verb, kwargs, actor_id) for actor_id in self._pulling()))

    async def _submit(self, verb: str, kwargs: dict[str, Any], actor_id: int | None = None) -> Any:
        if self._failure is not None:
            raise self._failure
        future = asyncio.get_running_loop().create_future()
        self._pool.waiting.append(Call(verb, kwargs, future, actor_id, pinned=actor_id is not None))
        self._start_pump()
        return await future

    def _start_pump(self) -> None:
        if self._pump_task is None or self._pump_task.done():
            self._looked_s = time.monotonic()
            self._pump_task = asyncio.create_task(self._pump(), name="rollout fleet")

    async def _pump(self) -> None:
        """Send, fetch, restore and let go until nothing is left to do. Only this task touches the manager's calls."""
        try:
            while self._pool.waiting or self._pool.sent or self._absent or self._leaving:
                now = time.monotonic()
                self._watched_s += min(now - self._looked_s, _MAX_TICK_S)
                self._looked_s = now
                self._restore()
                self._send()
                self._fetch()
                self._release()
                idle = not self._pool.sent and (self._paused or not self._pool.waiting)
                await asyncio.sleep(_IDLE_POLL_S if idle else _POLL_S)
        except Exception as error:  # noqa: BLE001 - whatever stops the pump must reach those who wait on it, not hang them
            self._failure = error
            for call in self._unfinished():
                # Nobody waits on a restoring pull, and asyncio complains of errors that nobody takes.
                call.future.cancel() if call.restoring else call.future.set_exception(error)
            self._pool = Pool()

    def _unfinished(self) -> list[Call]:
        return [call for call in [*self._pool.waiting, *self._pool.sent.values()] if not call.future.done()]

    def _in_service(self) -> list[int]:
        """Actors that may draw: healthy, done with the pulls that bring them back, and staying."""
        out = {call.actor_id for call in self._pool.sent.values() if call.restoring} | self._leaving
        return [actor_id for actor_id in self._manager.healthy() if actor_id not in out]

    def _send(self) -> None:
        """Hand waiting calls to actors: pinned ones to theirs at once, chunks to the least busy with room."""
        load = dict.fromkeys(self._in_service(), 0)
        for call in self._pool.sent.values():
            if not call.pinned and call.actor_id in load:
                load[call.actor_id] += 1
        held: deque[Call] = deque()
        while self._pool.waiting:
            call = self._pool.waiting.popleft()
            if call.future.cancelled():
                continue
            actor_id = call.actor_id if call.pinned else min(load, key=lambda a: (load[a], a), default=None)
            if not call.pinned:
                held_back = self._paused and call.verb == "generate"
                if held_back or actor_id is None or load[actor_id] >= _IN_FLIGHT_PER_ACTOR:
                    held.append(call)
                    continue
                load[actor_id] += 1
            self._dispatch(call, actor_id)
        self._pool.waiting.extend(held)

    def _dispatch(self, call: Call, actor_id: int | None) -> None:
        call.actor_id, call.begun_s = actor_id, None
        tag = next(self._tags)
        if actor_id is not None and self._manager.call(actor_id, call.verb, tag, call.kwargs):
            self._pool.sent[tag] = call
        else:
            self._give_up_actor(call)

    def _fetch(self) -> None:
        for answer in self._manager.answers():
            if answer.tag == _PING:
                self._answered(answer.actor_id, answer.outcome if answer.failed else None)
                continue
            call = self._pool.sent.get(answer.tag)
            if call is None or (answer.failed and self._is_away(answer.actor_id, answer.outcome)):
                continue  # what an actor that is away has not done is taken back below
            del self._pool.sent[answer.tag]
            if not answer.failed:
                self._patience.learn(call.kind, self._watched_s - (call.begun_s or self._watched_s))
            if call.future.done():
                continue
            if not answer.failed:
                call.future.set_result(answer.outcome)
            elif self._may_mend(call, answer.outcome):
                call.future.set_result(None)
            elif call.restoring:
                self._cannot_restore(answer.actor_id, plain_error(call, answer.outcome))
            else:
                # An error of the work itself would come again on any actor: it ends the run.
                call.future.set_exception(plain_error(call, answer.outcome))
        self._look_for_hung()
        self._reclaim()
        self._new.difference_update(self._in_service())

    def _may_mend(self, call: Call, error: Exception) -> bool:
        """Whether an actor got weights torn that are, or will be, published again: it is out of service until then."""
        plain = unwrap(error)
        slot = call.kwargs.get("slot")
        if call.verb != "pull" or not isinstance(plain, TornSnapshotError) or slot not in self._mending:
            return False
        self._problem = str(plain)
        return self._mending[slot].may_mend(call.kwargs["snapshot"], self._snapshots[slot])

    def _cannot_restore(self, actor_id: int, error: BaseException) -> None:
        """An actor would go on with other weights than the rest, or none. One that is new was not needed before."""
        if actor_id not in self._new:
            raise error
        self._problem = str(error)
        if actor_id in self._manager.ids():
            self._discard(actor_id)

    def _look_for_hung(self) -> None:
        """Give up actors whose call takes far longer than such calls do. Each works on the first that it was sent."""
        heads: set[int] = set()
        for call in self._pool.sent.values():
            actor_id = call.actor_id
            if actor_id is None or actor_id in heads or actor_id in self._absent:
                continue
            heads.add(actor_id)
            if call.begun_s is None:
                call.begun_s = self._watched_s
            elif self._watched_s - call.begun_s > self._patience.limit_s(call.kind, call.tries):
                self._num_hung += 1
                call.tries += 1
                self._miss(actor_id, hung=True)

    def _release(self) -> None:
        """Let those go that were to leave and have nothing left to do."""
        busy = {call.actor_id for call in [*self._pool.sent.values(), *self._pool.waiting] if call.actor_id is not None}
        for actor_id in self._leaving - busy:
            self._discard(actor_id)

    def _reclaim(self) -> None:
        """Take back what lies with actors that went out of service: the manager drops all their calls at once."""
        healthy = set(self._manager.healthy())
        lost = [tag for tag, call in self._pool.sent.items() if call.actor_id not in healthy]
        for tag in reversed(lost):
            self._give_up_actor(self._pool.sent.pop(tag))
        for actor_id in self._manager.ids():
            if actor_id not in healthy and actor_id not in self._absent:
                self._absent[actor_id] = Absence(self._watched_s)

    def _give_up_actor(self, call: Call) -> None:
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
            return error.actor_id in (None, self._manager.name(actor_id))
        return isinstance(error, (WorkerCrashedError, NodeDiedError, OutOfMemoryError))

    def _restore(self) -> None:
        """Ask those that are away whether they are there; a hung one that stays silent is started anew."""
        now = self._watched_s
        if self._in_service():
            self._last_healthy_s = now
        elif now - self._last_healthy_s > _FLEET_LOST_AFTER_S:
            raise ClusterError(
                f"all {len(self._manager.ids())} rollout actors have been away for {_FLEET_LOST_AFTER_S:.0f} s; "
                "look at the cluster's nodes and the actors' logs, then `raylign resume`"
            )
        if not self._absent or time.monotonic() < self._next_probe_s:
            return
        self._next_probe_s = time.monotonic() + _PROBE_EVERY_S
        for actor_id, absence in self._absent.items():
            if not absence.asked:
                absence.asked = True
                self._manager.ask(actor_id, _PING)
            elif actor_id not in self._new and now - absence.since_s > self._patience.silence_s(absence.hung):
                absence.since_s, absence.hung = now, False
                self._manager.restart(actor_id)

    def _answered(self, actor_id: int, error: Exception | None) -> None:
        """What an actor that was away says: it works again when it holds the newest weights of every slot."""
        absence = self._absent.get(actor_id)
        if absence is None:
            return
        if error is not None:
            absence.asked = False
            self._silent(actor_id, unwrap(error))
            return
        if any(mending.is_torn for mending in self._mending.values()):
            absence.asked = False
            return
        del self._absent[actor_id]
        self._num_restarts += actor_id not in self._new
        self._manager.set_healthy(actor_id, True)
        for slot, snapshot in self._snapshots.items():
            future = asyncio.get_running_loop().create_future()
            kwargs = {"snapshot": snapshot, "slot": slot}
            self._dispatch(Call("pull", kwargs, future, actor_id, pinned=True, restoring=True), actor_id)

    def _silent(self, actor_id: int, error: BaseException) -> None:
        """An actor did not answer. It is asked again, unless it refuses to work or will never come back."""
        if actor_id in self._new and isinstance(error, (RaylignError, ActorDiedError)):
            self._problem = str(error)
            self._discard(actor_id)
        elif isinstance(error, ActorDiedError):
            if self._create is None:
                raise ClusterError(
                    f"rollout actor {actor_id} of a fixed fleet died, and nothing starts it again; `raylign resume`"
                )
            # One that worked and that Ray does not start again, for instance because a person ended it.
            leaving = actor_id in self._leaving
            self._discard(actor_id)
            if not leaving:
                self._add(self._create(), new=True)
