"""The in-process placement: every role in this process, one thing at a time, no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from learner.checkpoint import load_checkpoint, save_checkpoint
from learner.learner import Learner
from raylign.types import RolloutGroup, StepResult, WeightVersion
from raylign.weights import WeightSnapshot
from rollout.drawn import Pulled, Slot
from rollout.engine import ChunkRequest, Probe, RolloutEngine, WeightSlot
from services.roles import WhichPolicy


class LocalFleet:
    """A Fleet of one engine."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine

    async def generate(self, request: ChunkRequest) -> list[RolloutGroup]:
        return self._engine.generate(request)

    async def probe_all(self, text: str, slot: Slot = "rollout") -> list[Probe]:
        return [self._engine.probe(text, slot)]

    async def precision_report(self) -> Mapping[Slot, str]:
        return self._engine.precision_report

    async def pull(self, snapshot: WeightSnapshot, slot: WeightSlot) -> list[Pulled]:
        return [self._engine.pull(snapshot, slot)]

    async def close(self) -> None:
        """Nothing to stop."""


class LocalLearner:
    """A LearnerRole around one learner."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    async def begin_step(self, groups: Sequence[RolloutGroup], step: int) -> Mapping[str, float]:
        return self._learner.begin_step(groups, step)

    async def forward_backward(self, update: int) -> None:
        self._learner.forward_backward(update)

    async def optimise(self, update: int) -> StepResult:
        return self._learner.optimise(update)

    async def end_step(self, step: int) -> Mapping[str, float]:
        return self._learner.end_step(step)

    async def adjust(self, lr_scale: float, kl_scale: float) -> None:
        self._learner.adjust(lr_scale, kl_scale)

    async def publish(self, version: WeightVersion, which: WhichPolicy) -> WeightSnapshot:
        return self._learner.publish(version, which)

    async def save(self, folder: Path, record: Mapping[str, Any]) -> None:
        save_checkpoint(folder, self._learner.state_dict(), record)

    async def load(self, folder: Path) -> None:
        self._learner.load_state_dict(load_checkpoint(folder).state)

    async def predict(self, probe: Probe) -> torch.Tensor:
        return self._learner.predict(probe.state, probe.sigma_B, probe.conditioning)

    async def weights_sha256(self) -> str:
        return self._learner.weights_sha256()
