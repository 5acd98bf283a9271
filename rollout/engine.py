"""The rollout engine: draws samples from keys with a policy and a sampler. Runs with or without Ray around it.

Work arrives in chunks of a size fixed by the configuration, never by the number of workers, and every draw is
keyed, so a sample is bit for bit the same whoever makes it. What is drawn, pictures or texts, is known to one denoiser.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch

from raylign.errors import ConfigError, WeightError
from raylign.models.base import DenoisingPolicy
from raylign.models.tokens import TokenPolicy
from raylign.precision.broadcast import load_high
from raylign.precision.packed import Packed
from raylign.precision.shadow import Shadow
from raylign.types import LatentTrajectory, Rollout, RolloutGroup, RolloutStatus, SampleKey, WeightVersion, Work
from raylign.weight_delta import apply_delta
from raylign.weights import WeightSnapshot
from rollout.drawn import (
    AS_CONFIGURED,
    WEIGHTS_OF,
    Denoiser,
    Drawn,
    EvalPoint,
    Probe,
    Pulled,
    Slot,
    WeightSlot,
    join_trajectories,
    trajectory_rows,
)
from rollout.images import ImageDenoiser, SamplerSetup, denoise
from rollout.prompts import GroupTask
from rollout.texts import TextDenoiser, TokenSetup, unmask

PolicyT = TypeVar("PolicyT", bound=DenoisingPolicy | TokenPolicy)


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """Samples to draw in one batch: the same sibling indices of each task's prompt."""

    tasks: tuple[GroupTask, ...]
    sample_indices: tuple[int, ...]
    slot: Slot = "rollout"
    point: EvalPoint = AS_CONFIGURED
    """Where along a curve an evaluation draws."""


@dataclass(frozen=True, slots=True)
class LowPrecision(Generic[PolicyT]):
    """How a slot computes with a low-precision copy of the network: the copy, and the policy over it."""

    policy: PolicyT
    shadow: Shadow


