"""The rollout engine: draws samples from keys with a policy and a sampler. Runs with or without Ray around it.

Work arrives in chunks of a size fixed by the configuration, never by the number of workers, and every draw is
keyed, so a sample is bit for bit the same whoever makes it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from raylign.errors import WeightError
from raylign.keys import normal, sample_generators
from raylign.models.base import Conditioning, DenoisingPolicy, guided_velocity, join_conditioning
from raylign.samplers import Sampler
from raylign.types import LatentTrajectory, Needs, Rollout, RolloutGroup, RolloutStatus, SampleKey, WeightVersion
from raylign.weights import WeightSnapshot
from rollout.prompts import GroupTask

Slot = Literal["rollout", "eval"]
"""Which published weights and which sampler a chunk is drawn with."""

# Real models' embeddings are megabytes each; a run visits far fewer prompts between weight swaps than this.
_MAX_CACHED_PROMPTS = 1024
_PROBE_SIGMAS = (0.95, 0.5, 0.05)


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """Samples to draw in one batch: the same sibling indices of each task's prompt."""

    tasks: tuple[GroupTask, ...]
    sample_indices: tuple[int, ...]
    slot: Slot = "rollout"


@dataclass(frozen=True, slots=True)
class SamplerSetup:
    """A sampler, its guidance, and what of a trajectory to keep."""

    sampler: Sampler
    guidance_scale: float
    needs: Needs


@dataclass(frozen=True, slots=True)
class Probe:
    """What a rollout policy predicted at keyed states, for the learner to predict again (the parity gate)."""

    version: WeightVersion
    state_BCHW: torch.Tensor
    sigma_B: torch.Tensor
    conditioning: Conditioning
    velocity_BCHW: torch.Tensor


class RolloutEngine:
    """Draws chunks with whichever published weights their slot asks for."""

    def __init__(self, policy: DenoisingPolicy, setups: Mapping[Slot, SamplerSetup], run_seed: int) -> None:
        self.policy = policy
        self._setups = setups
        self._run_seed = run_seed
        self._snapshots: dict[Slot, WeightSnapshot] = {}
        self._loaded: Slot | None = None
        self._conditioning: OrderedDict[tuple[str, bool], Conditioning] = OrderedDict()

    def pull(self, snapshot: WeightSnapshot, slot: Slot = "rollout") -> WeightVersion:
        """Verify and load a published snapshot, between batches. Raises WeightError and keeps the old on a fault."""
        self.policy.load_weights(snapshot)
        self._snapshots[slot] = snapshot
        self._loaded = slot
        return snapshot.version

    def generate(self, request: ChunkRequest) -> list[RolloutGroup]:
        """One (part of a) group per task, with the request's siblings. Not thread-safe.

        A sample whose final state is not finite has status GENERATION_FAILED; its neighbours are unharmed.
        """
        version = self._use(request.slot)
        setup = self._setups[request.slot]
        count = len(request.sample_indices)
        per_prompt = [self._encode(task.prompt.text, setup.guidance_scale > 1.0) for task in request.tasks]
        keys = [
            SampleKey(self._run_seed, task.prompt.id, task.visit, index)
            for task in request.tasks
            for index in request.sample_indices
        ]
        started_s = time.perf_counter()
        with torch.no_grad():
            conditioning = join_conditioning(per_prompt).repeat(count)
            trajectory = denoise(self.policy, setup, conditioning, keys)
            sampled_s = time.perf_counter()
            images = self.policy.decode(trajectory.final_GCHW.to(self.policy.device))
        share = 1.0 / len(request.tasks)
        seconds = {
            "sample": (sampled_s - started_s) * share,
            "decode": (time.perf_counter() - sampled_s) * share,
        }
        groups = [
            _group(task, keys, images, trajectory, conditioning, slice(place * count, (place + 1) * count), version)
            for place, (task, conditioning) in enumerate(zip(request.tasks, per_prompt, strict=True))
        ]
        return [replace(group, seconds=seconds) for group in groups]

    def probe(self, text: str) -> Probe:
        """Velocities of the rollout policy for one prompt, unguided, at a high, a middle and a low noise level."""
        version = self._use("rollout")
        keys = [SampleKey(self._run_seed, "parity", -1, index) for index in range(len(_PROBE_SIGMAS))]
        state = normal(sample_generators(keys, "latent"), self.policy.latent_shape)
        sigma = torch.tensor(_PROBE_SIGMAS)
        with torch.no_grad():
            conditioning = self._encode(text, with_negative=False).repeat(len(keys))
            velocity = self.policy.predict(state.to(self.policy.device), sigma.to(self.policy.device), conditioning)
        return Probe(version, state, sigma, conditioning.to(torch.device("cpu")), velocity.cpu())

    def _use(self, slot: Slot) -> WeightVersion:
        if slot not in self._snapshots:
            raise WeightError(f"no {slot} weights were pulled yet; pull a snapshot before generating")
        if self._loaded != slot:
            self.policy.load_weights(self._snapshots[slot])
            self._loaded = slot
        return self._snapshots[slot].version

    def _encode(self, text: str, with_negative: bool) -> Conditioning:
        """Conditioning on the policy's device, computed once per prompt text."""
        key = (text, with_negative)
        if key not in self._conditioning:
            self._conditioning[key] = self.policy.encode(text, with_negative)
            if len(self._conditioning) > _MAX_CACHED_PROMPTS:
                self._conditioning.popitem(last=False)
        self._conditioning.move_to_end(key)
        return self._conditioning[key]


