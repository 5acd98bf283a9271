"""The groups that a report shows: the best, the worst and the most changed of the held-out prompts. From the record.

Held-out groups are drawn with the same keys at every evaluation, so before and after differ by training alone. A run
without held-out groups shows the best and the worst of its last recorded step.
"""

from __future__ import annotations

import base64
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.record_files import RecordKind, picture_type, read_picture, read_record, recorded
from services.text_samples import GOOD_REWARD

_SHOWN = 3
"""Groups of each kind."""
_SIBLINGS = 6
_MAX_TEXT = 600
_MAX_WORDS = 300
_LARGEST_PICTURE = 60_000
"""Bytes; larger ones are left to the dashboard, so that a page stays small."""


@dataclass(frozen=True, slots=True)
class Sibling:
    """One sample of a group."""

    picture: str
    """A data URL; "" for texts, and for pictures that are too large."""
    text: str
    reward: str
    good: bool
    scores: str
    words: str
    """What rewards and judges said of it, and why it failed if it did."""


@dataclass(frozen=True, slots=True)
class GroupView:
    """One prompt with its samples, at the last look and, where there was one, at the first."""

    prompt: str
    mean: str
    before: tuple[Sibling, ...]
    after: tuple[Sibling, ...]


@dataclass(frozen=True, slots=True)
class GroupsView:
    """One heading and its groups."""

    title: str
    note: str
    groups: tuple[GroupView, ...]


def groups_of(run: Path) -> list[GroupsView]:
    """What the record of a run has to show; [] if nothing was recorded."""
    known = recorded(run)
    kind: RecordKind = "eval" if known["eval"] else "train"
    last = _first_whole(run, kind, reversed(known[kind]))
    if last is None:
        return []
    scored = [group for group in last.groups if _mean(group) is not None]
    ranked = sorted(scored, key=lambda group: _mean(group) or 0.0, reverse=True)
    words = "held-out prompts" if kind == "eval" else "training prompts"
    shown = min(_SHOWN, max(1, len(ranked) // 2))
    found = [
        GroupsView("Best groups", f"{words}, step {last.step}", tuple(last.view(one) for one in ranked[:shown])),
        GroupsView("Worst groups", f"{words}, step {last.step}", tuple(last.view(one) for one in ranked[::-1][:shown])),
    ]
    failed = [group for group in last.groups if _mean(group) is None]
    if failed:
        found.append(GroupsView("Groups without a reward", f"step {last.step}", tuple(map(last.view, failed[:_SHOWN]))))
    first = _first_whole(run, kind, known[kind]) if kind == "eval" else None
    if first is not None and first.step != last.step:
        found.append(_most_changed(first, last))
    return [one for one in found if one.groups]


def _first_whole(run: Path, kind: RecordKind, steps: Iterable[int]) -> _Look | None:
    """The first of these steps whose record can be read. No other is read: a run may have recorded thousands."""
    looks = (_Look(run, kind, step) for step in steps)
    return next((look for look in looks if look.groups), None)


def _most_changed(first: _Look, last: _Look) -> GroupsView:
    before = {str(group["prompt"]["id"]): group for group in first.groups}
    changes: list[tuple[float, Mapping[str, Any], Mapping[str, Any]]] = []
    for group in last.groups:
        old = before.get(str(group["prompt"]["id"]))
        if old is not None and (was := _mean(old)) is not None and (now := _mean(group)) is not None and was != now:
            changes.append((now - was, old, group))
    changes.sort(key=lambda change: -abs(change[0]))
    note = f"held-out prompts, drawn with the same keys at step {first.step} and step {last.step}"
    groups = tuple(
        GroupView(
            _cut(str(group["prompt"]["text"]), _MAX_TEXT),
            f"{_number(_mean(old))} → {_number(_mean(group))}",
            first.siblings(old),
            last.siblings(group),
        )
        for _, old, group in changes[:_SHOWN]
    )
    return GroupsView("Most changed groups", note, groups)


class _Look:
    """One recorded step."""

    def __init__(self, run: Path, kind: RecordKind, step: int) -> None:
        self._run = run
        self._kind: RecordKind = kind
        self.step = step
        loaded = _load(run, kind, step)
        self.groups: Sequence[Mapping[str, Any]] = loaded if loaded is not None else ()

    def view(self, group: Mapping[str, Any]) -> GroupView:
        return GroupView(_cut(str(group["prompt"]["text"]), _MAX_TEXT), _number(_mean(group)), (), self.siblings(group))

    def siblings(self, group: Mapping[str, Any]) -> tuple[Sibling, ...]:
        return tuple(self._sibling(sample) for sample in group["samples"][:_SIBLINGS])

    def _sibling(self, sample: Mapping[str, Any]) -> Sibling:
        total = sample.get("total")
        scores = [f"{one['name']} {_number(one.get('value'))}" for one in sample.get("scores", ())]
        return Sibling(
            self._picture(sample),
            _cut(str(sample.get("text") or ""), _MAX_TEXT) if "text" in sample else "",
            "no reward" if total is None else _number(total),
            total is not None and total > GOOD_REWARD,
            " · ".join(scores) if len(scores) > 1 else "",
            _cut("; ".join(_words(sample)), _MAX_WORDS),
        )

    def _picture(self, sample: Mapping[str, Any]) -> str:
        place = sample.get("picture")
        if not place or place[1] > _LARGEST_PICTURE:
            return ""
        data = read_picture(self._run, self._kind, self.step, place[0], place[1])
        media = picture_type(data) if data is not None else None
        return "" if data is None or media is None else f"data:{media};base64,{base64.b64encode(data).decode()}"


def _words(sample: Mapping[str, Any]) -> list[str]:
    """Texts in the scores' details (what was read, what a judge argued), and the cause of a failure."""
    words: list[str] = []
    for score in sample.get("scores", ()):
        details = score.get("details") or {}
        words += [f"{score['name']} {name}: {value}" for name, value in details.items() if value and type(value) is str]
        if score.get("error"):
            words.append(f"{score['error'].get('code', '')}: {score['error'].get('message', '')}")
    failure = sample.get("failure")
    if failure and not any(str(failure.get("message", "")) in one for one in words):
        words.append(f"{failure.get('kind', '')} {failure.get('reward', '')}: {failure.get('message', '')}")
    return words


def _load(run: Path, kind: RecordKind, step: int) -> list[Mapping[str, Any]] | None:
    """The groups of a step; None for a record that is torn or was written by something else."""
    data = read_record(run, kind, step)
    try:
        groups = json.loads(data)["groups"] if data is not None else []
        known = [one for one in groups if one["prompt"]["text"] is not None and one["samples"] is not None]
    except (ValueError, KeyError, TypeError):
        return None
    return known or None


def _mean(group: Mapping[str, Any]) -> float | None:
    totals = [sample["total"] for sample in group["samples"] if sample.get("total") is not None]
    return statistics.fmean(totals) if totals else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} …"
