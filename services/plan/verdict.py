"""What fits on a GPU of some size, and which key to change where it does not: every remedy is planned as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from raylign.config import with_overrides
from raylign.errors import ConfigError
from services.config import RunConfig
from services.plan.memory import CUDA_CONTEXT, GIB, Role

HEADROOM = 0.94
"""Share of a GPU that tensors can fill; the rest is lost between the allocator's blocks."""


_GUEST = 0.5
"""Who reserves less of a GPU lies on one with somebody larger."""
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Remedy:
    """Keys to change, and what the role, its guests apart, would then need on one GPU."""

    overrides: Mapping[str, str]
    num_bytes: int

    @property
    def words(self) -> str:
        """As options of the command line."""
        return " ".join(f"--{key} {value}" for key, value in self.overrides.items())


@dataclass(frozen=True, slots=True)
class Fit:
    """One kind of GPU of the run: how many processes of which role lie on each, and whether they fit."""

    role: str
    guests: tuple[str, ...]
    """Roles that reserve a small part of a GPU, and find it here."""
    processes: int
    num_bytes: int
    of_guests: int
    available: int
    remedies: tuple[Remedy, ...]
    unknown: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether everything known fits."""
        return self.num_bytes <= self.available

    def mended_by(self, remedy: Remedy) -> bool:
        """Whether it fits with the remedy's keys."""
        return remedy.num_bytes + self.of_guests <= self.available


LEARNER_KEYS: tuple[tuple[str, str], ...] = (
    ("learner.gradient_checkpointing", "true"),
    ("learner.precision", "bf16"),
    ("learner.micro_batch_size", "half"),
    ("model.tuning", "lora"),
    ("learner.sharding", "fsdp"),
)
ROLLOUT_KEYS: tuple[tuple[str, str], ...] = (
    ("rollout.precision", "bf16"),
    ("model.decode_slice", "1"),
    ("rollout.fold_lora", "false"),
    ("rollout.chunk_size", "half"),
)


def fits(
    config: RunConfig, roles: Sequence[Role], gib: float, plan: Callable[[RunConfig], Sequence[Role]]
) -> list[Fit]:
    """Each role with tensors on a GPU of `gib` GiB; roles of a run on CPUs as if each process had one to itself.

    `plan` makes the roles of a changed configuration.
    """
    usable = int(HEADROOM * gib * GIB)
    found: list[Fit] = []
    with_tensors = [role for role in roles if role.device_bytes]
    guests = [role for role in with_tensors if 0 < role.num_gpus < _GUEST]
    for role in with_tensors:
        if role in guests:
            continue
        here = min(role.count, math.floor(1 / role.num_gpus)) if role.num_gpus else 1
        beside, left = list[Role](), 1 - here * role.num_gpus
        for guest in guests if role.num_gpus else ():
            if guest.num_gpus <= left + _ROUNDING and guest not in beside:
                beside.append(guest)
                left -= guest.num_gpus
        needed, taken = _on_one(role, here), sum(_on_one(guest, 1) for guest in beside)
        remedies = () if needed + taken <= usable else _remedies(config, role, here, usable - taken, plan)
        lies = tuple(dict.fromkeys(name for one in (role, *beside) for name in one.unknown))
        found.append(Fit(role.name, tuple(g.name for g in beside), here, needed + taken, taken, usable, remedies, lies))
    return found


def _on_one(role: Role, processes: int) -> int:
    return processes * (role.device_bytes + (0 if role.num_gpus else CUDA_CONTEXT))


def _remedies(
    config: RunConfig, role: Role, here: int, available: int, plan: Callable[[RunConfig], Sequence[Role]]
) -> tuple[Remedy, ...]:
    """Keys that help, each alone, and first all of them together if none does; bytes are those of the role alone."""
    keys = {"rollout actor": ROLLOUT_KEYS, "learner rank": LEARNER_KEYS}.get(role.name, (*LEARNER_KEYS, *ROLLOUT_KEYS))
    helpful: list[Remedy] = []
    together: dict[str, str] = {}
    for key, value in keys:
        for size in _values(config, key, value):
            alone = _planned(config, {key: size}, role, here, plan)
            if alone is None or alone >= _on_one(role, here):
                continue
            helpful.append(Remedy({key: size}, alone))
            if alone <= available:
                break
            both = _planned(config, {**together, key: size}, role, here, plan)
            if both is not None:
                together[key] = size
                if both <= available:
                    break
    best: dict[tuple[str, ...], Remedy] = {tuple(one.overrides): one for one in helpful}
    found = sorted(best.values(), key=lambda one: one.num_bytes)
    if any(one.num_bytes <= available for one in found) or len(together) < 2:
        return tuple(found)
    both = _planned(config, together, role, here, plan)
    return (Remedy(together, both), *found) if both is not None else tuple(found)


def _values(config: RunConfig, key: str, value: str) -> list[str]:
    """The values to try: a size is halved until it is 1."""
    if value != "half":
        return [value]
    size = config.micro_batch_size if key.startswith("learner") else config.chunk_size
    sizes: list[str] = []
    while size > 1:
        size //= 2
        sizes.append(str(size))
    return sizes


def _planned(
    config: RunConfig, overrides: Mapping[str, str], role: Role, here: int, plan: Callable[[RunConfig], Sequence[Role]]
) -> int | None:
    """Bytes on one GPU with keys changed; None where the run would refuse them."""
    try:
        changed = with_overrides(config, overrides)
    except ConfigError:
        return None
    for one in plan(changed):
        if one.name == role.name:
            return _on_one(one, here)
    return None
