"""`raylign evaluate`: held-out rewards of a run or a model, in this process.

Pictures are drawn by the ODE and the SDE sampler; texts as in the run's evaluation, and at each of `eval.gammas`.
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
from raylign.config import load_config
from raylign.errors import ConfigError
from raylign.models import load_policy
from raylign.samplers.flow_sde import FlowSdeConfig
from raylign.types import Needs, RolloutGroup
from raylign.weights import WeightSnapshot, make_snapshot
from rewards import RewardMix, make_mix
from rollout.engine import EvalPoint, RolloutEngine, chunk_requests
from rollout.prompts import GroupTask, load_prompts
from services.assembly import adapter_seed, evaluation_sampler, sampler_setup
from services.config import RunConfig, load_run_config
from services.export import trained_tensors
from services.pictures import Caption, grid, save_png
from services.run_dir import RunDir
from services.scoring import score_groups
from services.step_metrics import eval_metrics


@dataclass(frozen=True, slots=True)
class _Way:
    """One way of drawing the held-out prompts: a column of the table."""

    name: str
    sampler: Any
    gamma: float | None = None


def evaluate_target(
    target: Path, config_name: str | None, overrides: Mapping[str, str], pictures: Path | None
) -> dict[str, dict[str, float]]:
    """Score the held-out prompts of a configuration with a run's newest weights, or with a model's own.

    Prints a table, then the same as one JSON line; returns it. Raises RaylignError for what does not fit.
    """
    is_run = (target / "config.toml").is_file()
    if config_name is not None or not is_run:
        config = load_run_config(config_name or "quickstart_image", overrides)
    else:
        config = load_config(RunConfig, target / "config.toml", overrides)
    if config.prompts.heldout is None:
        raise ConfigError("evaluate needs held-out prompts; set prompts.heldout in the configuration")
    if pictures is not None and config.modality == "text":
        raise ConfigError("--pictures was given, but this model writes texts; leave it out")
    snapshot = None
    if is_run:
        tensors = trained_tensors(target)
        manifest = read_manifest(latest_checkpoint(RunDir(target).checkpoints) or target)
        kind = "adapter" if config.model.tuning == "lora" else "full"
        snapshot = make_snapshot(tensors, manifest.step, kind, config.model.lora.scale)
    else:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(target)})})
    results = _evaluate(config, snapshot, pictures)
    _print_table(results)
    sys.stdout.write(json.dumps(results) + "\n")
    return results


def _evaluate(config: RunConfig, snapshot: WeightSnapshot | None, pictures: Path | None) -> dict[str, dict[str, float]]:
    torch.set_num_threads(config.rollout.num_threads)
    policy = load_policy(config.model, "rollout", seed=adapter_seed(config))
    weights = snapshot or policy.export_weights(0)
    prompts = load_prompts(resolve(str(config.prompts.heldout)), config.prompts.fields)[: config.eval.num_prompts]
    tasks = [GroupTask(prompt, -1, place) for place, prompt in enumerate(prompts)]
    scorer = make_mix(config.rewards)
    results: dict[str, dict[str, float]] = {}
    for way in _ways(config):
        setup = sampler_setup(policy, way.sampler, Needs.FINAL)
        engine = RolloutEngine(policy, {"eval": setup}, config.seed)
        engine.pull(weights, "eval")
        groups = asyncio.run(_score_all(engine, scorer, tasks, config.eval.samples_per_prompt, way))
        results[way.name] = {key.removeprefix("eval/"): value for key, value in eval_metrics(groups).items()}
        if pictures is not None:
            _save_pictures(pictures.with_stem(f"{pictures.stem}_{way.name}"), groups)
    return results


def _ways(config: RunConfig) -> list[_Way]:
    if config.modality == "text":
        sampler = evaluation_sampler(config)
        return [
            _Way(sampler.type, sampler),
            *(_Way(f"gamma_{gamma:g}", sampler, gamma) for gamma in config.eval.gammas),
        ]
    ode = evaluation_sampler(config)
    noise_level = (config.sampler if isinstance(config.sampler, FlowSdeConfig) else FlowSdeConfig()).noise_level
    sde = FlowSdeConfig(
        # An SDE has at least one step before the last.
        num_steps=max(2, ode.num_steps),
        guidance_scale=ode.guidance_scale,
        shift=ode.shift,
        noise_level=noise_level,
    )
    return [_Way("ode", ode), _Way("sde", sde)]


async def _score_all(
    engine: RolloutEngine[Any], scorer: RewardMix, tasks: Sequence[GroupTask], samples: int, way: _Way
) -> list[RolloutGroup]:
    groups: list[RolloutGroup] = []
    requests = [
        replace(request, point=EvalPoint(gamma=way.gamma))
        for request in chunk_requests(tasks, samples, samples * 4, "eval")
    ]
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


def _print_table(results: Mapping[str, Mapping[str, float]]) -> None:
    table = Table("held-out", *results)
    for metric in dict.fromkeys(metric for values in results.values() for metric in values):
        table.add_row(metric, *(f"{values[metric]:.4f}" if metric in values else "" for values in results.values()))
    Console().print(table)
