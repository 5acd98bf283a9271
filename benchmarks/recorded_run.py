"""Run directories as a training run would leave them, made up: for the dashboard's benchmark and its tests.

Numbers follow simple rules of the step, so that equal arguments make equal files. Groups are packed by the very code
that packs a run's own (services.group_rows), pictures included.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylign.types import (
    LatentTrajectory,
    Prompt,
    RewardBreakdown,
    RewardFailure,
    RewardScore,
    Rollout,
    RolloutGroup,
    RolloutStatus,
    SampleKey,
    Work,
)
from services.config import RunConfig
from services.group_rows import Packed, failure_rows, pack_groups
from services.record_files import FAILURES_FILE, RecordKind, pictures_path, record_path
from services.run_dir import config_toml
from services.timeline import LOOP, REWARDS, step_timeline

EVERY_EVAL = 20
STEP_S = 5.04
_BEGAN_S = 1_700_000_000.0
ACTORS = ("node:101", "node:102")


def metrics_row(step: int, num_steps: int) -> dict[str, float]:
    """One line of metrics.jsonl: a run that learns, with noise that is a function of the step."""
    share, noise = step / num_steps, math.sin(12.9898 * step) * 0.04
    reward = 0.3 + 0.6 * (1 - math.exp(-4 * share)) + noise
    row: dict[str, float] = {
        "step": step,
        "weight_version": step,
        "reward/mean": reward,
        "reward/judge": reward,
        "reward/ocr": reward - 0.02,
        "reward/std_within_group": 0.3 * (1 - 0.6 * share),
        "ci95/reward/mean": 0.05 + abs(noise) / 4,
        "busy/sample_s": 4.0,
        "busy/decode_s": 0.6,
        "busy/reward_s": 2.5,
        "time/rollout_s": 3.1,
        "time/credit_s": 0.02,
        "time/train_s": 1.8,
        "time/publish_s": 0.05,
        "time/pull_s": 0.06,
        "time/other_s": 0.01,
        "time/step_s": STEP_S,
        "time/since_start_s": STEP_S * step,
        "throughput/samples_per_s": 4.8 + noise,
        "staleness/mean": 0.5,
        "staleness/max": 1,
        "samples/age_0": 12.0,
        "samples/age_1": 12.0,
        "failed/generation_failed": 0,
        "failed/reward_failed": 1 if step % 97 == 0 else 0,
        "failed/refused_updates": 0,
        "advantage/abs_mean": 0.7,
        "reward/zero_variance_groups": 0.0,
        "batch/valid_samples": 24.0,
        "loss": 0.25 - 0.05 * share + noise / 10,
        "loss/policy": 0.25 - 0.05 * share + noise / 10,
        "loss/kl": 0.02 * share,
        "grad/norm": 0.4 + abs(noise),
        "ratio/clip_fraction": 0.05 + abs(noise) / 10,
        "parity/gap": 1e-6,
        "learner/lr": 3e-4,
    }
    if step % EVERY_EVAL == 0:
        held_out = 0.3 + 0.55 * (1 - math.exp(-4 * share)) + noise / 4
        row |= {"eval/mean": held_out, "eval/judge": held_out, "eval/ocr": held_out - 0.02, "eval/diversity": 0.2}
        row |= {"ci95/eval/mean": 0.03, "ci95/eval/judge": 0.03, "ci95/eval/ocr": 0.03, "eval/failed": 0.0}
    return row


def made_up_timeline(step: int) -> dict[str, Any]:
    """When a step's work was done, with the seconds that `metrics_row` tells.

    The first actor draws for it from a second before it on, and scores of its samples overlap.
    """
    start_s = _BEGAN_S + STEP_S * (step - 1)
    first, second = ACTORS
    drawn = [
        (first, "sample", -1.0, 2.0),
        (first, "decode", 1.0, 0.3),
        (second, "sample", 0.05, 2.0),
        (second, "decode", 2.05, 0.3),
        (REWARDS, "score", 1.3, 1.3),
        (REWARDS, "score", 1.35, 0.45),
        (REWARDS, "score", 2.35, 0.75),
    ]
    beside = [
        (LOOP, "rollout", 0.0, 3.1),
        (LOOP, "credit", 3.1, 0.02),
        (LOOP, "train", 3.12, 1.8),
        (LOOP, "publish", 4.92, 0.05),
        (LOOP, "pull", 4.97, 0.06),
        *((who, "pull", 4.98, 0.04) for who in ACTORS),
    ]
    works = [[Work(who, phase, start_s + at, seconds) for who, phase, at, seconds in some] for some in (drawn, beside)]
    return step_timeline(works[0], works[1], start_s + STEP_S, STEP_S)


def made_up_groups(
    step: int, *, num_groups: int = 3, group_size: int = 8, side: int = 32, prompt: str = "a kite over a hill"
) -> list[RolloutGroup]:
    """Groups of smooth coloured pictures; every 97th step has a sample whose reward failed."""
    return [_group(step, place, group_size, side, prompt) for place in range(num_groups)]


def _group(step: int, place: int, size: int, side: int, prompt: str) -> RolloutGroup:
    axis = np.linspace(0, 1, side)
    images = np.empty((size, side, side, 3), np.uint8)
    for sibling in range(size):
        tilt = (step * 7 + place * 3 + sibling * 11) % 24 / 24
        plane = axis[:, None] * tilt + axis[None, :] * (1 - tilt)
        images[sibling] = np.stack([plane, 1 - plane, np.full_like(plane, tilt)], axis=-1) * 255
    task = Prompt(f"p{place}", f"{prompt}, number {place}")
    rollouts = tuple(
        Rollout(SampleKey(0, task.id, step, sibling), RolloutStatus.OK, step - 1, step - 1) for sibling in range(size)
    )
    latents = LatentTrajectory(torch.zeros(size, 1, 1, 1), torch.tensor([1.0, 0.0]))
    group = RolloutGroup(task, step, step * 3 + place, rollouts, latents, None, images)
    breakdowns = [_breakdown(step, place, sibling) for sibling in range(size)]
    return group.with_rewards(breakdowns, 0.8)


def _breakdown(step: int, place: int, sibling: int) -> RewardBreakdown:
    if step % 97 == 0 and (place, sibling) == (0, 0):
        failure = RewardFailure("timeout", "the judge gave no answer in 20 s")
        return RewardBreakdown(None, (RewardScore("judge", None, failure),), weights=(1.0,))
    value = 0.5 + 0.45 * math.sin(step + 2 * place + sibling)
    told = {"reasoning": f"The kite is clear and the hill is green. Aspect marks: {sibling % 5 + 1} of 5.", "marks": 4}
    scores = (RewardScore("judge", value, details=told, seconds=0.4), RewardScore("ocr", value, seconds=0.01))
    return RewardBreakdown(value, scores, weights=(0.5, 0.5))


def append_rows(run: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """More lines of metrics.jsonl."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def make_run(
    run: Path, num_steps: int, *, groups_of: Sequence[int] = (), prompt: str = "a kite over a hill", **keys: Any
) -> None:
    """A run of so many steps, whose groups of 3 x 8 samples are recorded at `groups_of`."""
    run.mkdir(parents=True)
    shape = {"groups_per_step": 3, "group_size": 8, "num_steps": num_steps, "seed": 0}
    (run / "config.toml").write_text(config_toml(RunConfig.model_validate({**shape, **keys})))
    append_rows(run, [metrics_row(step, num_steps) for step in range(1, num_steps + 1)])
    failures: list[dict[str, Any]] = []
    # Of twelve steps' pictures each step has one: encoding them anew for every step would take minutes.
    made = {kind: made_up_groups(kind + 1, prompt=prompt) for kind in range(12)}
    packed = {kind: pack(kind + 1, groups) for kind, groups in made.items()}
    for step in groups_of:
        if step % 97 == 0:
            groups = made_up_groups(step, prompt=prompt)
            failures += failure_rows(step, "train", groups, 8)
            write_record(run, step, groups)
            continue
        rows, pictures = packed[step % 12].groups, packed[step % 12].pictures
        for sample in (sample for row in rows for sample in row["samples"]):
            sample["versions"] = [step - 1, step - 1]
        _write(record_path(run, "train", step), step, "train", rows, pictures)
    if failures:
        (run / "groups" / FAILURES_FILE).write_text("".join(json.dumps(row) + "\n" for row in failures))
    (run / "summary.json").write_text(json.dumps({"status": "finished", "num_steps": num_steps}))


def pack(step: int, groups: Sequence[RolloutGroup], kind: RecordKind = "train") -> Packed:
    """Groups as rows, with a credit that is the reward above one half."""
    credit = [[None if one.total is None else one.total - 0.5 for one in group.rollouts] for group in groups]
    return pack_groups(groups, credit if kind == "train" else None, step - 1 if kind == "train" else None, 512)


def write_record(run: Path, step: int, groups: Sequence[RolloutGroup], kind: RecordKind = "train") -> None:
    """A step's groups as the recorder writes them."""
    packed = pack(step, groups, kind)
    _write(record_path(run, kind, step), step, kind, packed.groups, packed.pictures)


def _write(path: Path, step: int, kind: RecordKind, rows: Sequence[Mapping[str, Any]], pictures: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    pictures_path(path).write_bytes(pictures)
    whole: dict[str, Any] = {"step": step, "kind": kind, "num_groups": len(rows), "groups": rows}
    if kind == "train":
        whole["timeline"] = made_up_timeline(step)
    path.write_text(json.dumps(whole, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
