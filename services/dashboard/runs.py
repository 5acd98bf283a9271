"""A folder of runs as the page sees it: what each is, how it goes, and which files may be read. Only reads.

A run is looked up among the names that the folder lists, never by joining a request's text to a path.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylign.errors import RaylignError, RunDirError
from services.dashboard.alerts import Facts, alerts, held_out_rewards
from services.dashboard.columns import Columns, MetricsTail, sampled_rows
from services.dashboard.gantt import as_json, gantt, read_work
from services.dashboard.timing import slowest
from services.headlines import is_metric
from services.record_files import as_ranges, read_record, recorded
from services.run_dir import RunDir

_SPARK_POINTS = 48
_RECENT = 20
_ENDS = ("eval/", "reward/", "throughput/", "nfe/")
_NO_GAP = 5e-6
"""Half of the narrowest tolerance: nothing to be said of less."""
_MAX_LATER = 8
"""Records after a step's own that are read for its timeline."""
_KILLED_AFTER_S = 120.0
"""A run on another machine that has written nothing for so long is taken for dead."""


class UnknownRunError(RaylignError):
    """There is no such run, step or file."""


@dataclass(frozen=True, slots=True)
class RunFiles:
    """One run of the folder."""

    name: str
    folder: RunDir
    tail: MetricsTail

    @property
    def path(self) -> Path:
        return self.folder.path


class RunsFolder:
    """The runs below a folder, or the one run that the folder is. Threads may share it."""

    def __init__(self, root: Path) -> None:
        """Raises RunDirError if there is no such folder."""
        if not root.is_dir():
            raise RunDirError(f"no folder {root}; give a run, or the folder that holds runs, such as runs")
        self._root = root.resolve()
        self._single = (self._root / "config.toml").is_file()
        self._runs: dict[str, RunFiles] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The runs that are there now, the newest first."""
        if self._single:
            return [self._root.name]
        found: list[tuple[float, str]] = []
        for path in self._root.iterdir():
            config = path / "config.toml"
            if config.is_file():
                found.append((config.stat().st_mtime, path.name))
        return [name for _, name in sorted(found, reverse=True)]

    def run(self, name: str) -> RunFiles:
        """The run of a name. Raises UnknownRunError."""
        if name not in self.names():
            raise UnknownRunError("no such run here")
        path = self._root if self._single else self._root / name
        with self._lock:
            if name not in self._runs:
                self._runs[name] = RunFiles(name, RunDir(path), MetricsTail(path / "metrics.jsonl"))
            return self._runs[name]

    def card(self, name: str) -> dict[str, Any]:
        """A run in one line of the list, from a part of its metrics."""
        run = self.run(name)
        config, summary = raw_config(run.path), _summary(run.folder)
        rows = sampled_rows(run.folder.metrics, _SPARK_POINTS)
        rewards = [(row["step"], row["reward/mean"]) for row in rows if row.get("reward/mean") is not None]
        evals = [row for row in rows if any(key.startswith("eval/") for key in row)]
        shown = _headline(Columns.of(evals), held_out_names(config))
        return {
            "name": name,
            **_state(run, summary, rows[-1]["step"] if rows else 0),
            "num_steps": config.get("num_steps"),
            "algorithm": config.get("algorithm", {}).get("type", ""),
            "model": config.get("model", {}).get("type", ""),
            "spark": [value for _, value in rewards],
            "reward": _first_last(rewards),
            "heldout": {"name": shown, **_first_last(Columns.of(evals).points(f"eval/{shown}"))} if shown else None,
        }

    def overview(self, name: str) -> dict[str, Any]:
        """All of a run but its curves and groups."""
        run = self.run(name)
        columns, summary = run.tail.refresh(), _summary(run.folder)
        config, facts = facts_of(run.path, columns)
        held_out = held_out_names(config)
        last = columns.steps[-1] if columns.steps else 0
        recent = [columns.row(step) or {} for step in columns.steps[-_RECENT:]]
        found = alerts(columns, facts)
        shown = _headline(columns, held_out)
        rewards = held_out_rewards(columns)
        metrics = [one for one in rewards if is_metric(one, held_out)]
        return {
            "name": name,
            **_state(run, summary, last),
            "generation": run.tail.generation,
            "num_steps": config.get("num_steps"),
            "algorithm": config.get("algorithm", {}).get("type", ""),
            "model": config.get("model", {}).get("type", ""),
            "seconds": (columns.tail("time/since_start_s", 1) or [None])[0],
            "keys": sorted(columns.values),
            "rewards": [one for one in rewards if one not in metrics],
            "held_out_metrics": metrics,
            "headline": shown,
            "reward": _first_last(columns.points("reward/mean")),
            "heldout": _heldout(columns, [shown, *rewards, "diversity", "nfe"]),
            "alerts": [alert.json() for alert in found],
            "slow": slowest([row for row in recent if row.get("time/step_s")]),
            "failed": failed_counts(columns),
            "samples_per_step": facts.groups_per_step * facts.group_size,
            "records": {kind: as_ranges(steps) for kind, steps in recorded(run.path).items()},
            "samples": sample_files(run),
            "origin": summary.get("origin"),
        }


def failed_counts(columns: Columns) -> dict[str, float]:
    """What failed over the whole run, by kind; only what did."""
    sums: dict[str, float] = {}
    for name in columns.values:
        if name.startswith("failed/"):
            sums[name.removeprefix("failed/")] = sum(columns.tail(name, len(columns.steps)))
    return {kind: count for kind, count in sorted(sums.items()) if count}


def held_out_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The rewards of a resolved configuration that are scored in evaluations only."""
    rewards = config.get("rewards")
    tables = [one for one in rewards if isinstance(one, dict)] if isinstance(rewards, list) else []
    return tuple(str(one.get("name")) for one in tables if one.get("only_eval") is True)