class RolloutEngine(Generic[PolicyT]):
    """Draws chunks with whichever published weights their slot asks for."""

    def __init__(
        self,
        policy: PolicyT,
        setups: Mapping[Slot, SamplerSetup | TokenSetup],
        run_seed: int,
        low_precision: Mapping[Slot, LowPrecision[PolicyT]] | None = None,
    ) -> None:
        """All setups are of one modality, the policy's. Raises ConfigError if they are not.

        low_precision: the slots that compute with a copy of the network, of the rollout weights always.
        """
        self.policy = policy
        self._setups = setups
        self._run_seed = run_seed
        self._low = dict(low_precision or {})
        if "eval" in self._low:
            raise ConfigError("evaluations are drawn in the training precision; leave slot 'eval' out of low_precision")
        computing: dict[Slot, PolicyT] = {slot: low.policy for slot, low in self._low.items()}
        self._denoiser = _make_denoiser(policy, setups, run_seed, computing)
        self._snapshots: dict[WeightSlot, WeightSnapshot] = {}
        self._loaded: WeightSlot | None = None
        self._who = f"{socket.gethostname()}:{os.getpid()}"

    def pull(self, snapshot: WeightSnapshot, slot: WeightSlot = "rollout") -> Pulled:
        """Verify and load a published snapshot, between batches. Raises WeightError and keeps the old on a fault.

        A delta is applied to what the slot pulled last. Low-precision copies are made anew from the rollout weights, or
        taken as the learner packed them, in the memory they are in.
        """
        began_s, started_s = time.time(), time.perf_counter()
        whole = apply_delta(self._snapshots.get(slot), snapshot) if snapshot.kind == "delta" else snapshot
        packed = self._load(whole, slot)
        self._snapshots[slot] = whole
        self._loaded = slot
        loaded_s = time.perf_counter() - started_s
        copies = [low.shadow.refresh(packed) for low in self._low.values()] if slot == "rollout" else []
        return Pulled(
            snapshot.version,
            snapshot.num_bytes,
            loaded_s,
            requantise_s=sum(copy.seconds for copy in copies),
            packed_bytes=sum(copy.num_bytes for copy in copies),
            work=Work(self._who, "pull", began_s, time.perf_counter() - started_s),
        )

    def generate(self, request: ChunkRequest) -> list[RolloutGroup]:
        """One (part of a) group per task, with the request's siblings. Not thread-safe.

        A sample that came out not finite has status GENERATION_FAILED; its neighbours are unharmed. Where the slot's
        setup prunes, a group has the siblings that were drawn to the end. Each group tells the work of the chunk.
        """
        version = self._use(WEIGHTS_OF[request.slot])
        count = len(request.sample_indices)
        keys = [
            SampleKey(self._run_seed, task.prompt.id, task.visit, index)
            for task in request.tasks
            for index in request.sample_indices
        ]
        with torch.no_grad(), self._prepared(request.slot):
            texts = [task.prompt.text for task in request.tasks]
            step = request.tasks[0].learner_step
            drawn = self._denoiser.draw(texts, count, request.slot, keys, request.point, step)
        work = self._work_of(drawn)
        if drawn.places is not None:
            keys = [keys[place] for place in drawn.places]
            count = len(keys) // len(request.tasks)
        groups = [_group(task, keys, drawn, place, count, version) for place, task in enumerate(request.tasks)]
        return [replace(group, work=work) for group in groups]

    def probe(self, text: str, slot: Slot = "rollout") -> Probe:
        """What a slot's policy answers for one prompt, unguided, at three noise levels."""
        version = self._use(WEIGHTS_OF[slot])
        with torch.no_grad(), self._prepared(slot):
            return self._denoiser.probe(text, slot, self._run_seed, version)

    @property
    def precision_report(self) -> dict[Slot, str]:
        """What computes the slots that have a low-precision copy, for a person to read; see `Shadow.describe`."""
        return {slot: low.shadow.describe() for slot, low in self._low.items()}

    def _work_of(self, drawn: Drawn) -> tuple[Work, ...]:
        """What has just been drawn and decoded."""
        decode_s = time.time() - drawn.decode_s
        sample = Work(self._who, "sample", decode_s - drawn.sample_s, drawn.sample_s)
        return sample, Work(self._who, "decode", decode_s, drawn.decode_s)

    def _prepared(self, slot: Slot) -> AbstractContextManager[object]:
        return self._low[slot].shadow.prepared() if slot in self._low else nullcontext()

    def _use(self, slot: WeightSlot) -> WeightVersion:
        if slot not in self._snapshots:
            raise WeightError(f"no {slot} weights were pulled yet; pull a snapshot before generating")
        if self._loaded != slot:
            self._load(self._snapshots[slot], slot)
            self._loaded = slot
        return self._snapshots[slot].version

    def _load(self, snapshot: WeightSnapshot, slot: WeightSlot) -> Mapping[str, Packed]:
        """Verify a snapshot and swap in what it holds in high precision; the rest is for the low-precision copy."""
        if snapshot.kind != "packed":
            self.policy.load_weights(snapshot)
            return {}
        low = self._low.get("rollout")
        if slot != "rollout" or low is None:
            raise WeightError(
                f"snapshot {snapshot.version} is packed, for rollouts below bf16, and slot {slot!r} of this actor "
                "computes with whole weights; publish them whole"
            )
        return load_high(snapshot, self.policy.trainable_parameters(), low.shadow)


def outputs_only(group: RolloutGroup) -> RolloutGroup:
    """Drafts as they travel: nothing trains on them, so latents and embeddings, often megabytes, stay behind."""
    trajectory = group.trajectory
    if isinstance(trajectory, LatentTrajectory):
        trajectory = replace(trajectory, final_GCHW=trajectory.final_GCHW.new_empty((group.group_size, 0, 0, 0)))
    return replace(group, trajectory=trajectory, conditioning=None)


