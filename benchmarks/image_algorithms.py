"""Every algorithm for pictures on both embedded tasks: what it reaches, in how many seconds and samples, and its price.

    python benchmarks/image_algorithms.py --seeds 3 --steps 20 --json docs/benchmarks/image_algorithms.json

trains each algorithm with its shipped preset (`raylign train quickstart_glyphs|shapes PRESET`) from the same base
models, the same prompts and the same number of samples per step, in one process with one thread, `--jobs` runs at a
time, and prints one JSON object per run: held-out reward (Euler ODE, no guidance), held-out metrics that nobody trains
on, diversity, all along the run; samples and seconds to a fixed reward; reward at equal seconds; and drift, the mean
squared difference between the trained and the base model's velocities. `crd_free` is CRD without its KL anchor.

`--plot FILE.png` draws the curves, `--table FILE.md` writes the summary. Runs that lie in `--folder` are not repeated.
Differences within the seeds' spread are none.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from learning_curves import (
    at,
    crossing,
    held_out_curve,
    provenance,
    pyplot,
    reached,
    spread,
    step_rows,
    train_once,
)

from learner.checkpoint import list_checkpoints, load_checkpoint
from learner.state import policy_tensors
from raylign.assets import resolve
from raylign.keys import normal, sample_generators
from raylign.models import DenoisingPolicy, load_policy
from raylign.models.base import Conditioning, join_conditioning
from raylign.types import SampleKey
from rollout.prompts import load_prompts
from services.config import load_run_config

ALGORITHMS = (
    *("nft", "awm", "crd", "crd_free", "crd_anchored"),
    *("flow_grpo", "flow_grpo_fast", "grpo_guard", "mix_grpo", "dance_grpo", "ddpo"),
)
VARIANTS: Mapping[str, tuple[str, Sequence[str]]] = {
    "crd_free": ("crd", ("--algorithm.kl_weight", "0.0")),
    "crd_anchored": ("crd", ("--algorithm.kl_weight", "1.0", "--algorithm.kl_guidance", "1.0")),
}
"""Presets with a change."""
TASKS: Mapping[str, str] = {"glyphs": "quickstart_image", "shapes": "quickstart_shapes"}
WANTED: Mapping[str, float] = {"glyphs": 0.8, "shapes": 0.6}
"""The fixed reward that runs are raced to."""
SAMPLES_PER_STEP = 96
DRIFT_SIGMAS = (0.9, 0.7, 0.5, 0.3, 0.1)
DRIFT_PROMPTS = 32


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    algorithm: str
    task: str
    seed: int


def train(job: Job, options: argparse.Namespace) -> Path:
    """Train once; returns the run's folder."""
    run_dir = options.folder / f"{job.task}-{job.algorithm}-{job.seed}"
    preset, changes = VARIANTS.get(job.algorithm, (job.algorithm, ()))
    arguments = [TASKS[job.task], preset, "--seed", str(job.seed), "--num_steps", str(options.steps)]
    arguments += ["--placement", "in_process", "--eval.every_steps", str(options.every)]
    arguments += ["--eval.samples_per_prompt", "2", "--checkpoint.every_steps", str(options.every)]
    train_once([*arguments, "--checkpoint.keep", "99", *changes], run_dir)
    return run_dir


def read(job: Job, run_dir: Path) -> dict[str, Any]:
    """What a run left behind, with its drift."""
    steps = step_rows(run_dir)
    curve = held_out_curve(run_dir, SAMPLES_PER_STEP)
    for point, drift in zip(curve, drifts(job, run_dir), strict=True):
        point["drift"] = drift
    return {
        "algorithm": job.algorithm,
        "task": job.task,
        "seed": job.seed,
        "curve": curve,
        "training_reward": [steps[step]["reward/mean"] for step in sorted(steps)],
        "samples_to_wanted": crossing(curve, "samples", WANTED[job.task]),
        "seconds_to_wanted": crossing(curve, "seconds", WANTED[job.task]),
        "drift_at_wanted": crossing(curve, "drift", WANTED[job.task]),
    }


@dataclass(frozen=True, slots=True)
class Yardstick:
    """A base model with places that it knows, and its answers there, (T, N, C, H, W)."""

    policy: DenoisingPolicy
    told: Conditioning
    states: Sequence[torch.Tensor]
    base: torch.Tensor

    def answers(self) -> torch.Tensor:
        """The velocities of whatever weights the policy holds."""
        levels = zip(DRIFT_SIGMAS, self.states, strict=True)
        with torch.no_grad():
            asked = [self.policy.predict(x, torch.full((len(x),), sigma), self.told) for sigma, x in levels]
        return torch.stack(asked)


@functools.cache
def yardstick(config_file: str) -> Yardstick:
    """On held-out prompts, at x = (1 - t) x0 + t eps of five levels t; x0 is what the base makes of noise at once."""
    config = load_run_config(config_file)
    policy: DenoisingPolicy = load_policy(config.model, "rollout")  # type: ignore[arg-type]  # pictures only
    prompts = load_prompts(resolve(str(config.prompts.heldout)), config.prompts.fields)[:DRIFT_PROMPTS]
    told = join_conditioning([policy.encode(prompt.text, False) for prompt in prompts])
    keys = [SampleKey(0, prompt.id, -1, 0) for prompt in prompts]
    first, second = (normal(sample_generators(keys, name), policy.latent_shape) for name in ("drift_a", "drift_b"))
    with torch.no_grad():
        clean = first - policy.predict(first, torch.ones(len(keys)), told)
    states = [(1 - sigma) * clean + sigma * second for sigma in DRIFT_SIGMAS]
    stick = Yardstick(policy, told, states, torch.empty(0))
    return replace(stick, base=stick.answers())


