"""`raylign ablate`: one configuration trained once per kind of entropy budget and seed, and what each is worth.

    one_token   budget 0: one position per call
    fixed       the same budget for every answer
    sampled     log-normal budgets around it
    learned     budgets chosen for each prompt by the controller

Each is an ordinary run in `DIR/<variant>-seed<k>`, swept over the same budgets before and after training. Given again,
the command goes on where it stopped: finished runs stay, an interrupted one resumes from its checkpoint. After every
run `DIR/frontier.json`, `frontier.png` and `ablation.html` show what there is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from raylign.errors import ConfigError, RunDirError
from raylign.samplers.entropy_bounded import EntropyBoundedConfig
from services.ablation import (
    CONTROLLER,
    TITLES,
    SeedResult,
    at_matched_calls,
    curves,
    differences,
    in_words,
    levels,
    matched_calls,
    own_points,
    share,
    signed,
)
from services.config import RunConfig, load_run_config
from services.frontier import Estimate, FrontierPoint, Quality, mean_point, read_frontier, series_data
from services.frontier_picture import draw_frontier
from services.pictures import save_png
from services.report import inline, render
from services.run import EXIT_OK, resume_run, train_run
from services.run_checkpoints import config_sha256
from services.run_dir import RunDir, read_summary, write_atomic

DEFAULT_GAMMAS = (0.0, 0.05, 0.15, 0.4, 1.2)
"""Swept where the configuration names no `eval.gammas`: from one token per call to nearly everything at once."""

_BUDGETS: Mapping[str, Mapping[str, str]] = {
    "one_token": {"budget": "fixed", "gamma": "0.0"},
    "fixed": {"budget": "fixed"},
    "sampled": {"budget": "sampled"},
    CONTROLLER: {"budget": "learned"},
}


class Train(Protocol):
    """Runs a configuration in a directory, or goes on with it; returns the exit code."""

    def __call__(self, config: RunConfig, name: str, path: Path) -> int: ...


@dataclass(frozen=True, slots=True)
class Job:
    """One run of an ablation."""

    variant: str
    seed: int
    config: RunConfig
    path: Path


def ablate(
    config_name: str,
    overrides: Mapping[str, str],
    out: Path | None,
    variants: Sequence[str],
    num_seeds: int,
    say: Callable[[str], None],
    train: Train | None = None,
) -> int:
    """Train every variant and seed in turn and write the report; returns the exit code of the run that stopped it.

    Raises ConfigError for what cannot be ablated, RunDirError where `out` holds another ablation.
    """
    stem = Path(config_name).stem
    out = out if out is not None else Path("runs") / f"ablation-{stem}"
    jobs = plan(config_name, overrides, out, variants, num_seeds)
    _remember(jobs, out)
    page: Path | None = None
    for number, job in enumerate(jobs, start=1):
        head = f"[{number}/{len(jobs)}] {TITLES[job.variant]}, seed {job.seed}: {job.path}"
        if is_finished(job.path):
            say(f"{head}  (finished before)")
            continue
        say(head)
        code = (train or go)(job.config, stem, job.path)
        if code != EXIT_OK or read_summary(job.path / "summary.json").get("status") == "stopped":
            say(f"stopped at {job.path}; the same command goes on from there")
            return code
        page = write_ablation(jobs, out)
    for sentence in in_words(*read_results(jobs)):
        say(sentence.replace("±", "+/-"))  # a log may be ASCII
    say(f"Report: {page or write_ablation(jobs, out)}")
    return EXIT_OK


def plan(
    config_name: str, overrides: Mapping[str, str], out: Path, variants: Sequence[str], num_seeds: int
) -> list[Job]:
    """The runs, seed by seed, so that an interrupted ablation compares all variants on the seeds it has."""
    unknown = [variant for variant in variants if variant not in _BUDGETS]
    if unknown or not variants:
        raise ConfigError(f"no ablation variant called {''.join(unknown[:1])!r}; known: {', '.join(_BUDGETS)}")
    if num_seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {num_seeds}")
    given = load_run_config(config_name, overrides)
    for name, sampler in (("sampler", given.sampler), ("eval.sampler", given.eval.sampler or given.sampler)):
        if not isinstance(sampler, EntropyBoundedConfig):
            raise ConfigError(
                f"an ablation compares entropy budgets, which {name} {sampler.type!r} has not; set "
                f"{name}.type = 'entropy_bounded'"
            )
    if given.prompts.heldout is None:
        raise ConfigError("an ablation is judged on held-out prompts; set prompts.heldout")
    jobs: list[Job] = []
    for seed in range(given.seed, given.seed + num_seeds):
        for variant in dict.fromkeys(variants):
            changes = {**overrides, **_changes(given, variant), "seed": str(seed)}
            jobs.append(Job(variant, seed, load_run_config(config_name, changes), out / f"{variant}-seed{seed}"))
    return jobs


def is_finished(path: Path) -> bool:
    """Whether a run came to its end and was swept there."""
    if read_summary(path / "summary.json").get("status") != "finished":
        return False
    return "after" in read_frontier(RunDir(path).samples / "frontier.json")[1]


def go(config: RunConfig, name: str, path: Path) -> int:
    """Train in a new directory, or go on from the checkpoint that is there."""
    if any(RunDir(path).checkpoints.glob("step_*")):
        return resume_run(path, None)
    return train_run(config, name, path, None)


def read_results(jobs: Sequence[Job]) -> tuple[list[SeedResult], Quality]:
    """What the finished runs measured."""
    results: list[SeedResult] = []
    quality: Quality = "exact"
    for job in jobs:
        if is_finished(job.path):
            quality, series = read_frontier(RunDir(job.path).samples / "frontier.json")
            if "before" not in series:
                raise RunDirError(f"{job.path} was not swept before training; delete that folder to run it again")
            results.append(SeedResult(job.variant, job.seed, series["before"], series["after"]))
    return results, quality


def write_ablation(jobs: Sequence[Job], out: Path) -> Path:
    """Write `frontier.json`, `frontier.png` and `ablation.html` of the runs that are finished; returns the page."""
    results, quality = read_results(jobs)
    runs = [
        {"variant": one.variant, "seed": one.seed, "before": series_data(one.before), "after": series_data(one.after)}
        for one in results
    ]
    everything = {"quality": quality, "runs": runs}
    write_atomic(out / "frontier.json", json.dumps(everything, indent=1, allow_nan=False).encode() + b"\n")
    drawn = curves(results)
    if drawn:
        save_png(out / "frontier.png", draw_frontier(drawn, quality, "What each way of choosing budgets gives"))
    calls = matched_calls(results)
    page = render(
        "ablation.html",
        title=out.resolve().name,
        status=f"{len(results)} of {len(jobs)} runs",
        words=in_words(results, quality),
        quality="solved exactly" if quality == "exact" else "reward",
        frontier=inline(out / "frontier.png"),
        variants=_variant_rows(results, quality),
        differences=[
            {
                "against": TITLES.get(one.against, one.against),
                "mean": signed(one.mean, quality),
                "by_seed": ", ".join(f"seed {seed}: {signed(value, quality)}" for seed, value in one.by_seed.items()),
                "unreached": one.unreached,
            }
            for one in differences(results)
        ],
        calls=[f"{nfe:.2f}" for nfe in calls],
        matched=[
            (TITLES.get(name, "before training"), [_estimate(one, quality) for one in row])
            for name, row in at_matched_calls(results, calls).items()
        ],
        level_variants=[variant for variant in TITLES if own_points(results, variant)],
        levels=levels(results),
        titles=TITLES,
        share=lambda value: share(value, quality),
        runs=[(job.path.name, "finished" if is_finished(job.path) else "not finished") for job in jobs],
        out=out.resolve(),
        written=time.strftime("%Y-%m-%d %H:%M:%S %z"),
    )
    path = out / "ablation.html"
    write_atomic(path, page.encode())
    return path


def _changes(given: RunConfig, variant: str) -> dict[str, str]:
    """The overrides that make a configuration one of the variants; of the evaluation's sampler too, if it has one."""
    samplers = ["sampler"] if given.eval.sampler is None else ["sampler", "eval.sampler"]
    changes = {f"{sampler}.{key}": value for sampler in samplers for key, value in _BUDGETS[variant].items()}
    changes["model.budget_head"] = str(variant == CONTROLLER).lower()
    if not given.eval.gammas:
        changes["eval.gammas"] = str(list(DEFAULT_GAMMAS))
    return changes


