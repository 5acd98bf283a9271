"""Does exploring with cheap drafts reach a reward in less time than drawing every picture at full quality?

    python benchmarks/explore.py --seeds 3 --report docs/benchmarks/explore

trains the glyphs task (`quickstart_image` with `benchmarks/explore.toml` over it) in these arms, from the same base
model, on the same prompts, 24 pictures per prompt trained on each time:

    plain_24        24 drawn, 24 trained on
    plain_24_of_96  96 drawn at full quality, 24 selected: the same selection without drafts
    drafts_as_data  96 drawn in the drafts' few steps, 24 selected and trained on as they are
    explore         96 drafts, 24 selected, drawn again at full quality and scored again

Reported apart, as the paper does (Sol-RL, 2604.06916): what a step costs, how many steps the wanted held-out reward
takes, and their product, the time to reach it. Beside them stands the floor: the time of a step if drafts, selection
and dispatch cost nothing but their forwards, decodes and rewards, from the phases measured in the same runs, and the
number of steps that exploring would have to save for a given ratio. Every run takes one thread; `--jobs` of them go at
a time, seed by seed, on a machine that should be idle otherwise. REPORT.json, .md and .png are written; runs that lie
in `--out` are not repeated.
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
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from learning_curves import ROOT, crossing, held_out_curve, pyplot, reached, spread, step_rows, train_once

GROUP, GROUPS, POOL, STEPS = 24, 4, 96, 10
WANTED = 0.85
"""Held-out OCR similarity that arms are raced to; the base model has about .45."""
WANTED_RATIO = 0.6
"""Time of exploring over time of plain training, as hoped for."""


def arms(options: argparse.Namespace) -> dict[str, list[str]]:
    """What each arm changes."""
    pool = ["--rollout.explore.pool_size", str(options.pool)]
    whole_pool = [*pool, "--rollout.explore.regenerate", "false"]
    drafts = [*pool, "--rollout.explore.num_steps", str(options.draft_steps)]
    return {
        "plain_24": [],
        "plain_24_of_96": whole_pool,
        "drafts_as_data": [*whole_pool, "--sampler.num_steps", str(options.draft_steps)],
        "explore": drafts,
    }


def train(arm: str, seed: int, changes: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """One run, or what is left of it, as a row of the report."""
    run_dir = options.out / f"{arm}-{seed}"
    arguments = ["quickstart_image", str(ROOT / "benchmarks" / "explore.toml"), "--seed", str(seed)]
    arguments += ["--num_steps", str(options.steps), "--eval.every_steps", str(options.every), *changes]
    train_once(arguments, run_dir)
    curve = held_out_curve(run_dir, GROUP * GROUPS)
    steps = step_rows(run_dir)
    phases = {
        name: statistics.median(row[name] for row in steps.values())
        for name in next(iter(steps.values()))
        if name.startswith(("busy/", "time/", "explore/"))
    }
    return {
        "arm": arm,
        "seed": seed,
        "curve": curve,
        "step_s": statistics.median(row["time/step_s"] - row.get("time/evaluate_s", 0.0) for row in steps.values()),
        "phases": phases,
        "steps_to_wanted": crossing(curve, "step", WANTED),
        "seconds_to_wanted": crossing(curve, "seconds", WANTED),
        "samples_to_wanted": crossing(curve, "samples", WANTED),
    }


def floor(runs: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> dict[str, float]:
    """Seconds of an exploring step from the unit costs of the plain arms: forwards, decodes, rewards and training.

    The plain arm gives what training, publishing and evaluating-free bookkeeping take; the arm that draws the whole
    pool at full quality gives the unit costs, as it has most samples to divide by.
    """
    plain, pool = (_phases(runs, arm) for arm in ("plain_24", "plain_24_of_96"))
    drawn = GROUPS * options.pool
    forward_s, decode_s = pool["busy/sample_s"] / (drawn * STEPS), pool["busy/decode_s"] / drawn
    # Rewards of several groups are waited for at once, so their busy seconds overlap; the wall knows what they add.
    reward_s = max(0.0, pool["time/rollout_s"] - pool["busy/sample_s"] - pool["busy/decode_s"]) / drawn
    plain_s = statistics.median(run["step_s"] for run in runs if run["arm"] == "plain_24")
    rollout_s = GROUPS * GROUP * (STEPS * forward_s + decode_s + reward_s)
    draft_s = drawn * (options.draft_steps * forward_s + decode_s + reward_s)
    return {
        "forward_ms": 1e3 * forward_s,
        "decode_ms": 1e3 * decode_s,
        "reward_ms": 1e3 * reward_s,
        "train_s": plain["time/train_s"],
        "plain_step_s": plain_s,
        "regenerate_s": rollout_s,
        "draft_s": draft_s,
        "explore_step_s": plain_s + draft_s,
        "step_ratio": (plain_s + draft_s) / plain_s,
        "steps_ratio_needed": WANTED_RATIO * plain_s / (plain_s + draft_s),
    }


def _phases(runs: Sequence[Mapping[str, Any]], arm: str) -> dict[str, float]:
    mine = [run["phases"] for run in runs if run["arm"] == arm]
    return {name: statistics.median(phases[name] for phases in mine) for name in mine[0]}


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Each arm's step, steps to the wanted reward and time to it, as ratios to plain training of the same seed."""
    plain = {run["seed"]: run for run in runs if run["arm"] == "plain_24"}
    return {
        arm: {
            name: _ratio([(run[name], plain[run["seed"]][name]) for run in runs if run["arm"] == arm])
            for name in ("step_s", "steps_to_wanted", "seconds_to_wanted")
        }
        for arm in dict.fromkeys(run["arm"] for run in runs)
    }


