"""Does training on noisy samples close the gap to noiseless ones, and how noisy should it be? (2510.10767)

    python benchmarks/reward_gap.py --seeds 3 --jobs 2 --out runs/reward_gap --report docs/benchmarks/reward_gap

trains `configs/reward_gap.toml` at each stochasticity eta by DDPO (every step noisy) and by MixGRPO (a sliding window
of noisy steps, the ODE elsewhere), in one process with one thread per run, `--jobs` runs at a time. Each evaluation
draws the held-out prompts by the ODE and at every eta with the same keys. Two questions are answered, with 95 %
t-intervals over seeds: by how much the gap at the trained eta narrows, and whether the ODE's reward rises with it.

An eta of 0 is no arm: its steps have no density, so these methods cannot train on it; it is what the ODE columns show.
This reproduces the direction of the paper's findings on a small task, not its numbers. Runs lie in `--out`; given
again, the command goes on where it stopped. REPORT.json, .md and .png are written, and the JSON is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from services.pictures import save_png
from services.reward_gap import GapPoint, Interval, interval, read_gaps, say_interval
from services.reward_gap_picture import Line, Panel, draw_panels

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "reward_gap.toml"
OVERRIDES: Mapping[str, Sequence[str]] = {
    "ddpo": (),
    "mix_grpo": (
        *("--algorithm", '{type = "mix_grpo", clip_range = 1e-3}', "--sampler.shared_noise", "true"),
        *("--sampler.window", '{strategy = "progressive", size = 2, advance_every = 5}'),
    ),
}
"""What an algorithm needs beside the configuration."""
_ABOUT = """What `docs/reward_gap.md` explains, measured on the glyphs task. The gap is noisy minus noiseless held-out
reward at the stochasticity that was trained at; intervals are 95 % t-intervals over seeds. An eta of 0 has no density
and cannot be trained at: it is the ODE of every evaluation. A gap narrows as it moves from where it began towards 0
and beyond. This checks the direction of arXiv 2510.10767, not its numbers."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    algorithm: str
    eta: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.algorithm}-eta{self.eta:g}-seed{self.seed}"


@dataclass(frozen=True, slots=True)
class Finished:
    """A run and the gap at its own stochasticity, evaluation by evaluation."""

    job: Job
    points: Sequence[GapPoint]
    train_s: float

    @property
    def own(self) -> list[GapPoint]:
        return [point for point in self.points if point.eta == self.job.eta]


@dataclass(frozen=True, slots=True)
class Arm:
    """One algorithm at one stochasticity: intervals over seeds. `narrowing`: how far the gap moved towards 0."""

    algorithm: str
    eta: float
    ode_before: Interval
    ode_after: Interval
    ode_gain: Interval
    gap_before: Interval
    gap_after: Interval
    narrowing: Interval


