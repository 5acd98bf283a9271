"""What does asynchrony bring, and what does it cost? Three programs in one:

    python benchmarks/async_runs.py train --seeds 3 --report docs/benchmarks/async_runs
    python benchmarks/async_runs.py simulate RUN_DIR --actors 8 64 1024 --json simulated.json
    python benchmarks/async_runs.py cost --json cost.json

train     trains the glyphs task with rollout actors and learner apart, at each staleness: DiffusionNFT, and Flow-GRPO
          with either correction of its ratios. Throughput and final held-out reward against staleness, and how far the
          policy had moved from the ones that drew. The guard is told to let every run be. One run takes --actors + 1
          busy processes; give it that many idle cores. Runs that lie in --out are not repeated.
simulate  plays the phases that a run recorded (`metrics.jsonl`) to the real controller and buffer on a virtual clock,
          with more actors. Each actor brings as many groups per step as it had in the recording, learner ranks and
          reward replicas grow alike (--train-factor 2: the learner takes twice as long), and chunks vary by --jitter
          around recorded times, which are means over a step. Weights take as long to pull as they did.
cost      processor time of the controller, per sample, where nothing else takes any: one core, any number of actors.

JSON is printed; --json and --report write it as well.
"""

from __future__ import annotations

import argparse
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

from benchmarks.async_simulation import Cluster, controller_cost, extrapolate
from benchmarks.learning_curves import (
    ROOT,
    crossing,
    held_out_curve,
    pyplot,
    reached,
    spread,
    step_rows,
    train_once,
)
from benchmarks.simulated_roles import read_recording
from services.config import load_run_config

WANTED = 0.85
"""Held-out OCR similarity that methods are raced to; the base model has about .45."""
_RATIO_BAND_OFF = "1e9"
METHODS: dict[str, tuple[list[str], list[str]]] = {
    "nft": ([], []),
    "flow_grpo_decoupled": (
        ["flow_grpo"],
        ["--algorithm.staleness_correction", "decoupled", "--async_guard.max_deviation", _RATIO_BAND_OFF],
    ),
    "flow_grpo_clip": (
        ["flow_grpo"],
        ["--algorithm.staleness_correction", "clip", "--async_guard.max_deviation", _RATIO_BAND_OFF],
    ),
}
"""Presets laid over the quickstart, and what else a method changes."""
_DRIFT = ("behaviour/deviation", "ratio/clip_fraction")


def arguments(method: str, staleness: int, seed: int, options: argparse.Namespace) -> list[str]:
    """The command line of one run, from its configurations on."""
    presets, changes = METHODS[method]
    if staleness == 0:  # nothing to guard there
        changes = changes[: changes.index("--async_guard.max_deviation")] if changes else []
    settings = {
        "seed": seed,
        "num_steps": options.steps,
        "placement": "separate",
        "max_staleness": staleness,
        "rollout.num_actors": options.actors,
        "eval.every_steps": options.every,
        "eval.num_prompts": options.heldout,
        "checkpoint.every_steps": options.steps,
    }
    given = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    joined = ["--address", options.address] if options.address else []
    return ["quickstart_image", *presets, *given, *changes, *joined]


