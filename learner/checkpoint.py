"""Checkpoints: a directory per step, written beside its final name and renamed when it is whole and on disk.

    checkpoints/step_40/   manifest.json         the run's record (step, configuration hash, what else it wants kept),
                                                 the learner's plain values, and the hash of every file
                           learner.safetensors   the learner's tensors

Sharded ranks write a file each, `learner-00000-of-00002.safetensors` and so on, into the same staging folder; then one
of them writes the manifest, with the hashes of all, and renames. What is read is the same whoever wrote it: any number
of ranks, sharded or not, goes on from either.

A reader never sees half a checkpoint: either the directory has its final name, and then every byte was synced
before, or it does not exist. Hashes are checked on reading all the same, and one that was damaged later is not gone on
from: `newest_good` passes over it, and retention does not count on it. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from learner.state import LearnerState
from learner.stored import StoredTensors, write_rows
from raylign.errors import CheckpointError
from raylign.types import JsonValue

MANIFEST = "manifest.json"
TENSORS = "learner.safetensors"
FORMAT = 1
TensorWriter = Callable[[Path, Mapping[str, torch.Tensor]], None]
_STEP = re.compile(r"step_(\d+)")
_REMEDY = "`raylign resume` sets it aside and goes on from an earlier one"


@dataclass(frozen=True, slots=True)
class CheckpointManifest:
    """What a checkpoint says about itself. `record` is what the run gave, step and configuration hash included.

    sha256: identity of the whole checkpoint, as the hashes of its files are part of what is hashed.
    """

    path: Path
    step: int
    config_sha256: str
    record: Mapping[str, JsonValue]
    values: Mapping[str, JsonValue]
    files: Mapping[str, str]
    sha256: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read and found as written."""

    manifest: CheckpointManifest
    state: LearnerState


@dataclass(frozen=True, slots=True)
class Part:
    """A file that one rank wrote into a staging folder."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Damage:
    """A checkpoint that is not as it was written."""

    path: Path
    reason: str


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """The production TensorWriter: one safetensors file."""
    save_file(dict(tensors), path)


def save_checkpoint(
    folder: Path, state: LearnerState, record: Mapping[str, JsonValue], writer: TensorWriter = write_tensors
) -> None:
    """Write `folder` (named step_<N>) atomically; an older checkpoint there is replaced.

    `record` holds at least "step" (an int) and "config_sha256"; the rest (weight version, prompt cursor …) is the
    run's own JSON. Raises CheckpointError, leaving all earlier checkpoints as they were and nothing of this one, if it
    cannot be written; it says how many bytes were needed and how many are free.
    """
    staging = _staging(folder, new_token())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent, staging)
        staging.mkdir()
        writer(staging / TENSORS, state.tensors)
        _sync(staging / TENSORS)
        _write_manifest(staging, [Part(TENSORS, _file_sha256(staging / TENSORS))], state.values, record)
        _move_into_place(staging, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise _cannot_write(folder, state, error) from error


def new_token() -> str:
    """What tells one attempt at writing a checkpoint from another; all of its ranks are given the same."""
    return uuid.uuid4().hex[:8]


def save_part(folder: Path, token: str, state: LearnerState, rank: int, num_ranks: int) -> Part:
    """Write one rank's part of a checkpoint beside `folder` and sync it; `finish_checkpoint` follows, on one rank.

    Raises CheckpointError as `save_checkpoint` does; the staging folder stays, as others may be writing to it, until
    `discard_parts`.
    """
    staging = _staging(folder, token)
    name = f"learner-{rank:05d}-of-{num_ranks:05d}.safetensors"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            _remove_leftovers(folder.parent, staging)
        staging.mkdir(exist_ok=True)
        write_rows(staging / name, state, with_whole=rank == 0)
        _sync(staging / name)
        return Part(name, _file_sha256(staging / name))
    except (OSError, SafetensorError) as error:
        raise _cannot_write(folder, state, error) from error


def finish_checkpoint(
    folder: Path, token: str, parts: Sequence[Part], values: Mapping[str, JsonValue], record: Mapping[str, JsonValue]
) -> None:
    """Make the parts of all ranks a checkpoint. Raises CheckpointError, leaving nothing of it, if that cannot be.

    So it is when ranks on other nodes do not see the same folder.
    """
    staging = _staging(folder, token)
    missing = [part.name for part in parts if not (staging / part.name).is_file()]
    if missing:
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(
            f"cannot write checkpoint {folder}: {missing[0]}, written on another node, is not seen on this one. "
            "Sharded ranks on several nodes need a run directory on storage that all of them share: give --run-dir "
            "there"
        )
    try:
        _write_manifest(staging, parts, values, record)
        _move_into_place(staging, folder)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise _cannot_write(folder, LearnerState(), error) from error


def discard_parts(folder: Path, token: str) -> None:
    """Delete what an attempt has written, once all of its ranks are done with it."""
    shutil.rmtree(_staging(folder, token), ignore_errors=True)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Verify a checkpoint; its tensors are read when they are asked for, onto the CPU, whole however many files hold
    them. Raises CheckpointError for a file that is missing or not as written."""
    manifest = verify_checkpoint(folder)
    tensors = StoredTensors([folder / name for name in sorted(manifest.files)])
    return Checkpoint(manifest, LearnerState(tensors, dict(manifest.values)))