def run(job: Job, steps: int, folder: Path, extra: Sequence[str]) -> Finished:
    """Train once, or go on, or read what is there."""
    run_dir = folder / job.name
    if _status(run_dir) != "finished":
        command = [sys.executable, "-m", "services.cli", *_arguments(job, steps, run_dir, extra)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, check=False, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise SystemExit(f"{job} failed:\n{done.stdout[-3000:]}")
        print(f"{job.name} done", file=sys.stderr, flush=True)
    summary = json.loads((run_dir / "summary.json").read_text())
    return Finished(job, read_gaps(run_dir / "samples" / "reward_gap.json"), summary["train_s"])


def _arguments(job: Job, steps: int, run_dir: Path, extra: Sequence[str]) -> list[str]:
    if any((run_dir / "checkpoints").glob("step_*")):
        return ["resume", str(run_dir)]
    if run_dir.exists():
        shutil.rmtree(run_dir)  # it was broken off before its first checkpoint
    settings = ["--seed", str(job.seed), "--num_steps", str(steps), "--sampler.eta", str(job.eta)]
    return ["train", str(CONFIG), "--run-dir", str(run_dir), *settings, *OVERRIDES[job.algorithm], *extra]


def _status(run_dir: Path) -> str:
    path = run_dir / "summary.json"
    return json.loads(path.read_text())["status"] if path.exists() else ""


def arms(runs: Sequence[Finished]) -> list[Arm]:
    """Each algorithm and stochasticity over its seeds; gaps are those at the stochasticity that was trained at."""
    found: list[Arm] = []
    for algorithm, eta in dict.fromkeys((run.job.algorithm, run.job.eta) for run in runs):
        mine = [run.own for run in runs if (run.job.algorithm, run.job.eta) == (algorithm, eta)]
        before, after = [own[0] for own in mine], [own[-1] for own in mine]
        # Towards 0, whichever side of it the gap began on.
        side = 1.0 if statistics.fmean(point.gap.mean for point in before) >= 0 else -1.0
        found.append(
            Arm(
                algorithm,
                eta,
                interval([point.ode.mean for point in before]),
                interval([point.ode.mean for point in after]),
                interval([last.ode.mean - first.ode.mean for first, last in zip(before, after, strict=True)]),
                interval([point.gap.mean for point in before]),
                interval([point.gap.mean for point in after]),
                interval([side * (a.gap.mean - b.gap.mean) for a, b in zip(before, after, strict=True)]),
            )
        )
    return found


def ode_slopes(runs: Sequence[Finished]) -> dict[str, Interval]:
    """By algorithm: the ODE's final reward per unit of training stochasticity, a least-squares slope for each seed."""
    slopes: dict[str, Interval] = {}
    for algorithm in dict.fromkeys(run.job.algorithm for run in runs):
        mine = [run for run in runs if run.job.algorithm == algorithm]
        by_seed = [
            statistics.linear_regression(
                [run.job.eta for run in mine if run.job.seed == seed],
                [run.own[-1].ode.mean for run in mine if run.job.seed == seed],
            ).slope
            for seed in dict.fromkeys(run.job.seed for run in mine)
            if len({run.job.eta for run in mine if run.job.seed == seed}) > 1
        ]
        if by_seed:
            slopes[algorithm] = interval(by_seed)
    return slopes


def narrowing_by_seed(runs: Sequence[Finished]) -> Interval:
    """How much the gap narrows on average over all arms: one number for each seed."""
    return interval(
        [
            statistics.fmean(arm.narrowing.mean for arm in arms([run for run in runs if run.job.seed == seed]))
            for seed in dict.fromkeys(run.job.seed for run in runs)
        ]
    )


def panels(runs: Sequence[Finished]) -> list[Panel]:
    """The gap over steps for each algorithm, and the ODE's reward over training stochasticity."""
    drawn: list[Panel] = []
    measured = arms(runs)
    for algorithm in dict.fromkeys(arm.algorithm for arm in measured):
        lines: list[Line] = []
        for arm in (arm for arm in measured if arm.algorithm == algorithm):
            mine = [run for run in runs if (run.job.algorithm, run.job.eta) == (algorithm, arm.eta)]
            steps = [point.step for point in mine[0].own]
            gaps = [interval([run.own[place].gap.mean for run in mine]) for place in range(len(steps))]
            lines.append(Line(f"trained at eta {arm.eta:g}", list(zip(steps, gaps, strict=True))))
        drawn.append(Panel(f"{algorithm}: gap at the trained eta", "learner step", lines, zero=True))
    before = [run.own[0].ode.mean for run in runs]
    etas = sorted({run.job.eta for run in runs})
    finals = [
        Line(name, [(arm.eta, arm.ode_after) for arm in measured if arm.algorithm == name])
        for name in dict.fromkeys(arm.algorithm for arm in measured)
    ]
    base = Line("before training", [(eta, interval(before)) for eta in etas], base=True)
    return [*drawn, Panel("held-out reward by the ODE", "training eta", [*finals, base])]


def markdown(runs: Sequence[Finished], settings: Mapping[str, Any], picture: str) -> str:
    """What was found, as a page: verdicts, the table, how it was made."""
    narrowing = narrowing_by_seed(runs)
    found = _verdict(narrowing, "It narrows", "It widens")
    lines = [
        "# The reward gap over training stochasticity",
        "",
        _ABOUT,
        "",
        f"![gaps over training, and the ODE's reward over training stochasticity]({picture})",
        "",
        f"- **Does the gap narrow during training?** {found}: on average over all runs by {_cell(narrowing)}.",
    ]
    for algorithm, slope in ode_slopes(runs).items():
        lines.append(
            f"- **Does the ODE gain from higher training stochasticity under {algorithm}?** "
            f"{_verdict(slope, 'It does', 'It loses')}: {_cell(slope)} per unit of eta."
        )
    lines += [
        "",
        "| algorithm | eta | ODE before | ODE after | ODE gain | gap before | gap after | narrows by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms(runs):
        levels = [_cell(one).removeprefix("+") for one in (arm.ode_before, arm.ode_after)]
        changes = [_cell(one) for one in (arm.ode_gain, arm.gap_before, arm.gap_after, arm.narrowing)]
        lines.append(f"| {arm.algorithm} | {arm.eta:g} | {' | '.join((*levels, *changes))} |")
    seconds = statistics.median(run.train_s for run in runs)
    lines += [
        "",
        f"{len(runs)} runs of {settings['steps']} steps, {seconds:.0f} s each (median){_on(settings['hardware'])}.",
        f"Commit {settings['commit']}, {settings['date']}. Again: `{settings['command']}`",
        "",
    ]
    return "\n".join(lines)


def _verdict(one: Interval, above: str, below: str) -> str:
    if one.half_width is None:
        return "One seed cannot tell"
    return above if one.low > 0 else below if one.high < 0 else "No clear difference from 0"


def _cell(one: Interval) -> str:
    return say_interval(one).replace("+-", "±")


def _on(hardware: str) -> str:
    return f" on {hardware}" if hardware else ""


def _keep_to_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Runs of other settings must not be mixed: exit if the folder holds some."""
    path = folder / "settings.json"
    text = json.dumps(settings, sort_keys=True)
    if path.exists() and path.read_text() != text:
        raise SystemExit(f"{folder} holds runs of other settings ({path.read_text()}); choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def main() -> None:
    """Parse the arguments, run, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=tuple(OVERRIDES), choices=tuple(OVERRIDES))
    parser.add_argument("--etas", nargs="+", type=float, default=(0.5, 1.0, 1.5), help="training stochasticities")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1")
    parser.add_argument("--steps", type=int, default=20, help="policy updates per run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/reward_gap"), help="folder of the runs")
    parser.add_argument("--report", type=Path, default=None, help="write REPORT.json, REPORT.md and REPORT.png")
    parser.add_argument("--hardware", default="", help="what it runs on, in words")
    parser.add_argument("overrides", nargs="*", help="configuration overrides for every run, after --")
    arguments = parser.parse_args()
    if not all(eta > 0 for eta in arguments.etas):
        parser.error(f"--etas must be above 0: steps without noise have no density to train on, got {arguments.etas}")
    jobs = [
        Job(algorithm, eta, seed)
        for seed in range(arguments.seeds)
        for algorithm in arguments.algorithms
        for eta in arguments.etas
    ]
    _keep_to_settings(arguments.out, {"steps": arguments.steps, "overrides": arguments.overrides})
    extra = [*("--eval.etas", str(list(arguments.etas))), *arguments.overrides]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = list(pool.map(lambda job: run(job, arguments.steps, arguments.out, extra), jobs))
    settings: dict[str, Any] = {
        "command": "python " + shlex.join(sys.argv),
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip(),
        "date": datetime.now(tz=UTC).date().isoformat(),
        "hardware": arguments.hardware,
        "steps": arguments.steps,
        "overrides": arguments.overrides,
    }
    results = {
        **settings,
        "arms": [asdict(arm) for arm in arms(runs)],
        "narrowing": asdict(narrowing_by_seed(runs)),
        "ode_slopes": {name: asdict(slope) for name, slope in ode_slopes(runs).items()},
        "runs": [
            {**asdict(one.job), "train_s": one.train_s, "points": [asdict(p) for p in one.points]} for one in runs
        ],
    }
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.report is not None:
        report: Path = arguments.report
        report.parent.mkdir(parents=True, exist_ok=True)
        report.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        title = "Training on noisy samples, using noiseless ones"
        save_png(report.with_suffix(".png"), draw_panels(title, panels(runs), "bars: 95 % confidence over seeds"))
        report.with_suffix(".md").write_text(markdown(runs, settings, f"{report.name}.png"), encoding="utf-8")


if __name__ == "__main__":
    main()