def train(method: str, staleness: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run, or what is left of it, as a row of the report."""
    run_dir = options.out / f"{method}-s{staleness}-{seed}"
    train_once(arguments(method, staleness, seed, options), run_dir)
    config = load_run_config(str(run_dir / "config.toml"))
    per_step = config.groups_per_step * config.group_size
    curve = held_out_curve(run_dir, per_step)
    steps = list(step_rows(run_dir).values())
    # The first steps are as fresh as those of a synchronous run.
    settled = steps[min(staleness + 1, len(steps) - 1) :]
    drift = {
        name: statistics.fmean(row[name] for row in settled if name in row)
        for name in sorted({name for row in settled for name in row if name.startswith(_DRIFT)})
    }
    return {
        "method": method,
        "staleness": staleness,
        "seed": seed,
        # Of the whole run: at its end the learner trains what is there, and nothing more is drawn.
        "samples_per_s": curve[-1]["samples"] / curve[-1]["seconds"],
        "staleness_mean": statistics.fmean(row["staleness/mean"] for row in settled),
        "final": curve[-1]["mean"],
        "diversity": curve[-1]["diversity"],
        "steps_to_wanted": crossing(curve, "step", WANTED),
        "seconds_to_wanted": crossing(curve, "seconds", WANTED),
        "drift": drift,
        "curve": curve,
    }


def markdown(data: Mapping[str, Any]) -> str:
    """The table, as Markdown."""
    about = (
        f"`{data['command']}`, {data['date']}, commit {data['commit']}, {data['hardware']}. Medians over seeds with "
        f"the lowest and highest; held-out OCR similarity, wanted {WANTED}. `×` is the ratio to the same method's "
        "median at staleness 0."
    )
    titles = ["method", "max_staleness", "mean age", "samples/s", "×", "final held-out", "steps to wanted"]
    titles += ["seconds to wanted", "policy moved by"]
    lines = ["# Asynchronous runs on the glyphs task", "", about, ""]
    lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for method in dict.fromkeys(run["method"] for run in data["runs"]):
        of_method = [run for run in data["runs"] if run["method"] == method]
        synchronous = [run["samples_per_s"] for run in of_method if run["staleness"] == 0]
        for staleness in sorted({run["staleness"] for run in of_method}):
            mine = [run for run in of_method if run["staleness"] == staleness]
            rates = [run["samples_per_s"] for run in mine]
            times = f"{statistics.median(rates) / statistics.median(synchronous):.2f}" if synchronous else "–"
            moved = [run["drift"][_DRIFT[0]] for run in mine if _DRIFT[0] in run["drift"]]
            cells = [str(staleness), spread([run["staleness_mean"] for run in mine]), spread(rates, 1), times]
            cells += [spread([run["final"] for run in mine]), reached([run["steps_to_wanted"] for run in mine])]
            cells += [reached([run["seconds_to_wanted"] for run in mine])]
            cells += [f"{statistics.median(moved):.1e}" if moved else "–"]
            lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def plot(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Throughput and final reward over staleness, a dot per run and a line through the medians."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    panels = (("samples_per_s", "samples per second"), ("final", "final held-out OCR similarity"))
    colours = dict(zip(METHODS, plt.get_cmap("tab10").colors, strict=False))
    for axis, (name, label) in zip(axes, panels, strict=True):
        for method in dict.fromkeys(run["method"] for run in runs):
            mine = [run for run in runs if run["method"] == method]
            places = sorted({run["staleness"] for run in mine})
            medians = [statistics.median(run[name] for run in mine if run["staleness"] == at) for at in places]
            axis.plot(places, medians, color=colours[method], label=method)
            axis.scatter([run["staleness"] for run in mine], [run[name] for run in mine], s=12, color=colours[method])
        axis.set_xlabel("max_staleness")
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
    axes[0].legend(loc="best")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def run_train(options: argparse.Namespace) -> dict[str, Any]:
    """All runs, one after the other: seed by seed, so that a cut short sweep is whole as far as it went."""
    runs = [
        train(method, staleness, seed, options)
        for seed in range(options.seeds)
        for method in options.methods
        for staleness in options.staleness
    ]
    return {"wanted": WANTED, "runs": runs}


def run_simulate(options: argparse.Namespace) -> dict[str, Any]:
    """A row for each number of actors at each staleness."""
    recording = read_recording(options.run)
    per_actor = recording.groups_per_step / recording.num_actors
    rows: list[dict[str, float]] = []
    for num_actors in options.actors:
        for staleness in options.staleness:
            cluster = Cluster(
                num_actors,
                max(1, round(per_actor * num_actors)),
                recording.group_size,
                staleness,
                options.steps + staleness,
                options.jitter,
                options.deaths_per_hour,
                options.train_factor,
            )
            rows.append(extrapolate(recording, cluster))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    synchronous = {row["actors"]: row["samples_per_s"] for row in rows if row["max_staleness"] == 0}
    for row in rows:
        if row["actors"] in synchronous:
            row["speedup"] = row["samples_per_s"] / synchronous[row["actors"]]
    recorded = {"actors": recording.num_actors, "steps": len(recording.steps), **recording.medians()}
    return {"recorded": recorded, "groups_per_actor": per_actor, "jitter": options.jitter, "rows": rows}


def run_cost(options: argparse.Namespace) -> dict[str, Any]:
    """A row for each number of actors, and how the time per sample changes between the fewest and the most."""
    controller_cost(options.actors[0], options.group_size, options.staleness, 1000)  # imports and caches
    rows = [
        controller_cost(num_actors, options.group_size, options.staleness, options.samples)
        for num_actors in options.actors
    ]
    return {
        "group_size": options.group_size,
        "max_staleness": options.staleness,
        "least_samples_per_s": min(row["samples_per_s"] for row in rows),
        "most_actors_over_fewest": rows[-1]["us_per_sample"] / rows[0]["us_per_sample"],
        "rows": rows,
    }


def make_parser() -> argparse.ArgumentParser:
    """Three programs, each with its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    programs = parser.add_subparsers(dest="program", required=True)
    training = programs.add_parser("train", help="throughput and reward against staleness, by training")
    training.set_defaults(run_program=run_train)
    training.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    training.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    training.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1")
    training.add_argument("--steps", type=int, default=30, help="learner steps per run")
    training.add_argument("--every", type=int, default=10, help="steps between evaluations")
    training.add_argument("--heldout", type=int, default=64, help="held-out prompts")
    training.add_argument("--actors", type=int, default=1, help="rollout actors")
    training.add_argument(
        "--address", default=None, help="a Ray cluster to join; one per run if absent, which takes longer"
    )
    training.add_argument("--out", type=Path, default=Path("runs/async"), help="where the runs are kept")
    training.add_argument("--report", type=Path, default=None, help="write REPORT.json, .md and .png")
    simulating = programs.add_parser("simulate", help="throughput and age with more actors, from a recorded run")
    simulating.set_defaults(run_program=run_simulate)
    simulating.add_argument("run", type=Path, help="a run directory")
    simulating.add_argument("--actors", type=int, nargs="+", default=[8, 64, 256, 1024])
    simulating.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4])
    simulating.add_argument("--steps", type=int, default=12, help="learner steps of each simulation")
    simulating.add_argument("--jitter", type=float, default=0.1, help="deviation of the logarithm of a chunk's time")
    simulating.add_argument("--deaths-per-hour", type=float, default=0.0, help="of each busy actor")
    simulating.add_argument("--train-factor", type=float, default=1.0, help="on the learner's recorded time")
    costing = programs.add_parser("cost", help="the controller's processor time per sample")
    costing.set_defaults(run_program=run_cost)
    costing.add_argument("--actors", type=int, nargs="+", default=[8, 32, 128, 512, 1024])
    costing.add_argument("--staleness", type=int, default=2)
    costing.add_argument("--group-size", type=int, default=12)
    costing.add_argument("--samples", type=int, default=50_000, help="at least so many for each row")
    for program in (training, simulating, costing):
        program.add_argument("--hardware", default=f"{os.cpu_count()} CPUs", help="what it runs on, in words")
        program.add_argument("--json", type=Path, default=None, help="also write the result here")
    return parser


def main() -> None:
    """Parse the arguments, run, write the report, print JSON."""
    options = make_parser().parse_args()
    found = options.run_program(options)
    data: dict[str, Any] = {
        "command": "python " + shlex.join(["benchmarks/async_runs.py", *sys.argv[1:]]),
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip(),
        "date": datetime.now(tz=UTC).date().isoformat(),
        "hardware": options.hardware,
        **found,
    }
    text = json.dumps(data, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    if getattr(options, "report", None) is not None:
        options.report.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        options.report.with_suffix(".md").write_text(markdown(data), encoding="utf-8")
        plot(data["runs"], options.report.with_suffix(".png"))


if __name__ == "__main__":
    main()
