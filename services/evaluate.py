"""`raylign evaluate`: held-out rewards of a run or a model, in this process.

Texts are drawn as in the run's evaluation, and at each of `eval.gammas`. Pictures by the ODE and noisily: at each of
`eval.etas`, or else as the run's rollouts are, or else by gDDIM at 1; each noisy way is compared with the ODE of as
many steps (`services/reward_gap.py`). A run's pictures can be drawn at RLG weights as well (`raylign/models/rlg.py`).
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from learner.checkpoint import latest_checkpoint, read_manifest
from raylign.assets import resolve
from raylign.config import load_config, parse_config
from raylign.errors import ConfigError
from raylign.models import load_policy
from raylign.models.rlg import RlgPolicy, check_rlg_weight
from raylign.models.swapping import clone_tensors
from raylign.samplers.base import SdeSamplerConfig
from raylign.samplers.gddim import GddimConfig
from raylign.types import Needs, RolloutGroup
from raylign.weights import WeightSnapshot, make_snapshot
from rewards import RewardMix, make_mix
from rewards.scenes.rules import geneval_accuracy
from rollout.drawn import AS_CONFIGURED, WEIGHTS_OF, EvalPoint, Slot
from rollout.engine import RolloutEngine, chunk_requests
from rollout.images import sampler_at
from rollout.prompts import GroupTask, load_prompts
from services.assembly import adapter_seed, evaluation_sampler, sampler_setup
from services.config import RunConfig, load_run_config
from services.export import trained_tensors
from services.pictures import Caption, grid, save_png
from services.reward_gap import GapPoint, Interval, interval, ode_of, paired_gap, point_name, prompt_means, say_interval
from services.reward_gap_picture import draw_panels, evaluation_panels
from services.run_dir import RunDir
from services.scoring import score_groups
from services.step_metrics import eval_metrics

GAP, GAP_CI95 = "gap", "gap_ci95"
_GAP_ROW = "gap to the ODE"
_NOISY: Slot = "rollout"
"""The slot that holds the run's own stochastic sampler here."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way of drawing the held-out prompts: a column of the table. `rlg`: that weight, by the ODE."""

    name: str
    slot: Slot = "eval"
    point: EvalPoint = AS_CONFIGURED
    rlg: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a way: the column's numbers, each prompt's mean reward, and the gap to the ODE if it is noisy."""

    way: Way
    metrics: Mapping[str, float]
    means: Mapping[str, float]
    num_steps: int
    gap: Interval | None = None

    @property
    def column(self) -> dict[str, float]:
        """The numbers with the gap's among them."""
        column = dict(self.metrics)
        if self.gap is not None:
            column[GAP] = self.gap.mean
            if self.gap.half_width is not None:
                column[GAP_CI95] = self.gap.half_width
        return column