def join_parts(parts: Sequence[RolloutGroup]) -> RolloutGroup:
    """One group from parts that hold consecutive siblings of the same prompt."""
    first = parts[0]
    if len(parts) == 1:
        return first
    images = [part.images_GHWC for part in parts if part.images_GHWC is not None]
    texts = tuple(text for part in parts for text in part.texts or ())
    return replace(
        first,
        rollouts=tuple(rollout for part in parts for rollout in part.rollouts),
        trajectory=join_trajectories([part.trajectory for part in parts]),
        images_GHWC=np.concatenate(images) if images else None,
        texts=texts or None,
        seconds={phase: sum(part.seconds.get(phase, 0.0) for part in parts) for phase in first.seconds},
        work=tuple(dict.fromkeys(work for part in parts for work in part.work)),
    )


def chunk_requests(
    tasks: Sequence[GroupTask], group_size: int, chunk_size: int, slot: Slot = "rollout"
) -> list[ChunkRequest]:
    """Cut groups into batches of `chunk_size` samples: several groups each, or an even part of one.

    The cut depends on the order of tasks and the two sizes only. The last batch may be smaller when the tasks
    do not fill it. Raises ValueError if neither size divides the other.
    """
    if chunk_size >= group_size:
        if chunk_size % group_size:
            raise ValueError(f"chunk_size {chunk_size} must be a multiple of group_size {group_size}")
        per_chunk = chunk_size // group_size
        everyone = tuple(range(group_size))
        return [
            ChunkRequest(tuple(tasks[start : start + per_chunk]), everyone, slot)
            for start in range(0, len(tasks), per_chunk)
        ]
    if group_size % chunk_size:
        raise ValueError(f"chunk_size {chunk_size} must divide group_size {group_size}")
    return [
        ChunkRequest((task,), tuple(range(start, start + chunk_size)), slot)
        for task in tasks
        for start in range(0, group_size, chunk_size)
    ]


def _make_denoiser(
    policy: DenoisingPolicy | TokenPolicy,
    setups: Mapping[Slot, SamplerSetup | TokenSetup],
    run_seed: int,
    computing: Mapping[Slot, Any],
) -> Denoiser:
    images: dict[Slot, SamplerSetup] = {
        slot: setup for slot, setup in setups.items() if isinstance(setup, SamplerSetup)
    }
    texts: dict[Slot, TokenSetup] = {slot: setup for slot, setup in setups.items() if isinstance(setup, TokenSetup)}
    if images and texts:
        raise ConfigError(f"slots {sorted(images)} have an image sampler, {sorted(texts)} a text sampler; use one kind")
    if texts:
        return TextDenoiser(cast(TokenPolicy, policy), texts, computing)
    return ImageDenoiser(cast(DenoisingPolicy, policy), images, run_seed, computing)


def _group(
    task: GroupTask, keys: Sequence[SampleKey], drawn: Drawn, place: int, count: int, version: WeightVersion
) -> RolloutGroup:
    """One task's rows of a batch, copied, so that a group carries its own bytes and no others."""
    rows = slice(place * count, (place + 1) * count)
    rollouts = tuple(
        Rollout(key, RolloutStatus.OK if ok else RolloutStatus.GENERATION_FAILED, version, version)
        for key, ok in zip(keys[rows], drawn.ok[rows], strict=True)
    )
    share = count / len(keys)
    return RolloutGroup(
        prompt=task.prompt,
        visit=task.visit,
        sequence=task.sequence,
        rollouts=rollouts,
        trajectory=trajectory_rows(drawn.trajectory, rows),
        conditioning=drawn.told[place],
        images_GHWC=None if drawn.images_BHWC is None else drawn.images_BHWC[rows].copy(),
        texts=None if drawn.texts is None else tuple(drawn.texts[rows]),
        seconds={"sample": drawn.sample_s * share, "decode": drawn.decode_s * share},
    )


__all__ = [
    "ChunkRequest",
    "EvalPoint",
    "LowPrecision",
    "Probe",
    "Pulled",
    "RolloutEngine",
    "SamplerSetup",
    "Slot",
    "TokenSetup",
    "WeightSlot",
    "chunk_requests",
    "denoise",
    "join_parts",
    "outputs_only",
    "unmask",
]
