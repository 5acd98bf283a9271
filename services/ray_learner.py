"""The central learner on Ray: one actor per rank, every verb called on all of them, rank 0's answer taken."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import torch
from ray.actor import ActorHandle

from learner.checkpoint import new_token
from raylign.errors import WeightError
from raylign.types import RolloutGroup, StepResult, WeightVersion
from rollout.engine import Probe
from services.publication import Broadcasts, Publication
from services.ray_errors import answer
from services.roles import WhichPolicy


class RayLearner:
    """A LearnerRole over worker actors; `ranks[0]` publishes, saves and answers.

    Sharded ranks must take part in all of it. What concerns several ranks is asked of all in one go, with nothing
    awaited in between, so that every rank does the same things in the same order.
    """

    def __init__(
        self,
        ranks: Sequence[ActorHandle],
        deltas: bool = False,
        broadcasts: Broadcasts | None = None,
        sharded: bool = False,
    ) -> None:
        """`deltas`: publish what changed since the last version, beside the whole. `broadcasts`: seat the actors.

        `sharded`: a rank holds only its part of the weights.
        """
        self._ranks = tuple(ranks)
        self._sharded = sharded and len(self._ranks) > 1
        self._deltas = deltas
        self._broadcasts = broadcasts

    async def begin_step(self, groups: Sequence[RolloutGroup], step: int) -> Mapping[str, float]:
        return await self._call("begin_step", ray.put(list(groups)), step)

    async def forward_backward(self, update: int) -> None:
        await self._call("forward_backward", update)

    async def optimise(self, update: int) -> StepResult:
        return await self._call("optimise", update)

    async def end_step(self, step: int) -> Mapping[str, float]:
        return await self._call("end_step", step)

    async def adjust(self, lr_scale: float, kl_scale: float) -> None:
        await self._call("adjust", lr_scale, kl_scale)

    async def publish(self, version: WeightVersion, which: WhichPolicy) -> Publication:
        """References to tickets, which go from the learner's node straight to the actors.

        The receipt that comes with them is awaited, so a learner that dies while it publishes is noticed here.
        """
        if self._deltas:
            (changes, whole), (kind, sha256) = await self._ask_to_publish("publish_changes", 2, version, which)
            newest = changes if kind == "delta" else whole
        else:
            (whole,), (_, sha256) = await self._ask_to_publish("publish", 1, version, which)
            newest = whole

        async def again() -> ray.ObjectRef:
            return await self._publish_again(version, which, sha256)

        broadcasts = self._broadcasts
        if broadcasts is None:
            return Publication(newest, whole, again)
        return Publication(newest, whole, again, lambda actors: broadcasts.begin(actors, which, sha256, whole))

    async def _publish_again(self, version: WeightVersion, which: WhichPolicy, sha256: str) -> ray.ObjectRef:
        """The whole anew. Raises WeightError if the learner has other weights by now."""
        (whole,), (_, found) = await self._ask_to_publish("publish", 1, version, which)
        if found != sha256:
            raise WeightError(f"snapshot {version} cannot be published again: the learner has gone on")
        return whole

    async def _ask_to_publish(
        self, verb: str, num_tickets: int, version: WeightVersion, which: WhichPolicy
    ) -> tuple[list[ray.ObjectRef], tuple[str, str]]:
        """References to rank 0's tickets, and its receipt: kind and hash of what it published."""
        call = getattr(self._ranks[0], verb).options(num_returns=num_tickets + 1)
        *tickets, receipt = call.remote(version, which)
        kind_and_hash, *_ = await asyncio.gather(answer(receipt), *self._contributions(which))
        return tickets, kind_and_hash

    def _contributions(self, which: WhichPolicy) -> list[Coroutine[Any, Any, Any]]:
        """What the other ranks do while rank 0 gathers sharded weights."""
        others = self._ranks[1:] if self._sharded else ()
        return [answer(rank.learner_call.remote("contribute", which)) for rank in others]

    async def save(self, folder: Path, record: Mapping[str, Any]) -> None:
        if self._sharded:
            await self._save_parts(str(folder), dict(record))
        else:
            await self._first("save", str(folder), dict(record))

    async def _save_parts(self, folder: str, record: Mapping[str, Any]) -> None:
        """Every rank writes its part; when all have, rank 0 makes them a checkpoint. All or nothing."""
        token = new_token()
        written = await asyncio.gather(
            *(answer(rank.save_part.remote(folder, token)) for rank in self._ranks), return_exceptions=True
        )
        failures = [one for one in written if isinstance(one, BaseException)]
        if failures:
            with suppress(ray.exceptions.RayError):  # rank 0 is gone; the next save deletes what is left
                await self._first("discard_parts", folder, token)
            raise failures[0]
        await self._first("finish_save", folder, token, written, record)

    async def load(self, folder: Path) -> None:
        await asyncio.gather(*(answer(rank.load.remote(str(folder))) for rank in self._ranks))

    async def predict(self, probe: Probe) -> torch.Tensor:
        parts = probe.state, probe.sigma_B, probe.conditioning
        if self._sharded:
            return (await self._call("predict", *parts)).cpu()
        return (await self._first("learner_call", "predict", *parts)).cpu()

    async def weights_sha256(self) -> str:
        answers = self._first("learner_call", "weights_sha256"), *self._contributions("current")
        return (await asyncio.gather(*answers))[0]

    async def _first(self, method: str, *args: Any) -> Any:
        """Call rank 0 alone."""
        return await answer(getattr(self._ranks[0], method).remote(*args))

    async def _call(self, verb: str, *args: Any) -> Any:
        answers = await asyncio.gather(*(answer(rank.learner_call.remote(verb, *args)) for rank in self._ranks))
        return answers[0]
