"""Fleet, scorer and learner that compute nothing and take as long as recorded ones: what the real controller is run
with on a virtual clock. Groups are made of parts that exist already, so that little time goes into the roles.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from raylign.models.base import Conditioning
from raylign.types import (
    LatentTrajectory,
    RewardBreakdown,
    RewardSample,
    RewardScore,
    Rollout,
    RolloutGroup,
    RolloutStatus,
    SampleKey,
    StepResult,
    WeightVersion,
)
from rollout.drawn import EvalPoint, Pulled, Slot
from rollout.engine import ChunkRequest, Probe, WeightSlot


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one step: of a group (drawing and decoding, rewards), of the learner, of one hand-off."""

    draw_s: float
    reward_s: float
    train_s: float
    publish_s: float
    pull_s: float


@dataclass(frozen=True, slots=True)
class Recording:
    """A run that took place: its shape, and what each of its steps took."""

    num_actors: int
    groups_per_step: int
    group_size: int
    steps: tuple[StepTimes, ...]

    def medians(self) -> dict[str, float]:
        """The median of each phase."""
        names = StepTimes.__dataclass_fields__
        return {name: statistics.median(getattr(step, name) for step in self.steps) for name in names}


def read_recording(run_dir: Path) -> Recording:
    """The phases of a run directory's `metrics.jsonl`, its first step (which loads and warms up) left out.

    Raises SystemExit where there are too few steps, or nobody measured what groups took.
    """
    config = tomllib.loads((run_dir / "config.toml").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in lines if "busy/sample_s" in row][1:]
    if not rows:
        raise SystemExit(f"{run_dir} has fewer than two recorded steps; record a longer run")
    groups = int(config["groups_per_step"])
    steps = [
        StepTimes(
            draw_s=(row["busy/sample_s"] + row.get("busy/decode_s", 0.0)) / groups,
            reward_s=row.get("busy/reward_s", 0.0) / groups,
            train_s=row["time/train_s"] + row.get("time/credit_s", 0.0),
            publish_s=row["time/publish_s"],
            pull_s=row.get("pull/load_s", row["time/pull_s"]),
        )
        for row in rows
    ]
    return Recording(int(config["rollout"]["num_actors"]), groups, int(config["group_size"]), tuple(steps))


INSTANT = StepTimes(0.0, 0.0, 0.0, 0.0, 0.0)


class SimulatedFleet:
    """Actors that take one chunk or one pull at a time, die now and then, and hold versions of their own."""

    def __init__(
        self,
        num_actors: int,
        times: Callable[[], StepTimes],
        chance: random.Random,
        jitter: float = 0.0,
        deaths_per_hour: float = 0.0,
        restart_s: float = 30.0,
    ) -> None:
        """jitter: the deviation of the logarithm of a chunk's time. deaths_per_hour: of each busy actor."""
        self._times = times
        self._chance = chance
        self._jitter = jitter
        self._deaths_per_hour = deaths_per_hour
        self._restart_s = restart_s
        self._newest: WeightVersion = 0
        self._versions: list[WeightVersion] = [0] * num_actors
        self._locks = [asyncio.Lock() for _ in range(num_actors)]
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for actor in range(num_actors):
            self._free.put_nowait(actor)
        self._parts: dict[tuple[WeightVersion, tuple[int, ...]], tuple[Rollout, ...]] = {}
        self._latents = LatentTrajectory(torch.zeros(1, 1, 1, 1), torch.tensor([1.0, 0.0]))
        self._told = Conditioning(torch.zeros(1, 1, 1), torch.zeros(1, 1))
        self.busy_s = 0.0
        self.num_lost = 0

    async def generate(self, request: ChunkRequest) -> list[RolloutGroup]:
        while True:
            actor = await self._free.get()
            async with self._locks[actor]:
                version = self._versions[actor]
                took_s = self._times().draw_s * len(request.tasks) * self._chance.lognormvariate(0.0, self._jitter)
                died = self._chance.random() < self._deaths_per_hour * took_s / 3600
                await asyncio.sleep(took_s * (self._chance.random() if died else 1.0))
                self.busy_s += took_s
                if died:
                    self.num_lost += 1
                    await asyncio.sleep(self._restart_s)
                    self._versions[actor] = self._newest
            self._free.put_nowait(actor)
            if not died:
                return self._groups(request, version)

    def _groups(self, request: ChunkRequest, version: WeightVersion) -> list[RolloutGroup]:
        kind = version, tuple(request.sample_indices)
        if kind not in self._parts:
            self._parts[kind] = tuple(
                Rollout(SampleKey(0, "simulated", 0, index), RolloutStatus.OK, version, version) for index in kind[1]
            )
        return [
            RolloutGroup(
                task.prompt,
                task.visit,
                task.sequence,
                self._parts[kind],
                self._latents,
                self._told,
                seconds={"sample": 1.0, "decode": 0.1},
            )
            for task in request.tasks
        ]

    async def pull(self, snapshot: Any, slot: WeightSlot) -> list[Pulled]:
        pull_s = self._times().pull_s
        self._newest = snapshot

        async def one(actor: int) -> Pulled:
            async with self._locks[actor]:  # between two chunks
                await asyncio.sleep(pull_s)
                self._versions[actor] = max(self._versions[actor], snapshot)
            return Pulled(snapshot, num_bytes=0, load_s=pull_s)

        return list(await asyncio.gather(*(one(actor) for actor in range(len(self._versions)))))

    async def probe_all(self, text: str, slot: Slot = "rollout") -> list[Probe]:
        ones = torch.ones(1, 1, 1, 1)
        return [Probe(self._newest, ones, torch.ones(1), self._told, ones)]

    async def precision_report(self) -> Mapping[Slot, str]:
        return {}

    async def close(self) -> None: ...


