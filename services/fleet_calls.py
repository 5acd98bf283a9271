"""Calls of the rollout fleet on their way to actors, and what their errors mean to those who wait."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError, RayTaskError

from raylign.errors import ClusterError, RaylignError
from rollout.engine import ChunkRequest
from services.ray_errors import unwrap


@dataclass(slots=True)
class Call:
    """One call on its way to an actor.

    A chunk goes to any actor. A pinned call is about one actor (a pull, a probe); if that actor dies, its answer is
    None. A restoring pull brings an actor into service, so its failure is the fleet's.
    """

    verb: str
    kwargs: dict[str, Any]
    future: asyncio.Future[Any]
    actor_id: int | None = None
    pinned: bool = False
    restoring: bool = False
    begun_s: float | None = None
    """When it was first seen at the head of its actor's queue."""
    tries: int = 0

    @property
    def kind(self) -> Hashable:
        """Calls of one kind take about as long as each other."""
        request = self.kwargs.get("request")
        if isinstance(request, ChunkRequest):
            return self.verb, request.slot, request.point, len(request.tasks) * len(request.sample_indices)
        return self.verb, self.kwargs.get("slot"), self.restoring


@dataclass(slots=True)
class Absence:
    """An actor that does not work: new, died or hung. It is asked whether it is there, one question at a time."""

    since_s: float
    hung: bool = False
    asked: bool = False


@dataclass(slots=True)
class Pool:
    """Calls not yet sent, and calls sent, by tag."""

    waiting: deque[Call] = field(default_factory=deque)
    sent: dict[str, Call] = field(default_factory=dict)


def plain_error(call: Call, error: Exception) -> BaseException:
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
