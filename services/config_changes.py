"""Which keys of its configuration a run may change when it goes on, and the record of those that it did.

A checkpoint holds the configuration it was made with. What differs from it is refused, key by key, unless the key is in
NEUTRAL or was allowed by name. What was let pass is written to `config_changes.json`, so that a run that is killed
before its next checkpoint goes on without being asked again, and a reader of the metrics knows.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from learner.checkpoint import CheckpointManifest
from raylign.config import covers, difference, leaves, parse_config
from raylign.errors import CheckpointError, ConfigError, RunDirError
from raylign.types import JsonValue, Needs
from services.config import RunConfig
from services.run_dir import RunDir, write_atomic

Changes = Mapping[str, tuple[Any, Any]]
"""Old and new value by dotted key, as plain JSON; None where the key is not set."""

NEUTRAL: Mapping[str, str] = {
    "num_steps": "no step looks at how many follow; a larger number goes on, a smaller one ends sooner",
    "start_timeout_s": "waiting draws nothing",
    "wait_for_nodes": "as start_timeout_s",
    "max_learner_restarts": "a step that is done again gives what it gave",
    "rollout.hung_after_s": "a chunk that is drawn again is the same chunk",
    "rollout.num_actors": "samples are drawn by key, in chunks that do not depend on who draws them",
    "rollout.min_actors": "as num_actors",
    "rollout.max_actors": "as num_actors",
    "checkpoint": "writing state does not change it",
    "record": "it is written to be looked at, and read by nobody who trains",
    "tracking": "as record",
    "eval.every_steps": "held-out samples have keys of their own, the same at every evaluation",
    "learner.publish": "a delta is applied to the very tensors of the whole snapshot, and verified by the same hash",
    "weight_store": "weights are verified by the same hashes, whatever way they came",
    "reward_service.num_replicas": "a sample's score does not depend on the replica that gives it",
    "reward_service.autoscaling": "as num_replicas",
    "reward_service.num_cpus_per_replica": "only where replicas may be placed",
    "reward_service.per_reward.*.num_replicas": "as num_replicas",
    "reward_service.per_reward.*.autoscaling": "as num_replicas",
    "reward_service.per_reward.*.num_cpus_per_replica": "only where replicas may be placed",
    "reward_service.cache": "only scores of deterministic rewards are remembered, by all that they depend on",
    "reward_service.http": "a second door to the same replicas",
    "reward_service.http_replicas": "processes that read requests; the replicas score",
    "reward_service.host": "an address",
    "reward_service.port": "an address",
}
"""Keys that change neither weights nor numbers, nor whether a step is refused; `*` is any name. Why, for each."""

FIXED: Mapping[str, str] = {
    "model.type": "another family has other weights",
    "model.tuning": "an adapter and the whole network are different tensors",
    "model.lora.rank": "adapters of another rank have other shapes",
    "model.lora.alpha": "the same adapter would count with another scale, so it would be another policy",
    "model.lora.targets": "other layers would be adapted",
    "model.budget_head": "the checkpoint has the head's weights, or has not",
}
"""Keys that no run can change and keep its weights; those of the adapter only where there is one."""
_LORA = "model.lora"


def read_made_with(manifest: CheckpointManifest) -> RunConfig:
    """The configuration that a checkpoint was made with. Raises RaylignError if it has none that can be read."""
    made_with = manifest.record.get("config")
    if not isinstance(made_with, dict):
        raise CheckpointError(
            f"{manifest.path} does not hold the configuration it was made with; it was written by another version of "
            "Raylign, so go on with that one"
        )
    return parse_config(RunConfig, made_with, f"the configuration in {manifest.path}")


def changes_since(manifest: CheckpointManifest, config: RunConfig, inputs: Mapping[str, str]) -> Changes:
    """What differs from what a checkpoint was made with: keys, and the contents of prompt files and model folder."""
    changes = difference(read_made_with(manifest), config)
    recorded = manifest.record.get("inputs")
    before: dict[str, JsonValue] = dict(recorded) if isinstance(recorded, Mapping) else {}
    for key in {**before, **inputs}:
        old, new = before.get(key), inputs.get(key)
        if old != new and key not in changes:
            changes[key] = (f"contents {_short(old)}", f"contents {_short(new)}")
    return changes


def refuse_fixed(changes: Changes, config: RunConfig) -> None:
    """Raise ConfigError, with the reason, if a key was changed that no weights survive."""
    reasons = {name: why for name, why in FIXED.items() if config.model.tuning == "lora" or not covers(_LORA, name)}
    found = [(key, why) for key in changes for name, why in reasons.items() if covers(name, key)]
    if found:
        told = "\n".join(f"  {_told(key, changes[key])}: {why}" for key, why in found)
        raise ConfigError(f"the weights of the checkpoint do not fit what was changed:\n{told}\nput it back")


def check_allowed(allowed: Sequence[str], made_with: RunConfig, config: RunConfig) -> None:
    """Raise ConfigError if a name that was to be allowed is no key and no table of either configuration."""
    known = leaves(made_with) | leaves(config)
    for name in allowed:
        if not any(covers(name, key) for key in known):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise ConfigError(f"--allow-config-change {name}: no such key is set{hint}")


def refuse_others(changes: Changes, allowed: Sequence[str], manifest: CheckpointManifest, folder: RunDir) -> None:
    """Raise CheckpointError with the difference, key by key, if a key was changed that is neither neutral nor allowed.

    The same changes at the same checkpoint are allowed once they were.
    """
    refused = [key for key in changes if not any(covers(name, key) for name in (*NEUTRAL, *allowed))]
    if not refused or entry(manifest.step, changes) in read_changes(folder):
        return
    told = "\n".join(f"  {_told(key, changes[key])}" for key in refused)
    options = " ".join(f"--allow-config-change {key}" for key in refused)
    raise CheckpointError(
        f"{folder.path} cannot go on exactly: this is not what {manifest.path.name} was made with\n{told}\n"
        f"Put it back, or give {options} to go on with it from step {manifest.step}; `raylign fork` makes a new run of "
        "it"
    )


def refuse_new_policies(made_with: RunConfig, config: RunConfig) -> None:
    """Raise CheckpointError if the learner would need a policy that the checkpoint's run did not keep."""
    new = [name for name in kept_policies(config) if name not in kept_policies(made_with)]
    if new:
        raise CheckpointError(
            f"algorithm {config.algorithm.type!r} with learner.ema_decay {_shown(config.learner.ema_decay)} keeps the "
            f"policy {new[0]!r}, which this run never had; `raylign fork` starts a new run with it"
        )