def denoise(
    policy: DenoisingPolicy, setup: SamplerSetup, conditioning: Conditioning, keys: Sequence[SampleKey]
) -> LatentTrajectory:
    """Walk one batch from noise to a clean latent; what `setup.needs` names is recorded, in fp32 on the CPU.

    Initial noise comes from each sample's "latent" key, step noise from its "sde" key.
    """
    sampler, device = setup.sampler, policy.device
    state = normal(sample_generators(keys, "latent"), policy.latent_shape).to(device)
    step_noise = sample_generators(keys, "sde") if sampler.stochastic else []
    states, logprobs = [state], []
    for step in range(sampler.num_steps):
        sigma_B = sampler.sigmas_S1[step].to(device).expand(len(keys))
        velocity = guided_velocity(policy, state, sigma_B, conditioning, setup.guidance_scale)
        transition = sampler.transition(velocity, state, step)
        if sampler.stochastic:
            state = transition.sample(normal(step_noise, policy.latent_shape).to(device))
            if Needs.LOGPROBS in setup.needs:
                logprobs.append(transition.logprob(state))
        else:
            state = transition.mean_BCHW
        if Needs.STEPS in setup.needs:
            states.append(state)
    return LatentTrajectory(
        final_GCHW=state.cpu(),
        sigmas_S1=sampler.sigmas_S1,
        states_GS1CHW=torch.stack(states, dim=1).cpu() if Needs.STEPS in setup.needs else None,
        rollout_logprob_GS=torch.stack(logprobs, dim=1).cpu() if logprobs else None,
    )


def join_parts(parts: Sequence[RolloutGroup]) -> RolloutGroup:
    """One group from parts that hold consecutive siblings of the same prompt."""
    first = parts[0]
    if len(parts) == 1:
        return first
    trajectories = [part.trajectory for part in parts]

    def stack(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    images = [part.images_GHWC for part in parts if part.images_GHWC is not None]
    return replace(
        first,
        rollouts=tuple(rollout for part in parts for rollout in part.rollouts),
        trajectory=LatentTrajectory(
            final_GCHW=torch.cat([t.final_GCHW for t in trajectories]),
            sigmas_S1=first.trajectory.sigmas_S1,
            states_GS1CHW=stack([t.states_GS1CHW for t in trajectories]),
            rollout_logprob_GS=stack([t.rollout_logprob_GS for t in trajectories]),
        ),
        images_GHWC=np.concatenate(images) if images else None,
        seconds={phase: sum(part.seconds.get(phase, 0.0) for part in parts) for phase in first.seconds},
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


def _group(
    task: GroupTask,
    keys: Sequence[SampleKey],
    images: np.ndarray,
    trajectory: LatentTrajectory,
    conditioning: Conditioning,
    rows: slice,
    version: WeightVersion,
) -> RolloutGroup:
    """One task's rows of a batch, copied, so that a group carries its own bytes and no others."""

    def own(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[rows].clone()

    final = trajectory.final_GCHW[rows].clone()
    finite = torch.isfinite(final).flatten(1).all(dim=1).tolist()
    rollouts = tuple(
        Rollout(key, RolloutStatus.OK if ok else RolloutStatus.GENERATION_FAILED, version, version)
        for key, ok in zip(keys[rows], finite, strict=True)
    )
    return RolloutGroup(
        prompt=task.prompt,
        visit=task.visit,
        sequence=task.sequence,
        rollouts=rollouts,
        trajectory=LatentTrajectory(
            final, trajectory.sigmas_S1, own(trajectory.states_GS1CHW), own(trajectory.rollout_logprob_GS)
        ),
        conditioning=conditioning.to(torch.device("cpu")),
        images_GHWC=images[rows].copy(),
    )
