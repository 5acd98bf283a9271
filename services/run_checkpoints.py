"""The checkpoints of a run: which one it goes on from, what makes way for it, and what each says of the run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

from learner.checkpoint import (
    CheckpointManifest,
    Damage,
    later_checkpoints,
    list_checkpoints,
    newest_good,
    set_aside,
    verify_checkpoint,
)
from raylign.errors import CheckpointError
from raylign.types import JsonValue
from services.config import RunConfig
from services.config_changes import read_made_with
from services.controller import Controller
from services.run_dir import RunDir, config_toml
from services.run_inputs import RunInputs


def choose_checkpoint(folder: RunDir, step: int | None) -> tuple[CheckpointManifest, list[Damage]]:
    """A run's newest good checkpoint with the damaged ones above it, or that of a step. Changes nothing.

    Raises CheckpointError, with what there is, if there is none.
    """
    if step is not None:
        there = [int(one.name.removeprefix("step_")) for one in list_checkpoints(folder.checkpoints)]
        if step not in there:
            told = f"there are {', '.join(map(str, there))}" if there else "there is none"
            raise CheckpointError(f"{folder.path} has no checkpoint of step {step}; {told}")
        return verify_checkpoint(folder.checkpoints / f"step_{step}"), []
    manifest, damaged = newest_good(folder.checkpoints)
    if manifest is None and damaged:
        told = "\n".join(f"  {one.path.name}: {one.reason}" for one in damaged)
        raise CheckpointError(f"no checkpoint of {folder.path} can be read:\n{told}\nstart anew with `raylign train`")
    if manifest is None:
        raise CheckpointError(f"{folder.path} has no checkpoint to go on from; start anew with `raylign train`")
    return manifest, damaged


def clear_the_way(
    folder: RunDir, manifest: CheckpointManifest, damaged: Sequence[Damage], note: Callable[[str], None]
) -> None:
    """Set aside what the run will write again: damaged checkpoints, and those beyond the step it goes on from."""
    for one in damaged:
        note(f"{one.reason}; set aside as {set_aside(one.path, 'damaged').name}")
    for path in later_checkpoints(folder.checkpoints, manifest.step):
        note(f"{path.name} is beyond step {manifest.step}; set aside as {set_aside(path, 'superseded').name}")


def go_back(
    folder: RunDir, started_from: CheckpointManifest | None, note: Callable[[str], None]
) -> CheckpointManifest | None:
    """Where a run goes on that lost its learner: its newest good checkpoint, or the beginning if it made none yet.

    Damaged checkpoints are set aside. Raises CheckpointError if there were some and none is good.
    """
    manifest, damaged = newest_good(folder.checkpoints)
    if manifest is None:
        return choose_checkpoint(folder, None)[0] if damaged or started_from is not None else None
    clear_the_way(folder, manifest, damaged, note)
    return manifest


def config_sha256(config: RunConfig) -> str:
    """Identity of a configuration, for checkpoints."""
    return hashlib.sha256(config_toml(config).encode()).hexdigest()


def run_record(config: RunConfig, inputs: RunInputs, origin: JsonValue = None) -> dict[str, JsonValue]:
    """What every checkpoint of a run keeps beside its step. `origin` says where a fork came from."""
    record: dict[str, JsonValue] = {
        "config_sha256": config_sha256(config),
        "config": config.model_dump(mode="json", exclude_none=True),
        "inputs": inputs.sha256s,
    }
    return record if origin is None else {**record, "origin": origin}


def restore_guards(controller: Controller, start: CheckpointManifest | None, config: RunConfig) -> None:
    """Let the guards go on where they were, unless what they guard was changed."""
    if start is None:
        return
    made_with = read_made_with(start)
    ages, rewards = start.record.get("guard"), start.record.get("reward_guard")
    if isinstance(ages, Mapping) and made_with.max_staleness == config.max_staleness:
        controller.guard.restore({name: int(str(value)) for name, value in ages.items()})
    if isinstance(rewards, Mapping) and made_with.rewards == config.rewards:
        controller.watch.restore(rewards)
