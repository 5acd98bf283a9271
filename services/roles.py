"""The three roles a run is made of, as its controller sees them; `topology.py` decides what plays each.

A snapshot handle is whatever the learner's `publish` returned (the snapshot itself, or a reference into Ray's
object store); the controller only passes it on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from raylign.types import RewardBreakdown, RewardSample, RolloutGroup, StepResult, WeightVersion
from rollout.drawn import Pulled, Slot
from rollout.engine import ChunkRequest, Probe, WeightSlot

SnapshotHandle = Any
WhichPolicy = Literal["rollout", "current", "eval"]


class Fleet(Protocol):
    """Rollout workers."""

    async def generate(self, request: ChunkRequest) -> list[RolloutGroup]:
        """Draw one chunk on any worker."""
        ...

    async def probe_all(self, text: str, slot: Slot = "rollout") -> list[Probe]:
        """What each worker's policy of a slot predicts at the same keyed states, for the parity gate."""
        ...

    async def precision_report(self) -> Mapping[Slot, str]:
        """What computes the slots of a format below bf16, for a person to read; empty where there are none."""
        ...

    async def pull(self, snapshot: SnapshotHandle, slot: WeightSlot) -> Sequence[Pulled]:
        """Every worker verifies and loads a snapshot before its next chunk of that slot, and says what it took."""
        ...

    async def close(self) -> None: ...


class Scorer(Protocol):
    """The reward models and their mix."""

    async def score(self, samples: Sequence[RewardSample], evaluation: bool = False) -> list[RewardBreakdown]:
        """One breakdown per sample, in order; a failure is an error in it, never a number.

        Held-out metrics (`only_eval`) are asked in an `evaluation` only, and count nothing there.
        """
        ...


class LearnerRole(Protocol):
    """The central learner, on one rank or many. See `learner.learner.Learner` for what each verb does."""

    async def begin_step(self, groups: Sequence[RolloutGroup], step: int) -> Mapping[str, float]: ...

    async def forward_backward(self, update: int) -> None: ...

    async def optimise(self, update: int) -> StepResult: ...

    async def end_step(self, step: int) -> Mapping[str, float]: ...

    async def adjust(self, lr_scale: float, kl_scale: float) -> None:
        """Train from here on with the configured learning rate and weight of the KL times these. No part of a
        checkpoint: said anew after each `load`."""
        ...

    async def publish(self, version: WeightVersion, which: WhichPolicy) -> SnapshotHandle: ...

    async def save(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Write a checkpoint with the run's own record (step, prompt cursor, configuration hash) in it."""
        ...

    async def load(self, folder: Path) -> None:
        """Restore a checkpoint."""
        ...

    async def predict(self, probe: Probe) -> torch.Tensor:
        """What the published rollout policy answers in the learner, at a probe's states."""
        ...

    async def weights_sha256(self) -> str: ...
