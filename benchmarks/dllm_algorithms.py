"""Every algorithm for text on the same tasks from the same base models: what it reaches, in how many seconds and calls.

    python benchmarks/dllm_algorithms.py --seeds 3 --steps 60 --json docs/benchmarks/dllm_algorithms.json

trains each algorithm with its paper's defaults at one learning rate, rollouts and batch (the text quickstart's), on
`sortmix` and `countdown`, in one process with one thread, `--jobs` runs at a time, and prints one JSON object:
held-out reward, exact rate and calls (NFE) before and after, and the curves of training reward and calls over seconds.
JustGRPO draws left to right, one token per call, because it scores that order and no other; `trajectory` scores every
step and BGPO takes 4 Monte-Carlo samples, as canvases of 5 or 8 tokens want.
`--table` also prints the summary as Markdown. Differences within the seeds' spread are none.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ALGORITHMS = (
    *("d1", "coupled_grpo", "unigrpo", "wd1", "spg", "espo"),
    *("diffpo", "gdpo", "bgpo", "trajectory", "just_grpo"),
)
OVERRIDES: Mapping[str, Sequence[str]] = {
    "just_grpo": ("--sampler", '{type = "left_to_right"}'),
    "trajectory": ("--algorithm.merge_steps", "1"),
    "bgpo": ("--algorithm.num_samples", "4"),
}
"""What an algorithm needs otherwise on canvases this short; results say so."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    algorithm: str
    task: str
    seed: int


def run(job: Job, steps: int, folder: Path, extra: Sequence[str]) -> dict[str, Any]:
    """Train once, as a person would, and read what was left."""
    run_dir = folder / f"{job.task}-{job.algorithm}-{job.seed}"
    config = str(ROOT / "benchmarks" / f"dllm_{job.task}.toml")
    command = [sys.executable, "-m", "services.cli", "train", config, "--run-dir", str(run_dir)]
    command += ["--seed", str(job.seed), "--num_steps", str(steps), "--eval.every_steps", str(steps)]
    command += ["--algorithm.type", job.algorithm, *OVERRIDES.get(job.algorithm, ()), *extra]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=False, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stdout[-3000:]}")
    print(f"{job} done", file=sys.stderr, flush=True)
    summary = json.loads((run_dir / "summary.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "reward/mean" in row]
    return {
        "algorithm": job.algorithm,
        "task": job.task,
        "seed": job.seed,
        "before": summary["eval_initial"],
        "after": summary["eval_final"],
        "train_s": summary["train_s"],
        "seconds": [row["time/since_start_s"] for row in rows],
        "reward": [row["reward/mean"] for row in rows],
        "nfe": [row["nfe/mean"] for row in rows],
    }


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Medians over seeds with the lowest and highest, as Markdown."""
    lines = [
        "| task | algorithm | held-out reward | exact | calls per answer | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for task, algorithm in dict.fromkeys((run["task"], run["algorithm"]) for run in runs):
        mine = [run for run in runs if (run["task"], run["algorithm"]) == (task, algorithm)]
        cells: list[str] = []
        for name in ("mean", _exact(mine[0]), "nfe"):
            before = statistics.median(run["before"][name] for run in mine)
            cells.append(f"{before:.2f} → {_spread([run['after'][name] for run in mine])}")
        seconds = _spread([run["train_s"] for run in mine], 0)
        lines.append(f"| {task} | {algorithm} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def _exact(run: Mapping[str, Any]) -> str:
    """The metric that says how many answers were wholly right."""
    return next(name for name in run["after"] if name.endswith("/exact"))


def _spread(values: Sequence[float], digits: int = 2) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"**{middle:.{digits}f}** ({low:.{digits}f}–{high:.{digits}f})"


def main() -> None:
    """Parse the arguments, run, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS, choices=ALGORITHMS)
    parser.add_argument("--tasks", nargs="+", default=("sortmix", "countdown"), choices=("sortmix", "countdown"))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1")
    parser.add_argument("--steps", type=int, default=60, help="policy updates per run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--hardware", default="", help="what it runs on, in words, for the JSON")
    parser.add_argument("--json", type=Path, default=None, help="also write the JSON to this file")
    parser.add_argument("--table", action="store_true", help="also print a Markdown table to stderr")
    parser.add_argument("overrides", nargs="*", help="configuration overrides for every run, after --")
    arguments = parser.parse_args()
    jobs = [
        Job(algorithm, task, seed)
        for task in arguments.tasks
        for algorithm in arguments.algorithms
        for seed in range(arguments.seeds)
    ]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(arguments.jobs) as pool:
        runs = list(pool.map(lambda job: run(job, arguments.steps, Path(scratch), arguments.overrides), jobs))
    settings = {
        "command": "python " + shlex.join(sys.argv),
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip(),
        "date": datetime.now(tz=UTC).date().isoformat(),
        "hardware": arguments.hardware,
        "steps": arguments.steps,
        "overrides": arguments.overrides,
        "by_algorithm": OVERRIDES,
    }
    text = json.dumps({**settings, "runs": runs}, indent=1)
    print(text)
    if arguments.table:
        print(table(runs), file=sys.stderr)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