def evaluate_target(
    target: Path,
    config_name: str | None,
    overrides: Mapping[str, str],
    pictures: Path | None = None,
    rlg: Sequence[float] = (),
    plot: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Score the held-out prompts of a configuration with a run's newest weights, or with a model's own.

    Prints a table, then the same as one JSON line; returns it. `rlg` are weights to draw pictures at. Writes grids of
    the pictures and the plot of the gap where they are asked for. Raises RaylignError for what does not fit.
    """
    is_run = (target / "config.toml").is_file()
    if config_name is not None or not is_run:
        config = load_run_config(config_name or "quickstart_image", overrides)
    else:
        config = load_config(RunConfig, target / "config.toml", overrides)
    if config.prompts.heldout is None:
        raise ConfigError("evaluate needs held-out prompts; set prompts.heldout in the configuration")
    _check_options(config, is_run, pictures, rlg, plot)
    snapshot = None
    if is_run:
        tensors = trained_tensors(target)
        manifest = read_manifest(latest_checkpoint(RunDir(target).checkpoints) or target)
        kind = "adapter" if config.model.tuning == "lora" else "full"
        snapshot = make_snapshot(tensors, manifest.step, kind, config.model.lora.scale)
    else:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(target)})})
    outcomes = _evaluate(config, snapshot, evaluation_ways(config, rlg), pictures)
    results = {outcome.way.name: outcome.column for outcome in outcomes}
    _print_table(outcomes)
    if plot is not None:
        _save_plot(plot, outcomes, f"Held-out rewards of {target.name}")
    sys.stdout.write(json.dumps(results) + "\n")
    return results


def evaluation_ways(config: RunConfig, rlg: Sequence[float] = ()) -> list[Way]:
    """The columns, in order; of pictures, all of one number of steps before those of the next."""
    if config.modality == "text":
        sampler = evaluation_sampler(config)
        points = [Way(f"gamma_{point.gamma:g}", point=point) for point in config.eval_points]
        return [Way(sampler.type), *points]
    own_steps = evaluation_sampler(config).num_steps
    noisy = _own_noisy_sampler(config)
    etas = config.eval.etas or _constant_eta(noisy)
    ways: list[Way] = []
    for steps in config.eval.eta_steps or (own_steps,):
        changed = None if steps == own_steps else steps
        ode = EvalPoint(num_steps=changed)
        ways.append(Way(point_name(ode), point=ode))
        points = [EvalPoint(eta=eta, num_steps=changed) for eta in etas if eta > 0 and steps > 1]
        ways += [Way(point_name(point), point=point) for point in points]
        ending = point_name(ode).removeprefix("ode")
        if not etas and steps > 1:
            ways.append(Way(noisy.type + ending, _NOISY, ode))
        ways += [Way(f"rlg_{weight:g}{ending}", point=ode, rlg=weight) for weight in rlg]
    return list({way.name: way for way in ways}.values())


def geneval_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """GenEval's own figures for each reward that tells them: share of right pictures by tag, and the mean over tags."""
    told: dict[str, list[Mapping[str, object]]] = {}
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        for score in rollout.reward.scores if rollout.reward is not None else ():
            if {"tag", "official", "strict"} <= score.details.keys():
                told.setdefault(score.name, []).append(score.details)
    metrics: dict[str, float] = {}
    for name, details in told.items():
        accuracy = geneval_accuracy(details)["official"]
        metrics |= {f"{name}/accuracy/{tag}": share for tag, share in accuracy.by_tag.items()}
        metrics[f"{name}/accuracy"] = accuracy.overall
    return metrics


def _check_options(
    config: RunConfig, is_run: bool, pictures: Path | None, rlg: Sequence[float], plot: Path | None
) -> None:
    if config.modality == "text":
        for option, given in (("pictures", pictures), ("rlg", rlg), ("plot", plot)):
            if given:
                raise ConfigError(f"--{option} was given, but this model writes texts; leave it out")
    if rlg and not is_run:
        raise ConfigError(
            "--rlg mixes the model before training with the one after, and the target is a model alone; give the "
            "folder of a run"
        )
    for weight in rlg:
        check_rlg_weight(weight)
    if plot is not None and not any(way.point.eta or way.rlg is not None for way in evaluation_ways(config, rlg)):
        raise ConfigError("--plot draws rewards over stochasticity or RLG weight; give --etas or --rlg as well")


def _evaluate(
    config: RunConfig, snapshot: WeightSnapshot | None, ways: Sequence[Way], pictures: Path | None
) -> list[Outcome]:
    torch.set_num_threads(config.rollout.num_threads)
    policy = load_policy(config.model, "rollout", seed=adapter_seed(config))
    weights = snapshot or policy.export_weights(0)
    prompts = load_prompts(resolve(str(config.prompts.heldout)), config.prompts.fields)[: config.eval.num_prompts]
    tasks = [GroupTask(prompt, -1, place) for place, prompt in enumerate(prompts)]
    scorer = make_mix(config.rewards)
    setups = {"eval": sampler_setup(policy, evaluation_sampler(config), Needs.FINAL)}
    if any(way.slot == _NOISY for way in ways):
        setups[_NOISY] = sampler_setup(policy, _own_noisy_sampler(config), Needs.FINAL)
    # Version 0, as the run began, before its newest weights take its place.
    base = clone_tensors(policy) if any(way.rlg is not None for way in ways) else {}
    outcomes: list[Outcome] = []
    for way in ways:
        drawn_by: Any = policy if way.rlg is None else RlgPolicy(policy, base, way.rlg)  # type: ignore[arg-type]
        engine: RolloutEngine[Any] = RolloutEngine(drawn_by, setups, config.seed)  # type: ignore[arg-type]
        engine.pull(weights, WEIGHTS_OF[way.slot])
        groups = asyncio.run(_score_all(engine, scorer, tasks, config.eval.samples_per_prompt, way))
        outcomes.append(_outcome(way, groups, outcomes))
        if pictures is not None:
            _save_pictures(pictures.with_stem(f"{pictures.stem}_{way.name}"), groups)
    return outcomes


def _outcome(way: Way, groups: Sequence[RolloutGroup], before: Sequence[Outcome]) -> Outcome:
    """What came of a way, compared with the ODE of as many steps among those `before` it."""
    metrics = {key.removeprefix("eval/"): value for key, value in eval_metrics(groups).items()}
    metrics |= geneval_metrics(groups)
    means = prompt_means(groups)
    gap, num_steps = None, 0
    if groups[0].texts is None:
        num_steps = len(groups[0].latents.sigmas_S1) - 1
        if way.slot == _NOISY or way.point.eta is not None:
            gap = paired_gap(means, next(one.means for one in before if one.way.name == _ode_name(way)))
    return Outcome(way, metrics, means, num_steps, gap)


def _own_noisy_sampler(config: RunConfig) -> Any:
    """The rollouts' sampler if its steps have a density, else gDDIM at 1, on the evaluation's noise levels.

    Noise comes in every step that can have it: windows and noise that siblings share are there for training.
    """
    ode, own = evaluation_sampler(config), config.sampler
    num_steps = max(2, ode.num_steps)  # an SDE has at least one step before the last
    if not isinstance(own, SdeSamplerConfig) or not own.has_density:
        return sampler_at(ode, EvalPoint(eta=1.0, num_steps=num_steps))
    kept = own.model_dump(exclude={"window", "shared_noise", "halve_last_level"})
    same = {"num_steps": num_steps, "guidance_scale": ode.guidance_scale, "shift": ode.shift}
    return parse_config(type(own), kept | same, "the run's sampler")


def _constant_eta(sampler: Any) -> tuple[float, ...]:
    """The stochasticity of all steps, where there is one."""
    return (sampler.eta,) if isinstance(sampler, GddimConfig) and sampler.eta_end is None else ()


async def _score_all(
    engine: RolloutEngine[Any], scorer: RewardMix, tasks: Sequence[GroupTask], samples: int, way: Way
) -> list[RolloutGroup]:
    groups: list[RolloutGroup] = []
    requests = [replace(request, point=way.point) for request in chunk_requests(tasks, samples, samples * 4, way.slot)]
    for request in track(requests, description=way.name):
        for group in engine.generate(request):
            groups += await score_groups(scorer, [group], evaluation=True)
    return groups


def _save_pictures(path: Path, groups: Sequence[RolloutGroup]) -> None:
    images = [image for group in groups[:16] if group.images_GHWC is not None for image in group.images_GHWC]
    captions = [
        Caption("no reward" if rollout.total is None else f"{rollout.total:.2f}")
        for group in groups[:16]
        for rollout in group.rollouts
    ]
    save_png(path, grid(images, captions, columns=8))


def _save_plot(path: Path, outcomes: Sequence[Outcome], title: str) -> None:
    rewards = {one.way.name: interval(list(one.means.values())) for one in outcomes if one.means}
    points = [
        GapPoint(0, one.way.point.eta, one.num_steps, rewards[one.way.name], rewards[_ode_name(one.way)], one.gap)
        for one in outcomes
        if one.way.point.eta is not None and one.gap is not None
    ]
    over_rlg: dict[int, list[tuple[float, Interval]]] = {}
    for one in outcomes:
        if one.way.rlg is not None and one.way.name in rewards:
            over_rlg.setdefault(one.num_steps, []).append((one.way.rlg, rewards[one.way.name]))
    save_png(path, draw_panels(title, evaluation_panels(points, over_rlg)))


def _ode_name(way: Way) -> str:
    """The column that a noisy one is compared with."""
    return point_name(ode_of(way.point))


def _print_table(outcomes: Sequence[Outcome]) -> None:
    """The columns beside each other, in as many tables as the screen's width asks for."""
    console, metrics = Console(), list(dict.fromkeys(metric for one in outcomes for metric in one.metrics))
    room = console.width - _column_width([*metrics, _GAP_ROW])
    widths = [_column_width([one.way.name, _gap_cell(one.gap), "-0.0000"]) for one in outcomes]
    place = 0
    while place < len(outcomes):
        end = place + 1
        while end < len(outcomes) and sum(widths[place : end + 1]) < room:
            end += 1
        some = outcomes[place:end]
        table = Table("held-out", *(one.way.name for one in some))
        for metric in metrics:
            table.add_row(metric, *(f"{one.metrics[metric]:.4f}" if metric in one.metrics else "" for one in some))
        if any(one.gap is not None for one in some):
            table.add_row(_GAP_ROW, *(_gap_cell(one.gap) for one in some), style="bold")
        console.print(table)
        place = end


def _column_width(cells: Sequence[str]) -> int:
    """Characters of the widest, with its padding and rule."""
    return max(map(len, cells)) + 3


def _gap_cell(gap: Interval | None) -> str:
    return "" if gap is None else say_interval(gap)
