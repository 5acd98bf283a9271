"""Errors of workers as what they are: Ray wraps them, with the worker's traceback in the message."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayError

from raylign.errors import RaylignError, WeightError


class NotPulledError(WeightError):
    """An actor without weights was asked to work: new, or restarted by Ray while nobody called it."""

    def __init__(self, slot: str) -> None:
        super().__init__(slot)
        self.slot = slot

    def __str__(self) -> str:
        return f"no {self.slot} weights were pulled yet; pull a snapshot before generating"


def unwrap(error: BaseException) -> BaseException:
    """The Raylign error inside a Ray error, if there is one; else the error itself."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RaylignError) and not isinstance(seen, RayError):
            return seen
        cause = getattr(seen, "cause", None)
        seen = cause if isinstance(cause, BaseException) else seen.__cause__
    return error


def actor_name(actor: ActorHandle) -> str:
    """The identity by which Ray's errors name an actor."""
    return actor._actor_id.hex()  # pyright: ignore[reportPrivateUsage]  # Ray has no public way to ask a handle


async def answer(reference: Awaitable[Any]) -> Any:
    """What a worker returned; its own Raylign error is raised plainly."""
    try:
        return await reference
    except RayError as error:
        plain = unwrap(error)
        if plain is error:
            raise
        raise plain from None
