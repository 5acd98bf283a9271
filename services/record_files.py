"""The groups of a run as files: what lies in `groups/`, how it is named, and how it is read. Nothing here writes.

    groups/train_00000012.json      the groups of step 12: prompts, siblings, scores, credit (see services.group_rows)
    groups/train_00000012.pictures  its pictures, encoded, one after the other; the JSON names offset and length of each
    groups/eval_00000020.*          the held-out groups of the evaluation after step 20
    groups/failures.jsonl           one line per sample without a reward, and at most a few per step

A step that is not there was not recorded, or was thinned out. Torn files, left by a power cut, count as not there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

RecordKind = Literal["train", "eval"]
RECORD_KINDS: tuple[RecordKind, ...] = get_args(RecordKind)
RECORD_FOLDER = "groups"
FAILURES_FILE = "failures.jsonl"
_NAME = re.compile(r"(train|eval)_(\d{8,})\.json")


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One recorded step and what it takes on the disk."""

    step: int
    num_bytes: int


def record_path(run: Path, kind: RecordKind, step: int) -> Path:
    """Where the groups of a step lie, or would."""
    return run / RECORD_FOLDER / f"{kind}_{step:08d}.json"


def pictures_path(record: Path) -> Path:
    """Where the pictures of a record lie."""
    return record.with_suffix(".pictures")


def recorded(run: Path) -> dict[RecordKind, list[int]]:
    """The steps whose groups are there, rising, by kind. One look at the folder, which may hold thousands of files."""
    steps: dict[RecordKind, list[int]] = {kind: [] for kind in RECORD_KINDS}
    try:
        names = [path.name for path in (run / RECORD_FOLDER).iterdir()]
    except FileNotFoundError:
        return steps
    for name in names:
        match = _NAME.fullmatch(name)
        if match:
            kind: RecordKind = "train" if match[1] == "train" else "eval"
            steps[kind].append(int(match[2]))
    return {kind: sorted(found) for kind, found in steps.items()}


def recorded_steps(run: Path, kind: RecordKind) -> list[int]:
    """The steps of one kind whose groups are there, rising."""
    return recorded(run)[kind]


def sized_steps(run: Path, kind: RecordKind) -> list[RecordedStep]:
    """The same with their sizes, pictures included."""
    sized: list[RecordedStep] = []
    for step in recorded_steps(run, kind):
        path = record_path(run, kind, step)
        sized.append(RecordedStep(step, sum(one.stat().st_size for one in (path, pictures_path(path)) if one.exists())))
    return sized


def read_record(run: Path, kind: RecordKind, step: int) -> bytes | None:
    """The JSON of a step's groups as it lies there; None if it does not, or is torn."""
    try:
        data = record_path(run, kind, step).read_bytes()
    except FileNotFoundError:
        return None
    return data if data.endswith(b"}\n") else None


def read_picture(run: Path, kind: RecordKind, step: int, offset: int, length: int) -> bytes | None:
    """One encoded picture; None if there is none there."""
    try:
        with pictures_path(record_path(run, kind, step)).open("rb") as file:
            file.seek(offset)
            data = file.read(length)
    except FileNotFoundError:
        return None
    return data if len(data) == length and picture_type(data) else None


def picture_type(data: bytes) -> str | None:
    """The media type of an encoded picture, by its first bytes; None for anything else."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    return "image/png" if data.startswith(b"\x89PNG\r\n") else None


def read_failures(run: Path, newest: int) -> list[dict[str, Any]]:
    """The newest failed samples, the latest first. A torn last line is left out."""
    try:
        lines = (run / RECORD_FOLDER / FAILURES_FILE).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in reversed(lines[-newest:])]


def as_ranges(steps: Sequence[int]) -> list[tuple[int, int, int]]:
    """Rising steps as (first, last, stride): ten thousand of them are a line, not a page."""
    ranges: list[tuple[int, int, int]] = []
    for step in steps:
        first, last, stride = ranges[-1] if ranges else (step, step, 0)
        if ranges and (stride == 0 or step - last == stride):
            ranges[-1] = (first, step, step - last)
        else:
            ranges.append((step, step, 0))
    return ranges
