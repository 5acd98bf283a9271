"""A run whose guard acts, from outside: what each action does, on any placement, and after a resumption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.checkpoint import load_checkpoint
from tests.service import command_line as cli

NUM_STEPS = 7
TRIPS_AT = 5
"""The KL band is a mean of five steps, and this one is left as soon as there are five."""
GUARD = """
[[rewards]]
type = "brightness"
[[rewards]]
type = "sharpness"
only_eval = true
[guard]
held_out = ["sharpness"]
max_kl = 1e-12
max_fall = 0.99
max_divergence = 0.99
[guard.actions]
kl = ["lower_lr", "raise_kl", "drop_reward", "roll_back"]
"""
OPTIONS = ["--eval.every_steps", "1", "--checkpoint.keep", "20", "--guard.drop", "brightness", "--learner.lr", "1e-3"]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def train(folder: Path, config: Path, placement: str) -> Path:
    code, output = cli.run(["train", str(config), "--run-dir", "run", "--placement", placement, *OPTIONS], folder)
    assert code == 0, output
    assert f"guard, step {TRIPS_AT}, kl: the distance to the reference is" in " ".join(output.split())
    return folder / "run"


@pytest.fixture(scope="module")
def acted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A configuration, and its uninterrupted in-process run."""
    folder = tmp_path_factory.mktemp("guarded")
    config = cli.write_config(folder, NUM_STEPS)
    config.write_text(config.read_text() + GUARD)
    return config, train(folder, config, "in_process")


def test_every_action_does_what_it_says(acted: tuple[Path, Path]) -> None:
    _, run_dir = acted
    found = rows(run_dir)
    assert [row["step"] for row in found] == list(range(NUM_STEPS + 1))
    done = {
        "guard/did_warn",
        "guard/did_lower_lr",
        "guard/did_raise_kl",
        "guard/did_drop_reward",
        "guard/did_roll_back",
    }
    for row in found:
        assert {name for name in row if "/did_" in name} == (done if row["step"] == TRIPS_AT else set())
    assert [row["learner/lr"] for row in found[1:]] == [1e-3] * TRIPS_AT + [5e-4] * (NUM_STEPS - TRIPS_AT)
    for row in found[1:]:
        rewards = row["reward/jpeg"] + (row["reward/brightness"] if row["step"] <= TRIPS_AT else 0.0)
        assert row["reward/mean"] == pytest.approx(rewards, abs=1e-6)
    (event,) = cli.summary(run_dir)["guard"]
    assert (event["step"], event["signal"]) == (TRIPS_AT, "kl")
    best = max(found[:TRIPS_AT], key=lambda row: row["eval/sharpness"])["step"]
    assert f"going on with the weights of step {best}" in event["told"]
    gone_back, kept = (load_checkpoint(run_dir / "checkpoints" / f"step_{step}").state for step in (TRIPS_AT, best))
    assert gone_back.values == kept.values
    assert gone_back.tensors.keys() == kept.tensors.keys()
    assert all(torch.equal(gone_back.tensors[name], kept.tensors[name]) for name in kept.tensors)


def test_ray_workers_are_told_the_same(acted: tuple[Path, Path], tmp_path: Path) -> None:
    config, expected = acted
    run_dir = train(tmp_path, config, "separate")
    assert cli.summary(run_dir)["weights_sha256"] == cli.summary(expected)["weights_sha256"]


def test_a_run_that_is_resumed_before_it_trips_acts_the_same(acted: tuple[Path, Path], tmp_path: Path) -> None:
    _, expected = acted
    shutil.copytree(expected, tmp_path / "run")
    code, output = cli.run(["resume", "run", "--step", str(TRIPS_AT - 1)], tmp_path)
    assert code == 0, output
    again, whole = cli.summary(tmp_path / "run"), cli.summary(expected)
    assert (again["weights_sha256"], again["guard"]) == (whole["weights_sha256"], whole["guard"])
    for one, other in zip(rows(tmp_path / "run"), rows(expected), strict=True):
        told = {name: value for name, value in one.items() if name.startswith(("guard/", "loss", "reward/", "eval/"))}
        assert told == {name: other[name] for name in told}