def verify_checkpoint(folder: Path) -> CheckpointManifest:
    """Hash every file of a checkpoint. Raises CheckpointError for one that is missing or not as written."""
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        try:
            found = _file_sha256(folder / name)
        except OSError as error:
            raise CheckpointError(f"checkpoint {folder} lacks {name} ({error}); {_REMEDY}") from error
        if found != expected:
            raise CheckpointError(f"checkpoint file {folder / name} is damaged: its hash differs; {_REMEDY}")
    return manifest


def read_manifest(folder: Path) -> CheckpointManifest:
    """What a checkpoint says about itself, without its tensors. Raises CheckpointError if it is damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {_REMEDY}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of format {FORMAT}; it was written by another version of Raylign")
    if manifest.get("sha256") != _manifest_sha256(manifest):
        raise CheckpointError(f"{path} is damaged: its hash differs; {_REMEDY}")
    record = manifest["record"]
    return CheckpointManifest(
        path=folder,
        step=record["step"],
        config_sha256=record["config_sha256"],
        record=record,
        values=manifest["values"],
        files=manifest["files"],
        sha256=manifest["sha256"],
    )


def list_checkpoints(parent: Path) -> list[Path]:
    """Finished checkpoints, lowest step first."""
    return [path for path in _step_folders(parent) if (path / MANIFEST).is_file()]


def latest_checkpoint(parent: Path) -> Path | None:
    """The finished checkpoint of the highest step, if there is any."""
    return next(reversed(list_checkpoints(parent)), None)


def newest_good(parent: Path) -> tuple[CheckpointManifest | None, list[Damage]]:
    """The highest step's checkpoint that is as it was written, and what is wrong with those above it. Changes nothing.

    Files are hashed, so this takes as long as reading them.
    """
    damaged: list[Damage] = []
    for path in reversed(_step_folders(parent)):
        try:
            return verify_checkpoint(path), damaged
        except CheckpointError as error:
            damaged.append(Damage(path, str(error).removesuffix(f"; {_REMEDY}")))
    return None, damaged


def later_checkpoints(parent: Path, step: int) -> list[Path]:
    """Folders of checkpoints beyond a step, damaged ones included, lowest step first."""
    return [path for path in _step_folders(parent) if _step_of(path) > step]


def set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint to `step_N.<why>`, which nothing takes for one; returns its new place."""
    aside, count = path.with_name(f"{path.name}.{why}"), 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"{path.name}.{why}-{count}")
    path.rename(aside)
    _sync(path.parent)
    return aside


def prune_checkpoints(parent: Path, keep: int, spared: int | None = None) -> list[Path]:
    """Delete all but the newest `keep` (at least 1) checkpoints and that of step `spared`; returns what was deleted.

    The newest one that is as it was written stays in any case: files can be damaged after they were synced.
    """
    paths = list_checkpoints(parent)
    doomed = [path for path in paths[: -max(1, keep)] if _step_of(path) != spared]
    if not doomed:
        return []
    good, _ = newest_good(parent)
    if good is None:  # a file system that is away for a moment looks the same
        return []
    doomed = [path for path in doomed if path != good.path]
    for path in doomed:
        # Renamed first: a half-deleted directory must not look like a checkpoint.
        grave = path.with_name(f"{path.name}.tmp-deleted")
        path.rename(grave)
        shutil.rmtree(grave)
    return doomed


def _step_folders(parent: Path) -> list[Path]:
    """Everything that is named like a checkpoint, lowest step first."""
    if not parent.is_dir():
        return []
    return sorted((path for path in parent.iterdir() if _STEP.fullmatch(path.name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _room(folder: Path, state: LearnerState) -> str:
    """What a checkpoint takes, and what there is."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors.values())
    try:
        free = f"{shutil.disk_usage(folder.parent).free:,} are free"
    except OSError:  # not even the folder above it can be reached
        return f"it takes {needed:,} bytes"
    return f"it takes {needed:,} bytes and {free}"


def _write_manifest(
    folder: Path, parts: Sequence[Part], values: Mapping[str, JsonValue], record: Mapping[str, JsonValue]
) -> None:
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "record": dict(record),
        "values": dict(values),
        "files": {part.name: part.sha256 for part in parts},
    }
    manifest["sha256"] = _manifest_sha256(manifest)
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8")
    _sync(path)
    _sync(folder)


def _move_into_place(staging: Path, final: Path) -> None:
    if final.exists():
        replaced = final.with_name(f"{final.name}.tmp-replaced")
        final.rename(replaced)
        staging.rename(final)
        shutil.rmtree(replaced)
    else:
        staging.rename(final)
    _sync(final.parent)


def _staging(folder: Path, token: str) -> Path:
    return folder.with_name(f"{folder.name}.tmp-{token}")


def _remove_leftovers(parent: Path, current: Path) -> None:
    """Remnants of a process that was killed while it wrote; a run directory has one run, which writes one at a time."""
    for path in parent.glob("step_*.tmp-*"):
        if path != current:
            shutil.rmtree(path)


def _cannot_write(folder: Path, state: LearnerState, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot write checkpoint {folder}: {error}; {_room(folder, state)}. Earlier checkpoints are intact: free "
        "some space and `raylign resume`"
    )


def _manifest_sha256(manifest: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in manifest.items() if k != "sha256"}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
