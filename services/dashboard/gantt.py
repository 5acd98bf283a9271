"""When the pieces of a step ran, one row per worker: from the timelines that its record and the next ones hold. Pure.

What workers do during a step of an asynchronous run is, in part, for later steps, and lies in their records. A row's
idle share is told only where all of those are there: what nobody recorded is not idle time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from services.timeline import LOOP, REWARDS

LABELS = {
    "sample": "generate",
    "decode": "decode",
    "draft": "draft",
    "regenerate": "draw again",
    "score": "score",
    "pull": "pull weights",
    "evaluate": "evaluate",
    "rollout": "waiting for samples",
    "credit": "credit",
    "train": "train",
    "publish": "publish",
    "parity": "parity check",
    "other": "other",
}
MAX_TRACKS = 6
"""Pieces of one row that are drawn below each other; where more of them run at once they lie over each other."""
_WAITING = "rollout"
_BESIDE = frozenset({"evaluate", "pull"})
_HAND_OFF = frozenset({"publish", "pull", "parity", "evaluate"})
_TOLERANCE_S = 1e-3
"""Times are rounded, so what follows something at once may seem to begin a little before its end."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of work, in seconds after the beginning of the step that is shown; `step` trained on its result."""

    who: str
    phase: str
    start_s: float
    seconds: float
    step: int

    @property
    def end_s(self) -> float:
        return self.start_s + self.seconds


@dataclass(frozen=True, slots=True)
class StepWork:
    """The timeline of one step's record."""

    step: int
    start_s: float
    """Unix seconds."""
    seconds: float
    pieces: tuple[Piece, ...]
    left_out: int
    """Pieces of it that were not recorded, because there were too many."""


@dataclass(frozen=True, slots=True)
class Row:
    """One worker. Pieces of a track never overlap while there are fewer tracks than MAX_TRACKS."""

    who: str
    label: str
    tracks: tuple[tuple[Piece, ...], ...]
    idle: float | None
    """Share of the step in which it did nothing; None where that is not known."""


@dataclass(frozen=True, slots=True)
class Gantt:
    """One step. `whole` says whether all is there that ran during it."""

    begin_s: float
    """The first drawing for the step, if that was before the step; else 0."""
    seconds: float
    rows: tuple[Row, ...]
    whole: bool
    left_out: int
    num_resting: int
    """Rollout actors in service that did nothing; 0 where that is not known."""


def read_work(record: bytes | None) -> StepWork | None:
    """The timeline in a step's record; None where there is none that can be read."""
    if record is None:
        return None
    try:
        told = json.loads(record)
        step, line = int(told["step"]), told["timeline"]
        start_s, seconds = float(line["start"]), float(line["seconds"])
        pieces = tuple(
            Piece(str(who), phase if phase in LABELS else "other", float(start), float(taken), step)
            for who, phase, start, taken in line["work"]
        )
        left_out = int(line.get("left_out", 0))
    except (ValueError, KeyError, TypeError):
        return None
    times = [start_s, seconds, *(time for piece in pieces for time in (piece.start_s, piece.seconds))]
    if not all(map(math.isfinite, times)) or seconds <= 0:
        return None
    return StepWork(step, start_s, seconds, pieces, left_out)


