"""Fakes at the seams, for tests of what lies between them: a policy of two numbers, roles that only remember."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylign.models.base import Conditioning
from raylign.models.schedule import FlowSchedule, NoiseSchedule
from raylign.types import (
    LatentTrajectory,
    RewardBreakdown,
    RewardFailure,
    RewardSample,
    RewardScore,
    Rollout,
    RolloutGroup,
    RolloutStatus,
    SampleKey,
    StepResult,
    WeightVersion,
    Work,
)
from raylign.weights import WeightSnapshot, make_snapshot, verify_snapshot
from rollout.drawn import Pulled
from rollout.engine import ChunkRequest, Probe, Slot
from rollout.prompts import GroupTask


class TwoNumberPolicy:
    """A DenoisingPolicy: velocity = scale * state + shift * (length of the prompt); pictures are its signs."""

    schedule: NoiseSchedule = FlowSchedule(1.0)
    latent_shape: tuple[int, int, int] = (1, 2, 3)
    device: torch.device = torch.device("cpu")

    def __init__(self) -> None:
        self.scale = torch.nn.Parameter(torch.tensor([0.5]))
        self.shift = torch.nn.Parameter(torch.tensor([0.1]))
        self.num_encoded = 0

    def encode(self, text: str, with_negative: bool) -> Conditioning:
        self.num_encoded += 1
        embeds = torch.full((1, 1, 1), float(len(text)))
        zeros = torch.zeros(1, 1, 1)
        negative = Conditioning(zeros, zeros[:, 0]) if with_negative else None
        return Conditioning(embeds, embeds[:, 0], negative=negative)

    def predict(self, state_BCHW: torch.Tensor, sigma_B: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        told = conditioning.need_pooled().view(-1, 1, 1, 1)
        return self.scale * state_BCHW + self.shift * told + 0.0 * sigma_B.view(-1, 1, 1, 1)

    def decode(self, state_BCHW: torch.Tensor) -> np.ndarray:
        grey = (torch.sigmoid(state_BCHW[:, 0]) * 255).to(torch.uint8).numpy()
        return np.repeat(grey[..., None], 3, axis=-1)

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"scale": self.scale, "shift": self.shift}

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to recompute."""

    def export_weights(self, version: WeightVersion, tensors: dict[str, torch.Tensor] | None = None) -> WeightSnapshot:
        return make_snapshot(tensors or dict(self.trainable_parameters()), version, "full")

    def load_weights(self, snapshot: WeightSnapshot) -> None:
        tensors = verify_snapshot(snapshot, dict.fromkeys(self.trainable_parameters(), (1,)))
        with torch.no_grad():
            for name, parameter in self.trainable_parameters().items():
                parameter.copy_(tensors[name])


def make_group(task: GroupTask, indices: Sequence[int], version: WeightVersion, **changes: Any) -> RolloutGroup:
    """A group of 1x1 pictures drawn by nobody."""
    count = len(indices)
    return RolloutGroup(
        prompt=task.prompt,
        visit=task.visit,
        sequence=task.sequence,
        rollouts=tuple(
            Rollout(SampleKey(0, task.prompt.id, task.visit, index), RolloutStatus.OK, version, version)
            for index in indices
        ),
        trajectory=LatentTrajectory(torch.zeros(count, 1, 1, 1), torch.tensor([1.0, 0.0])),
        conditioning=Conditioning(torch.zeros(1, 1, 1), torch.zeros(1, 1)),
        images_GHWC=np.zeros((count, 1, 1, 3), np.uint8),
        **changes,
    )


class FakeFleet:
    """Makes groups after random pauses, with the version it was last given."""

    def __init__(self, seed: int = 0) -> None:
        self.version = -1
        self.num_chunks = 0
        self.requests: list[ChunkRequest] = []
        self._chance = random.Random(seed)

    async def generate(self, request: ChunkRequest) -> list[RolloutGroup]:
        self.num_chunks += 1
        self.requests.append(request)
        version = self.version
        assert version >= 0, "asked to generate before any weights were pulled"
        for _ in range(self._chance.randrange(30)):
            await asyncio.sleep(0)
        return [make_group(task, request.sample_indices, version) for task in request.tasks]

    async def pull(self, snapshot: Any, slot: Slot) -> list[Pulled]:
        for _ in range(self._chance.randrange(20)):
            await asyncio.sleep(0)
        if slot == "rollout":
            self.version = snapshot
        return [Pulled(snapshot, num_bytes=8, load_s=0.25, work=Work("fake", f"pull of {slot}", 0.0, 0.25))]

    async def precision_report(self) -> dict[Slot, str]:
        return {}

    async def probe_all(self, text: str, slot: Slot = "rollout") -> list[Probe]:
        ones = torch.ones(1, 1, 1, 1)
        return [Probe(self.version, ones, torch.ones(1), Conditioning(ones[0], ones[0, 0]), ones)]

    async def close(self) -> None: ...


class FakeScorer:
    """Scores each sample with a function; None is a failure. Remembers whether each call was an evaluation."""

    def __init__(self, value: Callable[[RewardSample], float | None] = lambda sample: 1.0) -> None:
        self._value = value
        self.evaluations: list[bool] = []

    async def score(self, samples: Sequence[RewardSample], evaluation: bool = False) -> list[RewardBreakdown]:
        await asyncio.sleep(0)
        self.evaluations.append(evaluation)
        return [breakdown(self._value(sample)) for sample in samples]


def breakdown(value: float | None) -> RewardBreakdown:
    """A mix of one reward called "fake"."""
    error = RewardFailure("model_error", "the fake engine is out of ink") if value is None else None
    return RewardBreakdown(value, (RewardScore("fake", value, error),))


class FakeLearner:
    """Remembers what it was called with; `finite` decides which steps are refused."""

    def __init__(self, finite: Callable[[int], bool] = lambda step: True) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.trained: list[list[RolloutGroup]] = []
        self.parity_gap = 0.0
        self._finite = finite
        self._step = 0

    async def begin_step(self, groups: Sequence[RolloutGroup], step: int) -> Mapping[str, float]:
        self._step = step
        self.trained.append(list(groups))
        self.calls.append(("begin_step", step))
        return {}

    async def forward_backward(self, update: int) -> None:
        await asyncio.sleep(0)
        self.calls.append(("forward_backward", self._step, update))

    async def optimise(self, update: int) -> StepResult:
        self.calls.append(("optimise", self._step, update))
        return StepResult({"loss": 1.0}, self._finite(self._step))

    async def end_step(self, step: int) -> Mapping[str, float]:
        self.calls.append(("end_step", step))
        return {}

    async def adjust(self, lr_scale: float, kl_scale: float) -> None:
        self.calls.append(("adjust", lr_scale, kl_scale))

    async def publish(self, version: WeightVersion, which: str) -> Any:
        await asyncio.sleep(0)
        self.calls.append(("publish", version, which))
        return version

    async def save(self, folder: Path, record: Mapping[str, Any]) -> None:
        self.calls.append(("save", folder.name))

    async def load(self, folder: Path) -> None:
        self.calls.append(("load", folder.name))

    async def predict(self, probe: Probe) -> torch.Tensor:
        return probe.answer * (1 + self.parity_gap)

    async def weights_sha256(self) -> str:
        return "0"