class SimulatedScorer:
    """Two rewards with a detail each, as real ones have."""

    def __init__(self, times: Callable[[], StepTimes]) -> None:
        self._times = times
        scores = tuple(RewardScore(name, 0.5, details={"exact": False}) for name in ("one", "other"))
        self._breakdown = RewardBreakdown(0.5, scores)

    async def score(self, samples: Sequence[RewardSample], evaluation: bool = False) -> list[RewardBreakdown]:
        await asyncio.sleep(self._times().reward_s)
        return [self._breakdown] * len(samples)


class SimulatedLearner:
    """Takes a step's time in its forward and backward passes."""

    def __init__(self, times: Callable[[], StepTimes], factor: float = 1.0) -> None:
        """factor: on the recorded seconds of training a step."""
        self._times = times
        self._factor = factor
        self.busy_s = 0.0

    async def begin_step(self, groups: Sequence[RolloutGroup], step: int) -> Mapping[str, float]:
        return {"batch/valid_samples": float(sum(group.group_size for group in groups))}

    async def forward_backward(self, update: int) -> None:
        train_s = self._factor * self._times().train_s
        self.busy_s += train_s
        await asyncio.sleep(train_s)

    async def optimise(self, update: int) -> StepResult:
        return StepResult({"loss": 0.0, "grad/norm": 1.0}, finite=True)

    async def end_step(self, step: int) -> Mapping[str, float]:
        return {}

    async def adjust(self, lr_scale: float, kl_scale: float) -> None: ...

    async def publish(self, version: WeightVersion, which: str) -> WeightVersion:
        await asyncio.sleep(self._times().publish_s)
        return version

    async def predict(self, probe: Probe) -> torch.Tensor:
        return probe.answer

    async def save(self, folder: Path, record: Mapping[str, Any]) -> None: ...

    async def load(self, folder: Path) -> None: ...

    async def weights_sha256(self) -> str:
        return ""


@dataclass(slots=True)
class Stopwatch:
    """An Observer that notes when steps were done, on the loop's clock, and how old their samples were."""

    done_s: list[float] = field(default_factory=list[float])
    mean_ages: list[float] = field(default_factory=list[float])
    max_ages: list[float] = field(default_factory=list[float])

    def stepped(self, step: int, metrics: Mapping[str, float], groups: Sequence[RolloutGroup]) -> None:
        self.done_s.append(asyncio.get_running_loop().time())
        self.mean_ages.append(metrics["staleness/mean"])
        self.max_ages.append(metrics["staleness/max"])

    def evaluated(self, step: int, groups: Sequence[RolloutGroup]) -> None: ...

    def swept(self, step: int, sweeps: Mapping[EvalPoint, Sequence[RolloutGroup]]) -> None: ...