def kept_policies(config: RunConfig) -> list[str]:
    """The policies that a run's learner keeps beside the one it trains."""
    needed = [need.name for need in (Needs.OLD, Needs.SAMPLING, Needs.REFERENCE) if need in config.algorithm.needs]
    return [str(name).lower() for name in needed] + (["average"] if config.learner.ema_decay is not None else [])


def entry(step: int, changes: Changes) -> dict[str, JsonValue]:
    """One line of the record."""
    return {"step": step, "changed": {key: [old, new] for key, (old, new) in sorted(changes.items())}}


def read_changes(folder: RunDir) -> list[dict[str, JsonValue]]:
    """The record of a run's changes, oldest first; [] if there were none."""
    try:
        return json.loads(folder.config_changes.read_bytes())
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise RunDirError(
            f"{folder.config_changes} is not JSON: {error}; delete it and allow the changes by name"
        ) from None


def note_changes(folder: RunDir, step: int, changes: Changes) -> None:
    """Add what was let pass to the record, less what was changed at or beyond the step that the run goes on from."""
    before = read_changes(folder)
    kept = [one for one in before if int(str(one["step"])) < step]
    if changes:
        kept.append(entry(step, changes))
    if kept != before:
        write_atomic(folder.config_changes, json.dumps(kept, indent=1, allow_nan=False).encode() + b"\n")


def _told(key: str, change: tuple[Any, Any]) -> str:
    old, new = change
    return f"{key}: was {_shown(old)}, is {_shown(new)}"


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


def _short(sha256: JsonValue) -> str:
    return "none" if sha256 is None else f"{str(sha256)[:12]}.."