def _ratio(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    """Median ratio; None where a run never arrived."""
    if any(one is None or base is None for one, base in pairs):
        return None
    return statistics.median(one / base for one, base in pairs if one is not None and base is not None)


def report(data: Mapping[str, Any]) -> str:
    """The tables, as Markdown."""
    runs, ratios = data["runs"], data["ratios"]
    about = (
        f"`{data['command']}`, {data['date']}, commit {data['commit']}, {data['hardware']}. Medians over seeds with "
        f"the lowest and highest; held-out OCR similarity, wanted {WANTED}. `×` is the ratio to `plain_24`, seed by "
        "seed."
    )
    titles = ["arm", "drawn per step", "step s", "×", "steps to wanted", "×", "seconds to wanted", "×"]
    titles += ["last held-out", "diversity"]
    lines = ["# Exploring with drafts on the glyphs task", "", about, ""]
    lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for arm, ratio in ratios.items():
        mine = [run for run in runs if run["arm"] == arm]
        drawn = GROUPS * (GROUP if arm == "plain_24" else data["pool"])
        again = f" + {GROUPS * GROUP}" if arm == "explore" else ""
        cells = [f"{drawn}{again}", spread([run["step_s"] for run in mine], 1), _times(ratio["step_s"])]
        for name in ("steps_to_wanted", "seconds_to_wanted"):
            cells += [reached([run[name] for run in mine]), _times(ratio[name])]
        cells += [spread([run["curve"][-1][name] for run in mine]) for name in ("mean", "diversity")]
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    bound = data["floor"]
    least = (
        f"One forward of one picture takes {bound['forward_ms']:.2f} ms, its decoding {bound['decode_ms']:.2f} ms and "
        f"its reward {bound['reward_ms']:.2f} ms; a plain step takes {bound['plain_step_s']:.1f} s, of which "
        f"{bound['train_s']:.1f} s train. {GROUPS} x {data['pool']} drafts of {data['draft_steps']} steps cannot take "
        f"less than {bound['draft_s']:.1f} s, so an exploring step costs at least **{bound['step_ratio']:.2f}** plain "
        f"ones, and to reach the wanted reward in {WANTED_RATIO} of the time it would need "
        f"**{bound['steps_ratio_needed']:.2f}** of the steps."
    )
    lines += ["", f"**The floor.** {least}", ""]
    drafts = [run["phases"] for run in runs if run["arm"] == "explore"]
    names = [name for name in drafts[0] if name.startswith("explore/")]
    lines += [
        "Drafts against their regenerations in the runs (medians): "
        + ", ".join(f"{n.removeprefix('explore/')} {statistics.median(d[n] for d in drafts):.2f}" for n in names)
        + ".",
        "",
    ]
    return "\n".join(lines)


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def plot(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out reward over steps, samples trained on being equal, and over seconds."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True)
    colours = dict(zip(dict.fromkeys(run["arm"] for run in runs), plt.get_cmap("tab10").colors, strict=False))
    for axis, (name, label) in zip(axes, (("step", "learner steps"), ("seconds", "seconds of training")), strict=True):
        for run in runs:
            points = run["curve"]
            axis.plot(
                [point[name] for point in points],
                [point["mean"] for point in points],
                color=colours[run["arm"]],
                label=run["arm"] if run["seed"] == 0 else None,
            )
        axis.axhline(WANTED, color="grey", linewidth=0.8, linestyle=":")
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("held-out OCR similarity")
    axes[0].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Parse the arguments, run, write the report, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1")
    parser.add_argument("--steps", type=int, default=10, help="learner steps per run")
    parser.add_argument("--every", type=int, default=2, help="steps between evaluations")
    parser.add_argument("--pool", type=int, default=POOL, help="candidates per prompt (N)")
    parser.add_argument("--draft-steps", type=int, default=5, help="denoising steps of a draft (T), of 10")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/explore"), help="where the runs are kept")
    parser.add_argument("--report", type=Path, default=None, help="write REPORT.json, .md and .png")
    parser.add_argument("--hardware", default=f"{os.cpu_count()} CPUs", help="what it runs on, in words")
    options = parser.parse_args()
    jobs = [(arm, seed, changes) for seed in range(options.seeds) for arm, changes in arms(options).items()]
    with ThreadPoolExecutor(options.jobs) as pool:
        started = [pool.submit(train, arm, seed, changes, options) for arm, seed, changes in jobs]
        runs = [run.result() for run in started]
    data = {
        "command": "python " + shlex.join(["benchmarks/explore.py", *sys.argv[1:]]),
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip(),
        "date": datetime.now(tz=UTC).date().isoformat(),
        "hardware": options.hardware,
        "pool": options.pool,
        "draft_steps": options.draft_steps,
        "wanted": WANTED,
        "ratios": summary(runs),
        "floor": floor(runs, options),
        "runs": runs,
    }
    text = json.dumps(data, indent=1)
    print(text)
    if options.report is not None:
        options.report.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        options.report.with_suffix(".md").write_text(report(data), encoding="utf-8")
        plot(runs, options.report.with_suffix(".png"))


if __name__ == "__main__":
    main()