def facts_of(path: Path, columns: Columns) -> tuple[dict[str, Any], Facts]:
    """A run's configuration as it lies there, and what alerts need of it.

    What a gap may be follows from several keys, so it is asked of the configuration's own class, and only where there
    is a gap: reading that loads torch. A configuration of another version of Raylign has no tolerance.
    """
    raw = raw_config(path)
    given = {key: raw.get(key) for key in ("groups_per_step", "group_size")}
    sizes = {key: value for key, value in given.items() if isinstance(value, int) and value > 0}
    if max(columns.tail("parity/gap", 1), default=0.0) <= _NO_GAP:
        return raw, Facts(**sizes)
    from services.config import read_resolved_config

    try:
        return raw, Facts(**sizes, parity_tolerance=read_resolved_config(path / "config.toml").parity_tolerance)
    except RaylignError:
        return raw, Facts(**sizes)


def raw_config(path: Path) -> dict[str, Any]:
    """The run's config.toml as plain data, {} if it cannot be read."""
    try:
        return tomllib.loads((path / "config.toml").read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}


def compared(first: RunFiles, second: RunFiles) -> dict[str, Any]:
    """What two runs differ in: keys of their configurations, and how they ended."""
    a, b = (leaves_of(raw_config(run.path)) for run in (first, second))
    changed = [{"key": key, "a": a.get(key), "b": b.get(key)} for key in sorted(a | b) if a.get(key) != b.get(key)]
    columns = [run.tail.refresh() for run in (first, second)]
    names = [name for name in columns[0].values if name in columns[1].values]
    ends = [name for name in names if name.startswith(_ENDS) or name == "time/step_s"]
    return {
        "changed": changed,
        "readable": bool(a and b),
        "keys": sorted(names),
        "ends": [{"name": name, "a": _end(columns[0], name), "b": _end(columns[1], name)} for name in ends],
    }


def leaves_of(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration by dotted keys; the items of lists of tables are numbered."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            found |= leaves_of(value, f"{key}.")
        elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            found |= leaves_of({str(place): one for place, one in enumerate(value)}, f"{key}.")
        else:
            found[key] = value
    return found


def sample_files(run: RunFiles) -> list[str]:
    """Pictures that the run left in `samples/`."""
    folder = run.folder.samples
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".png" and path.is_file())


def frontier(run: RunFiles) -> dict[str, Any] | None:
    """The accuracy-calls frontier of a text run, if it measured one."""
    try:
        data = json.loads((run.folder.samples / "frontier.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def timeline(run: RunFiles, step: int, config: Mapping[str, Any], num_actors: int) -> dict[str, Any]:
    """When the pieces of a training step ran, None where no record tells; and how many later records may add to that.

    With a staleness of S, groups of the next S steps may be drawn while it runs, and their records tell of that.
    """
    own = read_work(read_record(run.path, "train", step))
    ahead, last = (value if isinstance(value := config.get(key), int) else 0 for key in ("max_staleness", "num_steps"))
    due = range(step + 1, min(step + ahead, last) + 1)
    if own is None:
        return {"timeline": None, "ahead": len(due)}
    later = [read_work(read_record(run.path, "train", one)) for one in due[:_MAX_LATER]]
    found = [work for work in later if work is not None]
    return {"timeline": as_json(gantt(own, found, len(found) == len(due), num_actors)), "ahead": len(due)}


def is_live(run: RunDir, now_s: float) -> bool:
    """Whether a process works in the directory: by the note in its lock, and where that is another machine's, by when
    the run last wrote. Taking the lock to see would be in the way of a run that starts."""
    try:
        note = json.loads(run.lock.read_bytes())
        host, pid = note["host"], int(note["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if host == socket.gethostname():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True
    try:
        return now_s - run.metrics.stat().st_mtime < _KILLED_AFTER_S
    except FileNotFoundError:
        return now_s - run.lock.stat().st_mtime < _KILLED_AFTER_S


def _state(run: RunFiles, summary: Mapping[str, Any], last_step: int) -> dict[str, Any]:
    live = is_live(run.folder, time.time())
    status = "running" if live else str(summary.get("status") or "interrupted")
    written = run.folder.metrics if run.folder.metrics.exists() else run.folder.config
    return {"live": live, "status": status, "step": last_step, "updated_s": written.stat().st_mtime}


def _summary(folder: RunDir) -> dict[str, Any]:
    try:
        return folder.read_summary()
    except RunDirError:
        return {}


def _headline(columns: Columns, held_out: Sequence[str]) -> str:
    """The held-out mean to show where there is room for one: the reward that is trained on, or their mix."""
    trained = [name for name in held_out_rewards(columns) if not is_metric(name, held_out)]
    return "mean" if len(trained) > 1 and "eval/mean" in columns.values else trained[0] if trained else ""


def _heldout(columns: Columns, names: list[str]) -> list[dict[str, Any]]:
    """First and last of held-out means."""
    found = [{"name": name, **_first_last(columns.points(f"eval/{name}"))} for name in dict.fromkeys(names)]
    return [one for one in found if one["last"] is not None]


def _first_last(points: list[tuple[int, float]]) -> dict[str, Any]:
    if not points:
        return {"first": None, "last": None, "step": None}
    return {"first": points[0][1], "last": points[-1][1], "step": points[-1][0]}


def _end(columns: Columns, name: str) -> float | None:
    points = columns.points(name)
    return points[-1][1] if points else None