def drifts(job: Job, run_dir: Path) -> list[float]:
    """Mean squared difference of the velocities from the base model's, at the start and at each checkpoint."""
    stick = yardstick(TASKS[job.task])
    found = [0.0]
    for folder in list_checkpoints(run_dir / "checkpoints"):
        tensors = policy_tensors(load_checkpoint(folder).state)
        with torch.no_grad():
            for name, parameter in stick.policy.trainable_parameters().items():
                parameter.copy_(tensors[name])
        found.append(float(((stick.answers() - stick.base) ** 2).mean()))
    return found


def table(runs: Sequence[Mapping[str, Any]], seconds: float) -> str:
    """Medians over seeds with the lowest and highest, as Markdown; one table per task."""
    lines: list[str] = []
    for task in dict.fromkeys(run["task"] for run in runs):
        of_task = [run for run in runs if run["task"] == task]
        held_out = [name for name in of_task[0]["curve"][0] if name in ("glyph_pixels", "sharpness", "palette")]
        titles = ["held-out reward", f"after {seconds:g} s", f"samples to {WANTED[task]}", f"seconds to {WANTED[task]}"]
        titles += [*held_out, "diversity", "drift", f"drift at {WANTED[task]}"]
        lines += [f"**{task}**", "", f"| algorithm | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
        for algorithm in dict.fromkeys(run["algorithm"] for run in of_task):
            mine = [run for run in of_task if run["algorithm"] == algorithm]
            cells = [_change(mine, "mean"), spread([at(run["curve"], seconds) for run in mine])]
            cells += [reached([run[name] for run in mine]) for name in ("samples_to_wanted", "seconds_to_wanted")]
            cells += [_change(mine, name) for name in (*held_out, "diversity")]
            cells.append(spread([run["curve"][-1]["drift"] for run in mine]))
            there = [run["drift_at_wanted"] for run in mine if run["drift_at_wanted"] is not None]
            cells.append(spread(there) if there else "–")
            lines.append(f"| `{algorithm}` | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _change(runs: Sequence[Mapping[str, Any]], name: str) -> str:
    before = statistics.median(run["curve"][0][name] for run in runs)
    return f"{before:.2f} → {spread([run['curve'][-1][name] for run in runs])}"


def plot(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out reward over samples, over seconds, and against drift, one row per task."""
    plt = pyplot()

    tasks = list(dict.fromkeys(run["task"] for run in runs))
    algorithms = list(dict.fromkeys(run["algorithm"] for run in runs))
    axes_names = (("samples", "samples drawn"), ("seconds", "seconds of training"), ("drift", "drift from the base"))
    figure, grid = plt.subplots(len(tasks), 3, figsize=(16, 4.6 * len(tasks)), squeeze=False, sharey="row")
    colours = plt.get_cmap("tab20")
    for row, task in enumerate(tasks):
        for column, (name, label) in enumerate(axes_names):
            axis = grid[row][column]
            for index, algorithm in enumerate(algorithms):
                mine = [r["curve"] for r in runs if (r["task"], r["algorithm"]) == (task, algorithm)]
                for seed, curve in enumerate(mine):
                    title = algorithm if seed == 0 else None
                    axis.plot(
                        [point[name] for point in curve],
                        [point["mean"] for point in curve],
                        color=colours(2 * index % 20 + index // 10),
                        alpha=0.85,
                        linewidth=1.4,
                        label=title,
                    )
            axis.axhline(WANTED[task], color="grey", linewidth=0.8, linestyle=":")
            axis.set_xlabel(label)
            axis.grid(alpha=0.25)
            if column == 0:
                axis.set_ylabel(f"{task}: held-out reward")
    grid[0][0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Parse the arguments, run, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS, choices=ALGORITHMS)
    parser.add_argument("--tasks", nargs="+", default=tuple(TASKS), choices=tuple(TASKS))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1")
    parser.add_argument("--steps", type=int, default=20, help="policy updates per run, 96 samples each")
    parser.add_argument("--every", type=int, default=4, help="steps between evaluations")
    parser.add_argument("--seconds", type=float, default=30.0, help="training time at which rewards are compared")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/image_algorithms"), help="where the runs are kept")
    parser.add_argument("--hardware", default="", help="what it runs on, in words, for the JSON")
    parser.add_argument("--json", type=Path, default=None, help="also write the JSON to this file")
    parser.add_argument("--plot", type=Path, default=None, help="draw the curves here (PNG)")
    parser.add_argument("--table", type=Path, default=None, help="write the summary here (Markdown)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    jobs = [
        Job(algorithm, task, seed)
        for task in options.tasks
        for algorithm in options.algorithms
        for seed in range(options.seeds)
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        folders = list(pool.map(lambda job: train(job, options), jobs))
    runs = [read(job, folder) for job, folder in zip(jobs, folders, strict=True)]
    settings = {
        **provenance(__file__, options.hardware),
        "steps": options.steps,
        "samples_per_step": SAMPLES_PER_STEP,
        "wanted": WANTED,
    }
    text = json.dumps({**settings, "runs": runs}, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.table is not None:
        options.table.write_text(table(runs, options.seconds), encoding="utf-8")
    if options.plot is not None:
        plot(runs, options.plot)


if __name__ == "__main__":
    main()
