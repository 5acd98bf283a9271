"""A whole plan: sizes, batches, memory, time and verdict of one configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from raylign.precision import base_precision
from services.config import RunConfig
from services.plan.activations import Kept, kept_activations
from services.plan.batches import Batches, step_batches
from services.plan.memory import Role, payload_bytes, run_roles
from services.plan.probe import Measured, run_probe
from services.plan.rewards import missing_files, reward_weights
from services.plan.sizes import ModelSizes, model_sizes
from services.plan.timing import StepTime, step_time, unit_times
from services.plan.verdict import Fit, fits


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will need. time is None without a probe; `fit` is empty unless a GPU's size was given."""

    config: RunConfig
    sizes: ModelSizes
    batches: Batches
    roles: tuple[Role, ...]
    payload_bytes: int
    measured: Measured | None
    time: StepTime | None
    fit: tuple[Fit, ...]
    gpu_gib: float | None
    notes: tuple[str, ...]

    @property
    def total_host_bytes(self) -> int:
        """Memory of all processes on one machine; shared pages are counted in each."""
        return sum(role.count * role.host_bytes for role in self.roles)

    @property
    def fits(self) -> bool:
        """Whether everything fits on GPUs of the size that was given."""
        return all(one.fits for one in self.fit)


def make_plan(
    config: RunConfig, num_heldout: int, probe: bool, gpu_gib: float | None, told: Callable[[str], None]
) -> Plan:
    """Plan a validated configuration with absolute paths. Raises RaylignError for a model or a probe that fails."""
    sizes, batches = model_sizes(config.model), step_batches(config, num_heldout)
    notes = list(batches.notes)
    rewards = reward_weights(config.rewards)
    learner_kept, rollout_kept, trouble = _activations(config, sizes)
    if trouble:
        notes.append(f"activations are not counted, as the network does not run without its values ({trouble})")
    measured = None
    on_gpu = config.rollout.num_gpus > 0 or config.learner.num_gpus_per_rank > 0
    if probe and on_gpu and not _has_cuda():
        notes.append("no probe: the run computes on GPUs, and torch finds none here; plan where it will run")
    elif probe and not sizes.from_files:
        notes.append("no probe: the model's weights are not in its folder")
    elif probe:
        measured = run_probe(config, told)
    roles = run_roles(config, sizes, batches, learner_kept, rollout_kept, rewards, measured)
    if sizes.missing:
        notes.append(f"no weights of {', '.join(sizes.missing)} in {config.model.path}, so their size is unknown")
    notes += [
        f"reward {name}: {', '.join(f'{file.key} = {file.path!r}' for file in files)} not on this machine"
        for name, files in missing_files(rewards).items()
    ]
    notes += _problems(measured)
    time = None if measured is None else step_time(config, batches, unit_times(measured, config), _cores())

    def analytic(changed: RunConfig) -> list[Role]:
        found = model_sizes(changed.model)
        cut = step_batches(changed, num_heldout)
        kept, drawing, _ = _activations(changed, found)
        return run_roles(changed, found, cut, kept, drawing, rewards, None)

    fit = tuple(fits(config, roles, gpu_gib, analytic)) if gpu_gib is not None else ()
    payload = payload_bytes(config, sizes)
    return Plan(config, sizes, batches, tuple(roles), payload, measured, time, fit, gpu_gib, tuple(notes))


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan for programs."""
    return {
        "model": {
            "path": plan.config.model.path,
            "parameters": plan.sizes.num_network,
            "trained": plan.sizes.num_trained,
            "from_files": plan.sizes.from_files,
        },
        "roles": [
            {
                "role": role.name,
                "count": role.count,
                "gpus_each": role.num_gpus,
                "host_bytes": role.host_bytes,
                "device_bytes": role.device_bytes,
                "parts": [asdict(part) for part in role.parts],
            }
            for role in plan.roles
        ],
        "payload_bytes": plan.payload_bytes,
        "batches": {name: value for name, value in asdict(plan.batches).items() if name != "notes"},
        "step": None if plan.time is None else asdict(plan.time),
        "probe": plan.measured,
        "gpu": None
        if plan.gpu_gib is None
        else {
            "gib": plan.gpu_gib,
            "fits": plan.fits,
            "roles": [
                {
                    "role": one.role,
                    "guests": list(one.guests),
                    "processes": one.processes,
                    "bytes": one.num_bytes,
                    "available": one.available,
                    "fits": one.fits,
                    "remedies": [
                        {"set": dict(r.overrides), "bytes": r.num_bytes + one.of_guests} for r in one.remedies
                    ],
                }
                for one in plan.fit
            ],
        },
        "notes": list(plan.notes),
    }


def _activations(config: RunConfig, sizes: ModelSizes) -> tuple[Kept | None, Kept | None, str]:
    """What the learner's forward keeps, what a rollout's works with, and why they are unknown."""
    model: Any = config.model
    if getattr(model, "trust_remote_code", False):
        return None, None, "it is the checkpoint's own code"
    guided = config.sampler.guidance_scale > 1
    try:
        learner = kept_activations(model, sizes, config.learner.precision, config.micro_batch_size, guided=False)
        precision = base_precision(config.rollout.precision)
        rollout = kept_activations(model, sizes, precision, config.chunk_size, guided)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, KeyError) as error:
        return None, None, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return learner, rollout, ""


def _problems(measured: Measured | None) -> list[str]:
    if measured is None:
        return []
    rewards: Mapping[str, Mapping[str, Any]] = measured["rewards"]["rewards"]
    return [
        f"reward {name} could not be measured: {one['problem']}" for name, one in rewards.items() if "problem" in one
    ]


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _cores() -> int:
    return len(os.sched_getaffinity(0))