def _remember(jobs: Sequence[Job], out: Path) -> None:
    """Record what each folder is for. Raises RunDirError where it is for something else already."""
    path = out / "plan.json"
    known: dict[str, str] = json.loads(path.read_bytes()) if path.exists() else {}
    for job in jobs:
        sha256 = config_sha256(job.config)
        if job.path.exists() and known.get(job.path.name) != sha256:
            raise RunDirError(
                f"{job.path} was made with another configuration; choose another --out, or delete that folder"
            )
        known[job.path.name] = sha256
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(known, indent=1).encode() + b"\n")


def _variant_rows(results: Sequence[SeedResult], quality: Quality) -> list[dict[str, str]]:
    """Each variant at its operating point, the mean of its seeds with their range."""
    rows: list[dict[str, str]] = []
    for variant in TITLES:
        points = own_points(results, variant)
        if points:
            mean = mean_point(points)
            rows.append(
                {
                    "name": TITLES[variant],
                    "accuracy": share(mean.accuracy, quality),
                    "accuracy_range": _range([share(one.accuracy, quality) for one in _by_accuracy(points)]),
                    "nfe": f"{mean.nfe:.2f}",
                    "nfe_range": _range([f"{value:.2f}" for value in sorted(one.nfe for one in points)]),
                    "gamma": "" if mean.gamma is None else f"{mean.gamma:.3g}",
                    "seeds": str(len(points)),
                }
            )
    return rows


def _by_accuracy(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    return sorted(points, key=lambda one: one.accuracy)


def _range(ordered: Sequence[str]) -> str:
    return f"{ordered[0]} – {ordered[-1]}" if len(ordered) > 1 else ""


def _estimate(estimate: Estimate | None, quality: Quality) -> str:
    if estimate is None:
        return "–"
    error = "" if estimate.error is None else f" ± {share(estimate.error, quality).removesuffix(' %')}"
    return f"{share(estimate.value, quality)}{error}"
