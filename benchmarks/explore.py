"""Does exploring with cheap drafts reach a reward in less time than drawing every picture at full quality?

    python benchmarks/explore.py --seeds 3 --report docs/benchmarks/explore

trains the glyphs task (`quickstart_image` with `benchmarks/explore.toml` over it) in these arms, from the same base
model, on the same prompts, 24 pictures per prompt trained on each time:

    plain_24        24 drawn, 24 trained on
    plain_24_of_96  96 drawn at full quality, 24 selected: the same selection without drafts
    drafts_as_data  96 drawn in the drafts' few steps, 24 selected and trained on as they are
    explore         96 drafts, 24 selected, drawn again at full quality and scored again

Reported apart, as the paper does (Sol-RL, 2604.06916): how many steps the wanted held-out reward takes, what a step
costs, and their product, the time to reach it. `--jobs` runs go at a time, one thread each. What a step costs is the
least of an arm's steps, over all its runs, the first of each left out: a machine that does other things beside makes
steps longer, never shorter. Beside them stands what bounds the ratio: the time of an exploring step if selection and
dispatch cost nothing, by the unit costs of the plain arms, and the steps it would have to save for a given ratio.
REPORT.json, .md and .png are written; runs that lie in `--out` are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from learning_curves import ROOT, crossing, held_out_curve, provenance, pyplot, reached, spread, step_rows, train_once

GROUP, GROUPS, POOL, STEPS = 24, 4, 96, 10
WANTED = 0.93
"""Held-out OCR similarity that arms are raced to; the base model has about .65 in ten steps."""
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


def race(arm: str, seed: int, changes: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """One run, or what is left of it, as a row of the report."""
    run_dir = options.out / f"{arm}-{seed}"
    arguments = ["quickstart_image", str(ROOT / "benchmarks" / "explore.toml"), "--seed", str(seed)]
    arguments += ["--num_steps", str(options.steps), "--eval.every_steps", str(options.every), *changes]
    train_once(arguments, run_dir)
    curve = held_out_curve(run_dir, GROUP * GROUPS)
    steps = step_rows(run_dir).values()
    names = [name for name in next(iter(steps)) if name.startswith("explore/")]
    return {
        "arm": arm,
        "seed": seed,
        "curve": curve,
        "drafts": {name: statistics.median(row[name] for row in steps if name in row) for name in names},
        "steps_to_wanted": crossing(curve, "step", WANTED),
    }


def clock(arm: str, options: argparse.Namespace) -> dict[str, float]:
    """The least step of an arm: its seconds and those of its phases; and the median of all its steps."""
    rows = [
        row
        for seed in range(options.seeds)
        for step, row in step_rows(options.out / f"{arm}-{seed}").items()
        if step > 1
    ]
    spent = [row["time/step_s"] - row.get("time/evaluate_s", 0.0) for row in rows]
    least = rows[spent.index(min(spent))]
    phases = {name: value for name, value in least.items() if name.startswith(("busy/", "time/"))}
    return {**phases, "step_s": min(spent), "step_median_s": statistics.median(spent)}


def bounds(clocks: Mapping[str, Mapping[str, float]], options: argparse.Namespace) -> dict[str, float]:
    """Seconds of an exploring step from the unit costs of the plain arms: forwards, decodes, rewards and training.

    The arm that draws the whole pool at full quality gives the unit costs, as it has most samples to divide by.
    """
    plain, pool = clocks["plain_24"], clocks["plain_24_of_96"]
    drawn = GROUPS * options.pool
    forward_s, decode_s = pool["busy/sample_s"] / (drawn * STEPS), pool["busy/decode_s"] / drawn
    # Rewards of several groups are waited for at once, so their busy seconds overlap; the wall knows what they add.
    reward_s = max(0.0, pool["time/rollout_s"] - pool["busy/sample_s"] - pool["busy/decode_s"]) / drawn
    draft_s = drawn * (options.draft_steps * forward_s + decode_s + reward_s)
    explore_s = plain["step_s"] + draft_s
    return {
        "forward_ms": 1e3 * forward_s,
        "decode_ms": 1e3 * decode_s,
        "reward_ms": 1e3 * reward_s,
        "train_s": plain["time/train_s"],
        "plain_step_s": plain["step_s"],
        "draft_s": draft_s,
        "explore_step_s": explore_s,
        "step_ratio": explore_s / plain["step_s"],
        "steps_ratio_needed": WANTED_RATIO * plain["step_s"] / explore_s,
    }


def summary(
    runs: Sequence[Mapping[str, Any]], clocks: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float | None]]:
    """Each arm's steps to the wanted reward, step and time as ratios to plain training; steps seed by seed."""
    plain = {run["seed"]: run for run in runs if run["arm"] == "plain_24"}
    ratios: dict[str, dict[str, float | None]] = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm]
        steps = _ratio([(run["steps_to_wanted"], plain[run["seed"]]["steps_to_wanted"]) for run in mine])
        step = clocks[arm]["step_s"] / clocks["plain_24"]["step_s"]
        ratios[arm] = {"steps": steps, "step_s": step, "seconds": None if steps is None else steps * step}
    return ratios


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
        f"the lowest and highest; held-out OCR similarity, wanted {WANTED}. `×` is the ratio to `plain_24`, of steps "
        "seed by seed."
    )
    titles = ["arm", "drawn per step", "steps to wanted", "×", "least step s", "×", "time to wanted ×"]
    titles += ["last held-out", "diversity"]
    lines = ["# Exploring with drafts on the glyphs task", "", about, ""]
    lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for arm, ratio in ratios.items():
        mine = [run for run in runs if run["arm"] == arm]
        drawn = GROUPS * (GROUP if arm == "plain_24" else data["pool"])
        again = f" + {GROUPS * GROUP}" if arm == "explore" else ""
        spent = data["clocks"][arm]
        cells = [f"{drawn}{again}", reached([run["steps_to_wanted"] for run in mine], 1), _times(ratio["steps"])]
        cells += [f"{spent['step_s']:.1f}", _times(ratio["step_s"]), _times(ratio["seconds"])]
        cells += [spread([run["curve"][-1][name] for run in mine]) for name in ("mean", "diversity")]
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    bound = data["bounds"]
    steps = _times(ratios["explore"]["steps"])
    bill = (
        f"One forward of one picture takes {bound['forward_ms']:.2f} ms, its decoding {bound['decode_ms']:.2f} ms and "
        f"its reward {bound['reward_ms']:.2f} ms; a plain step takes {bound['plain_step_s']:.1f} s, of which "
        f"{bound['train_s']:.1f} s train. By these unit costs {GROUPS} x {data['pool']} drafts of "
        f"{data['draft_steps']} steps add {bound['draft_s']:.1f} s, so an exploring step comes to "
        f"**{bound['step_ratio']:.2f}** plain ones (measured {_times(ratios['explore']['step_s'])}), and would have to "
        f"reach the wanted reward in **{bound['steps_ratio_needed']:.2f}** of the steps to take {WANTED_RATIO} of the "
        f"time. Drafts that cost nothing at all would have to in {WANTED_RATIO} of them; measured: {steps}."
    )
    lines += ["", f"**What bounds it.** {bill}", ""]
    drafts = [run["drafts"] for run in runs if run["arm"] == "explore"]
    names = list(drafts[0])
    lines += [
        "Drafts against their regenerations in the runs (medians): "
        + ", ".join(f"{n.removeprefix('explore/')} {statistics.median(d[n] for d in drafts):.2f}" for n in names)
        + ".",
        "",
    ]
    return "\n".join(lines)


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def plot(runs: Sequence[Mapping[str, Any]], clocks: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Held-out reward, means over seeds and each seed, over steps and over what they cost by the clock."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True)
    arms_seen = list(dict.fromkeys(run["arm"] for run in runs))
    colours = dict(zip(arms_seen, plt.get_cmap("tab10").colors, strict=False))
    for axis, label in zip(axes, ("learner steps", "seconds of training"), strict=True):
        for arm in arms_seen:
            cost = clocks[arm]["step_s"] if axis is axes[1] else 1.0
            curves = [run["curve"] for run in runs if run["arm"] == arm]
            across = [point["step"] * cost for point in curves[0]]
            for curve in curves:
                axis.plot(across, [point["mean"] for point in curve], color=colours[arm], alpha=0.3, linewidth=0.8)
            middle = [statistics.fmean(point["mean"] for point in points) for points in zip(*curves, strict=True)]
            axis.plot(across, middle, color=colours[arm], linewidth=2.0, label=arm)
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
        started = [pool.submit(race, arm, seed, changes, options) for arm, seed, changes in jobs]
        runs = [run.result() for run in started]
    clocks = {arm: clock(arm, options) for arm in arms(options)}
    data = {
        **provenance(__file__, options.hardware),
        "pool": options.pool,
        "draft_steps": options.draft_steps,
        "wanted": WANTED,
        "ratios": summary(runs, clocks),
        "bounds": bounds(clocks, options),
        "clocks": clocks,
        "runs": runs,
    }
    text = json.dumps(data, indent=1)
    print(text)
    if options.report is not None:
        options.report.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        options.report.with_suffix(".md").write_text(report(data), encoding="utf-8")
        plot(runs, clocks, options.report.with_suffix(".png"))


if __name__ == "__main__":
    main()
