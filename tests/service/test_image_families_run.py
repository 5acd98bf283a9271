"""Runs of a forward-process and of a windowed policy-ratio method: the same weights whoever draws, killed or not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.service import command_line as cli

NUM_STEPS = 5
PRESETS = {
    # Three slow copies, whole groups, a guided anchor and a running mean: all of them must survive.
    "crd": """
[algorithm]
type = "crd"
[sampler]
type = "dpm_solver"
[learner]
ema_decay = 0.9
""",
    # A window that moves on every step, siblings that share their noise.
    "mix_grpo": """
[algorithm]
type = "mix_grpo"
[sampler]
type = "flow_sde"
num_steps = 6
shared_noise = true
window = { strategy = "progressive", size = 2, advance_every = 1 }
""",
}


@pytest.fixture(scope="module", params=PRESETS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """An uninterrupted in-process run: what to train, and its directory."""
    folder = tmp_path_factory.mktemp(str(request.param))
    preset = folder / f"{request.param}.toml"
    preset.write_text(PRESETS[str(request.param)])
    configs = [str(cli.write_config(folder, NUM_STEPS)), str(preset)]
    code, output = cli.run(["train", *configs, "--run-dir", "run", "--placement", "in_process"], folder)
    assert code == 0, output
    return configs, folder / "run"


def test_separate_workers_end_with_the_same_weights(reference: tuple[list[str], Path], tmp_path: Path) -> None:
    configs, expected = reference
    arguments = ["train", *configs, "--run-dir", "run", "--placement", "separate", "--rollout.num_actors", "3"]
    code, output = cli.run(arguments, tmp_path)
    assert code == 0, output
    assert cli.summary(tmp_path / "run")["weights_sha256"] == cli.summary(expected)["weights_sha256"]
    assert cli.summary(tmp_path / "run")["eval_final"] == cli.summary(expected)["eval_final"]


def test_a_killed_run_resumes_exactly(reference: tuple[list[str], Path], tmp_path: Path) -> None:
    configs, expected = reference
    run_dir = tmp_path / "run"
    process = cli.start(["train", *configs, "--run-dir", "run", "--placement", "in_process"], tmp_path)
    try:
        cli.wait_for((run_dir / "checkpoints" / "step_2").exists, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    finally:
        cli.end(process)
    code, output = cli.run(["resume", "run"], tmp_path)
    assert code == 0, output
    assert cli.summary(run_dir)["weights_sha256"] == cli.summary(expected)["weights_sha256"]
    assert cli.summary(run_dir)["eval_final"] == cli.summary(expected)["eval_final"]
    ours, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run_dir, expected)
    )
    for name in ("reward/mean", "loss", "learner/sampling_decay", "ratio/deviation_max"):
        assert [row.get(name) for row in ours] == [row.get(name) for row in theirs]
