"""A report's tables: where time went, what failed, what happened, on what it ran. Pure, from rows and small files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raylign.metrics import MetricsRow
from services.console import duration
from services.dashboard.timing import slowest
from services.environment import Part

MAX_EVENTS = 200
_CAUSES = 20


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to the run."""

    step: int
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class FailureRow:
    """One kind of failure: how often, and an example of what caused it."""

    kind: str
    count: str
    reward: str
    message: str
    sample: str


def timings(rows: Sequence[MetricsRow]) -> list[dict[str, str]]:
    """Phases of the loop, the longest first; [] before a step was trained."""
    trained = [{name: value for name, value in row.items() if value is not None} for row in rows]
    trained = [row for row in trained if row.get("time/step_s")]
    return [
        {
            "phase": str(one["label"]),
            "per_step": f"{one['seconds']:.3g} s",
            "total": duration(one["seconds"] * len(trained)),
            "share": f"{one['share']:.1%}",
        }
        for one in slowest(trained)
    ]


def failures(rows: Sequence[MetricsRow], recorded: Sequence[Mapping[str, Any]]) -> list[FailureRow]:
    """Counts from the metrics, which have all, and below them causes from the record, which has examples."""
    counts: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if value and (name.startswith("failed/") or name == "eval/failed"):
                kind = "held-out samples" if name == "eval/failed" else name.removeprefix("failed/")
                counts[kind] = counts.get(kind, 0.0) + value
    found = [FailureRow(kind.replace("_", " "), f"{count:g}", "", "", "") for kind, count in sorted(counts.items())]
    causes: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in recorded:
        causes.setdefault((str(row.get("kind", "")), str(row.get("reward", ""))), []).append(row)
    ranked = sorted(causes.items(), key=lambda item: -len(item[1]))
    for (kind, reward), examples in ranked[:_CAUSES]:
        last = examples[0]
        sample = f"step {last.get('step')}, sample {last.get('sample')} of: {last.get('prompt', '')}"
        message = str(last.get("message", "")) or "(no words)"
        found.append(FailureRow(kind, f"{len(examples)} recorded", reward, message, sample))
    return found


def events(rows: Sequence[MetricsRow], summary: Mapping[str, Any]) -> tuple[list[Event], int]:
    """What happened, in order, and how many events are left out: losses, guards, scaling, changed configurations."""
    found = [*_from_rows(rows), *_from_summary(summary)]
    found.sort(key=lambda event: event.step)
    return found[:MAX_EVENTS], max(0, len(found) - MAX_EVENTS)


def _from_rows(rows: Sequence[MetricsRow]) -> Iterable[Event]:
    wanted: float | None = None
    for row in rows:
        step = int(row["step"] or 0)
        recovery_s = row.get("time/recovery_s")
        if recovery_s is not None:
            yield Event(step, "recovery", f"the learner was lost; training again {recovery_s:.1f} s after")
        actors = row.get("actors/wanted")
        if actors is not None:
            if wanted is not None and actors != wanted:
                yield Event(step, "scaling", f"from {wanted:g} to {actors:g} rollout actors")
            wanted = actors
        for name, value in row.items():
            if value and name.startswith("failed/async_"):
                band = name.removeprefix("failed/async_")
                yield Event(step, "guard", f"left the band of {band}; the run goes on synchronously")
        if row.get("async/returned"):
            yield Event(step, "guard", "asynchronous again")
        refused = row.get("failed/refused_updates")
        if refused:
            yield Event(step, "refused", f"{refused:g} updates whose loss or gradient was not finite were refused")


def _from_summary(summary: Mapping[str, Any]) -> Iterable[Event]:
    for one in _mappings(summary.get("guard")):
        did = ", ".join(str(action) for action in one.get("actions") or ())
        yield Event(_step(one), f"guard: {one.get('signal', '')}", f"{one.get('told', '')} ({did})" if did else "")
    for one in _mappings(summary.get("config_changes")):
        yield Event(_step(one), "configuration", ", ".join(f"{key} {value}" for key, value in one.items()))
    origin = summary.get("origin")
    if isinstance(origin, Mapping):
        yield Event(_step(origin), "fork", ", ".join(f"{key} {value}" for key, value in origin.items()))


def environment_rows(parts: Sequence[Part]) -> list[tuple[str, str]]:
    """What the run ran on: its last part, and when each part began."""
    if not parts:
        return []
    rows: list[tuple[str, str]] = []
    for key, value in parts[-1].items():
        if isinstance(value, Mapping):
            rows += [(f"{key}.{inner}" if key != "libraries" else inner, str(one)) for inner, one in value.items()]
        elif isinstance(value, list):
            rows.append((key, ", ".join(map(str, value))))
        elif key != "began":
            rows.append((key.replace("_", " "), str(value)))
    return [*((f"part {place} began", str(part.get("began", ""))) for place, part in enumerate(parts, 1)), *rows]


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _step(one: Mapping[str, Any]) -> int:
    value = one.get("step")
    return value if isinstance(value, int) else 0
