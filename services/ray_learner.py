"""The central learner on Ray: one actor per rank, every verb called on all of them, rank 0's answer taken."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.actor import ActorHandle

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
    """A LearnerRole over worker actors; `ranks[0]` publishes, saves and answers."""

    def __init__(self, ranks: Sequence[ActorHandle], deltas: bool = False) -> None:
        """`deltas`: publish what changed since the last version, beside the whole."""
        self._ranks = tuple(ranks)
        self._deltas = deltas

    async def begin_step(self, groups: Sequence[RolloutGroup], step: int) -> Mapping[str, float]:
        return await self._call("begin_step", ray.put(list(groups)), step)

    async def forward_backward(self, update: int) -> None:
        await self._call("forward_backward", update)

    async def optimise(self, update: int) -> StepResult:
        return await self._call("optimise", update)

    async def end_step(self, step: int) -> Mapping[str, float]:
        return await self._call("end_step", step)

    async def publish(self, version: WeightVersion, which: WhichPolicy) -> ray.ObjectRef | Publication:
        """A reference, or two: the snapshot itself goes from the learner's node straight to the actors.

        The receipt that comes with it is awaited, so a learner that dies while it publishes is noticed here.
        """
        if self._deltas:
            return await self._publish_changes(version, which)
        references: Any = self._ranks[0].publish.options(num_returns=2).remote(version, which)
        snapshot, receipt = references
        await answer(receipt)
        return snapshot

    async def _publish_changes(self, version: WeightVersion, which: WhichPolicy) -> Publication:
        call = self._ranks[0].learner_call.options(num_returns=3)
        references: Any = call.remote("publish_changes", version, which)
        delta, whole, kind = references
        return Publication(delta if await answer(kind) == "delta" else whole, whole)

    async def save(self, folder: Path, record: Mapping[str, Any]) -> None:
        await self._first("save", str(folder), dict(record))

    async def load(self, folder: Path) -> None:
        await asyncio.gather(*(answer(rank.load.remote(str(folder))) for rank in self._ranks))

    async def predict(self, probe: Probe) -> torch.Tensor:
        parts = probe.state, probe.sigma_B, probe.conditioning
        return (await self._first("learner_call", "predict", *parts)).cpu()

    async def weights_sha256(self) -> str:
        return await self._first("learner_call", "weights_sha256")

    async def _first(self, method: str, *args: Any) -> Any:
        """Call rank 0 alone."""
        return await answer(getattr(self._ranks[0], method).remote(*args))

    async def _call(self, verb: str, *args: Any) -> Any:
        answers = await asyncio.gather(*(answer(rank.learner_call.remote(verb, *args)) for rank in self._ranks))
        return answers[0]