def gantt(own: StepWork, later: Sequence[StepWork], all_later: bool, num_actors: int) -> Gantt:
    """A step's rows: rollout actors by host and process, scoring, the loop.

    later: the steps after it whose groups may have been drawn while it ran; all_later: whether those are all of them.
    """
    whole = all_later and not own.left_out and not any(other.left_out for other in later)
    drawn = [piece for piece in own.pieces if piece.who != LOOP and piece.phase not in _BESIDE]
    begin_s = min([0.0, *(piece.start_s for piece in drawn)])
    others = [
        replace(piece, start_s=piece.start_s + other.start_s - own.start_s) for other in later for piece in other.pieces
    ]
    # Before the step there is only what was drawn for it, as the rest of that time is other steps'.
    within = [piece for piece in own.pieces if piece.who == LOOP or piece.phase in _BESIDE] + others
    shown = drawn + [cut for piece in within if (cut := _cut(piece, 0.0, own.seconds)) is not None]
    by_who: dict[str, list[Piece]] = {}
    for piece in shown:
        by_who.setdefault(piece.who, []).append(piece)
    actors = sorted(by_who.keys() - {LOOP, REWARDS}, key=_place)
    names = {
        who: f"Rollout actor {place}" if len(actors) > 1 else "Rollout actor" for place, who in enumerate(actors, 1)
    }
    names |= {REWARDS: "Rewards", LOOP: "Learner and loop"}
    rows = tuple(
        Row(who, name, _tracks(who, by_who[who]), idle_share(by_who[who], own.seconds) if whole else None)
        for who, name in names.items()
        if who in by_who
    )
    resting = max(0, num_actors - len(actors)) if whole else 0
    return Gantt(begin_s, own.seconds, rows, whole, own.left_out, resting)


def _tracks(who: str, pieces: Sequence[Piece]) -> tuple[tuple[Piece, ...], ...]:
    """A worker's pieces; a hand-off of the loop that overlaps with training lies below it."""
    tracks = packed(pieces)
    if who != LOOP or len(tracks) == 1:
        return tracks
    sides = [[piece for piece in pieces if (piece.phase in _HAND_OFF) is handed_off] for handed_off in (False, True)]
    return tuple(track for side in sides for track in packed(side))


def packed(pieces: Iterable[Piece]) -> tuple[tuple[Piece, ...], ...]:
    """Pieces in as few tracks as keep them apart, each in the first that is free; at most MAX_TRACKS."""
    tracks: list[list[Piece]] = []
    free: list[float] = []
    for piece in sorted(pieces, key=lambda one: (one.start_s, -one.seconds)):
        place = next((at for at, end_s in enumerate(free) if piece.start_s >= end_s - _TOLERANCE_S), len(tracks))
        if place == MAX_TRACKS:
            place = min(range(MAX_TRACKS), key=free.__getitem__)
        elif place == len(tracks):
            tracks.append([])
            free.append(-math.inf)
        tracks[place].append(piece)
        free[place] = max(free[place], piece.end_s)
    return tuple(map(tuple, tracks))


def idle_share(pieces: Iterable[Piece], seconds: float) -> float:
    """The share of the step in which none of the pieces ran; waiting for samples is none."""
    busy_s, until_s = 0.0, 0.0
    for piece in sorted(pieces, key=lambda one: one.start_s):
        if piece.phase != _WAITING:
            end_s = min(piece.end_s, seconds)
            busy_s += max(0.0, end_s - max(piece.start_s, until_s))
            until_s = max(until_s, end_s)
    return max(0.0, 1.0 - busy_s / seconds)


def as_json(found: Gantt) -> dict[str, Any]:
    """A step's rows as plain data: [phase, start, seconds, step] of each piece."""
    rows = [
        {
            "who": row.who,
            "label": row.label,
            "idle": row.idle,
            "tracks": [
                [[one.phase, round(one.start_s, 4), round(one.seconds, 4), one.step] for one in track]
                for track in row.tracks
            ],
        }
        for row in found.rows
    ]
    return {
        "begin": found.begin_s,
        "seconds": found.seconds,
        "whole": found.whole,
        "left_out": found.left_out,
        "num_resting": found.num_resting,
        "labels": LABELS,
        "rows": rows,
    }


def _cut(piece: Piece, begin_s: float, end_s: float) -> Piece | None:
    """The part of a piece between two times; None for one that lies outside, but for what rounding adds."""
    start_s, over_s = max(piece.start_s, begin_s), min(piece.end_s, end_s)
    least_s = 0.0 if over_s - start_s == piece.seconds else _TOLERANCE_S
    return replace(piece, start_s=start_s, seconds=over_s - start_s) if over_s - start_s > least_s else None


def _place(who: str) -> tuple[str, int]:
    """Order of workers: by host, then by process, as far as they are numbered."""
    host, _, pid = who.rpartition(":")
    return host, int(pid) if pid.isdigit() else 0
