"""`raylign fork`: a new run that starts from a checkpoint of another, in a directory of its own.

The parent is only read, so it may be going on meanwhile. Steps, optimiser and prompts go on where the checkpoint was
made; a fork that changes nothing ends as its parent does, bit for bit. Every checkpoint of the fork, and its summary,
say where it came from.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from learner.checkpoint import CheckpointManifest, load_checkpoint, save_checkpoint, verify_checkpoint
from learner.state import LearnerState
from raylign.config import difference, with_overrides
from raylign.errors import ConfigError
from raylign.types import JsonValue
from services.config_changes import Changes, entry, kept_policies, read_made_with, refuse_fixed
from services.console import RunConsole
from services.run import EXIT_FAILED, go
from services.run_checkpoints import choose_checkpoint, run_record
from services.run_dir import RunDir
from services.run_inputs import read_inputs, with_absolute_paths


def fork_run(
    path: Path, step: int | None, run_dir: Path | None, overrides: Mapping[str, str], address: str | None
) -> int:
    """Start a new run from a run's newest good checkpoint, or from that of a step; returns the exit code.

    `overrides` are dotted keys to set over the configuration that the checkpoint was made with. Raises RaylignError for
    a directory that is no run, for no good checkpoint, and for keys that the checkpoint's weights do not fit.
    """
    parent = RunDir(path)
    parent.check()
    source, damaged = choose_checkpoint(parent, step)
    made_with = read_made_with(source)
    config = with_absolute_paths(with_overrides(made_with, overrides))
    changes = difference(made_with, config)
    refuse_fixed(changes, config)
    if config.num_steps <= source.step:
        raise ConfigError(
            f"{source.path} is of step {source.step} and num_steps is {config.num_steps}, so there is nothing to do; "
            f"give --num_steps above {source.step}, or an earlier --step"
        )
    inputs = read_inputs(config)
    for one in damaged:
        RunConsole().note(f"{one.reason}; passed over")
    with RunDir.create(run_dir, f"{path.resolve().name}-fork") as folder:
        folder.write_config(config)
        checkpoint = folder.checkpoints / f"step_{source.step}"
        code = EXIT_FAILED
        try:
            state = start_missing(load_checkpoint(source.path).state, kept_policies(config))
            record = run_record(config, inputs, _origin(path, source, changes))
            save_checkpoint(checkpoint, state, {"step": source.step, **record})
            del state
            code = go(config, folder, inputs, verify_checkpoint(checkpoint), address)
        finally:
            if code == EXIT_FAILED and not folder.metrics.exists():
                # Nothing was trained, so the folder is no run: the same command may be given again.
                shutil.rmtree(checkpoint, ignore_errors=True)
                folder.config.unlink()
        return code


def start_missing(state: LearnerState, policies: Sequence[str]) -> LearnerState:
    """A learner's state with exactly these policies beside the trained one; what was not kept starts as its copy."""
    sections: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.tensors.items():
        section, _, rest = name.partition("/")
        sections.setdefault(section, {})[rest] = tensor
    trained = sections["params"]
    kept = {"params": trained, "adam": sections.get("adam", {})}
    for policy in policies:
        # A copy of its own: what shares memory cannot be written.
        kept[policy] = sections.get(policy) or {name: tensor.clone() for name, tensor in trained.items()}
    tensors = {f"{section}/{rest}": tensor for section, inner in kept.items() for rest, tensor in inner.items()}
    return LearnerState(tensors, dict(state.values))


def _origin(path: Path, source: CheckpointManifest, changes: Changes) -> dict[str, JsonValue]:
    """What a fork says of where it came from."""
    return {
        "run": str(path.resolve()),
        "step": source.step,
        "checkpoint_sha256": source.sha256,
        "config_sha256": source.config_sha256,
        "changed": entry(source.step, changes)["changed"],
    }
