"""What benchmarks that train share: runs made as a person would make them, and their held-out reward along the way."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Curve = list[dict[str, float]]


def train_once(arguments: Sequence[str], run_dir: Path) -> None:
    """`raylign train ARGUMENTS --run-dir RUN_DIR` in one thread; a finished run that is there already is kept.

    Raises SystemExit with the end of its output when it fails.
    """
    summary = run_dir / "summary.json"
    if summary.is_file() and json.loads(summary.read_text())["status"] == "finished":
        return
    command = [sys.executable, "-m", "services.cli", "train", *arguments, "--run-dir", str(run_dir)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=False, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{run_dir.name} failed:\n{done.stdout[-3000:]}")
    print(f"{datetime.now(UTC):%H:%M:%S} {run_dir.name} done", file=sys.stderr, flush=True)


def step_rows(run_dir: Path) -> dict[int, dict[str, float]]:
    """A run's metrics by learner step."""
    return {row["step"]: row for row in _rows(run_dir) if "reward/mean" in row}


def held_out_curve(run_dir: Path, samples_per_step: int) -> Curve:
    """Each evaluation's metrics, with `step`, `samples` drawn for training until then and `seconds` of training.

    Evaluations are not training: their time is left out.
    """
    steps = step_rows(run_dir)
    spent = {0: 0.0}
    for step in sorted(steps):
        spent[step] = spent[step - 1] + steps[step]["time/step_s"] - steps[step].get("time/evaluate_s", 0.0)
    evals = [row for row in _rows(run_dir) if "eval/mean" in row]
    names = [name.removeprefix("eval/") for name in evals[0] if name.startswith("eval/")]
    return [
        {
            "step": row["step"],
            "samples": row["step"] * samples_per_step,
            "seconds": spent[row["step"]],
            **{name: row[f"eval/{name}"] for name in names},
        }
        for row in evals
    ]


def crossing(curve: Sequence[Mapping[str, float]], axis: str, wanted: float) -> float | None:
    """Where the held-out reward first reaches `wanted`, between evaluations by a straight line; None if never."""
    for before, after in itertools.pairwise(curve):
        if before["mean"] < wanted <= after["mean"]:
            share = (wanted - before["mean"]) / (after["mean"] - before["mean"])
            return before[axis] + share * (after[axis] - before[axis])
    return None


def at(curve: Sequence[Mapping[str, float]], seconds: float) -> float:
    """The held-out reward after so many seconds of training; the last one if the run was over by then."""
    for before, after in itertools.pairwise(curve):
        if before["seconds"] <= seconds < after["seconds"]:
            share = (seconds - before["seconds"]) / (after["seconds"] - before["seconds"])
            return before["mean"] + share * (after["mean"] - before["mean"])
    return curve[-1]["mean"]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median with the lowest and highest, for Markdown."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"**{middle:.{digits}f}** ({low:.{digits}f}–{high:.{digits}f})"


def reached(values: Sequence[float | None], digits: int = 0) -> str:
    """Median of where runs arrived, and how many of them did."""
    there = [value for value in values if value is not None]
    if not there:
        return f"0 of {len(values)}"
    some = f" ({len(there)} of {len(values)})" if len(there) < len(values) else ""
    return f"{statistics.median(there):.{digits}f}{some}"


def provenance(program: str, hardware: str) -> dict[str, str]:
    """By which command, from which commit, when and where something was measured."""
    return {
        "command": "python " + shlex.join([f"benchmarks/{Path(program).name}", *sys.argv[1:]]),
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip(),
        "date": datetime.now(tz=UTC).date().isoformat(),
        "hardware": hardware,
    }


def pyplot() -> Any:
    """matplotlib's plotting module, which draws to files only."""
    try:
        importlib.import_module("matplotlib").use("Agg")
    except ImportError:
        raise SystemExit("plots need matplotlib: pip install 'raylign[plots]'") from None
    return importlib.import_module("matplotlib.pyplot")


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
