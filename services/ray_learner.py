"""The central learner on Ray: one actor per rank, every verb called on all of them, rank 0's answer taken."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import torch
from ray.actor import ActorHandle

from learner.checkpoint import new_token
from raylign.types import RolloutGroup, StepResult, WeightVersion
from rollout.engine import Probe
from services.ray_errors import answer
from services.roles import WhichPolicy


@dataclass(frozen=True, slots=True)
class Publication:
    """One published version, as references.

    newest: for an actor that holds the version before: what changed since, or the whole where that is not much more.
    whole: for everybody else.
    """

    newest: ray.ObjectRef
    whole: ray.ObjectRef


class RayLearner:
    """A LearnerRole over worker actors; `ranks[0]` publishes, saves and answers.

    Sharded ranks must take part in all of it. What concerns several ranks is asked of all in one go, with nothing
    awaited in between, so that every rank does the same things in the same order.
    """

    def __init__(self, ranks: Sequence[ActorHandle], deltas: bool = False, *, sharded: bool = False) -> None:
        """`deltas`: publish what changed since the last version, beside the whole. `sharded`: a rank holds its part
        of the weights only."""
        self._ranks = tuple(ranks)
        self._sharded = sharded and len(self._ranks) > 1
        self._deltas = deltas

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

    async def publish(self, version: WeightVersion, which: WhichPolicy) -> ray.ObjectRef | Publication:
        """A reference, or two: the snapshot itself goes from the learner's node straight to the actors.

        The receipt that comes with it is awaited, so a learner that dies while it publishes is noticed here.
        """
        if self._deltas:
            return await self._publish_changes(version, which)
        references: Any = self._ranks[0].publish.options(num_returns=2).remote(version, which)
        snapshot, receipt = references
        await asyncio.gather(answer(receipt), *self._contributions(which))
        return snapshot

    async def _publish_changes(self, version: WeightVersion, which: WhichPolicy) -> Publication:
        call = self._ranks[0].learner_call.options(num_returns=3)
        references: Any = call.remote("publish_changes", version, which)
        delta, whole, kind = references
        sent, *_ = await asyncio.gather(answer(kind), *self._contributions(which))
        return Publication(delta if sent == "delta" else whole, whole)

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
