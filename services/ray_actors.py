"""The actors of a fleet, by number: RLlib's FaultTolerantActorManager behind the few verbs that the fleet needs.

What is taken from the manager: who is healthy, which calls are in flight at whom, fetching those that are ready without
waiting, forgetting the calls of an actor that goes out of service, and taking actors in and out of the pool
(`add_actors`, `remove_actor`). What is not: `probe_unhealthy_actors`, which blocks the event loop for its timeout once
a second for as long as one actor is away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import ray
from ray.actor import ActorHandle
from ray.rllib.utils.actor_manager import CallResult, FaultTolerantActorManager

from services.ray_errors import actor_name


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a call: its result, or the error if `failed`."""

    tag: str
    actor_id: int
    outcome: Any
    failed: bool


class Actors(Protocol):
    """Actors that may die. One that answers with an error is unhealthy from then on, and its calls are forgotten."""

    def add(self, actor: Any) -> int: ...
    def remove(self, actor_id: int) -> None:
        """End it for good."""
        ...

    def restart(self, actor_id: int) -> None:
        """Kill its process, so that a new one starts."""
        ...

    def ids(self) -> list[int]: ...
    def healthy(self) -> list[int]: ...
    def set_healthy(self, actor_id: int, healthy: bool) -> None: ...
    def call(self, actor_id: int, verb: str, tag: str, kwargs: Mapping[str, Any]) -> bool:
        """Send a call; False if the actor is not there to take it. Tags of calls in flight at one actor differ."""
        ...

    def ask(self, actor_id: int, tag: str) -> None:
        """Ping it, healthy or not."""
        ...

    def answers(self) -> list[Answer]:
        """Those that are in, at once."""
        ...

    def handle(self, actor_id: int) -> Any: ...
    def name(self, actor_id: int) -> str:
        """How errors name it, also when it was removed."""
        ...

    def clear(self) -> None:
        """End them all."""
        ...


class RayActors:
    """`Actors` on Ray."""

    def __init__(self, in_flight_per_actor: int) -> None:
        self._manager = FaultTolerantActorManager(max_remote_requests_in_flight_per_actor=in_flight_per_actor)
        self._names: list[str] = []

    def add(self, actor: ActorHandle) -> int:
        self._manager.add_actors([actor])
        self._names.append(actor_name(actor))
        # The manager counts from 0 and gives no number twice.
        return len(self._names) - 1

    def remove(self, actor_id: int) -> None:
        ray.kill(self._manager.remove_actor(actor_id), no_restart=True)

    def restart(self, actor_id: int) -> None:
        ray.kill(self.handle(actor_id), no_restart=False)

    def ids(self) -> list[int]:
        return self._manager.actor_ids()

    def healthy(self) -> list[int]:
        return self._manager.healthy_actor_ids()

    def set_healthy(self, actor_id: int, healthy: bool) -> None:
        self._manager.set_actor_state(actor_id, healthy)

    def call(self, actor_id: int, verb: str, tag: str, kwargs: Mapping[str, Any]) -> bool:
        if actor_id not in self._manager.actor_ids():
            return False
        sent = self._manager.foreach_actor_async(verb, tag=tag, kwargs=dict(kwargs), remote_actor_ids=[actor_id])
        return sent > 0

    def ask(self, actor_id: int, tag: str) -> None:
        self._manager.foreach_actor_async("ping", tag=tag, healthy_only=False, remote_actor_ids=[actor_id])

    def answers(self) -> list[Answer]:
        results = cast("Iterator[CallResult]", iter(self._manager.fetch_ready_async_reqs(timeout_seconds=0.0)))
        return [Answer(result.tag or "", result.actor_id, result.get(), not result.ok) for result in results]

    def handle(self, actor_id: int) -> ActorHandle:
        return self._manager.actors()[actor_id]

    def name(self, actor_id: int) -> str:
        return self._names[actor_id]

    def clear(self) -> None:
        self._manager.clear()
