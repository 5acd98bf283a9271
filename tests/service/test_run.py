"""Whole runs from outside: the same weights whoever makes the samples. What is killed on the way: test_kill_matrix."""

from __future__ import annotations

import contextlib
import json
import os
import tomllib
from pathlib import Path

import pytest

from tests.service import command_line as cli

NUM_STEPS = 6


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An uninterrupted in-process run: its configuration and its directory."""
    folder = tmp_path_factory.mktemp("reference")
    config = cli.write_config(folder, NUM_STEPS)
    code, output = cli.run(["train", str(config), "--run-dir", "run", "--placement", "in_process"], folder)
    assert code == 0, output
    return config, folder / "run"


def test_a_run_leaves_what_it_promises(reference: tuple[Path, Path]) -> None:
    _, run_dir = reference
    summary = cli.summary(run_dir)
    assert summary["status"] == "finished"
    assert summary["num_steps"] == summary["weight_version"] == NUM_STEPS
    assert len(summary["weights_sha256"]) == 64
    assert summary["eval_initial"].keys() == summary["eval_final"].keys() >= {"mean", "jpeg", "diversity"}
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    last = rows[-1]
    for name in ("reward/mean", "reward/jpeg", "loss", "throughput/samples_per_s", "staleness/max", "time/train_s"):
        assert isinstance(last[name], (int, float)), name
    # On policy, with weights that moved only through this very step, every ratio is exactly one.
    assert [row["ratio/deviation_max"] for row in rows[1:]] == [0.0] * NUM_STEPS
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step_4", "step_6"]
    for name in ("config.toml", "report.html", "samples/before_after.png", "samples/step_00000.png"):
        assert (run_dir / name).stat().st_size > 0, name
    assert list((run_dir / "tensorboard").iterdir())
    prompts = Path(tomllib.loads((run_dir / "config.toml").read_text())["prompts"]["train"])
    assert prompts.is_absolute(), "the run may be gone on with from anywhere"


def test_separate_workers_end_with_the_same_weights(reference: tuple[Path, Path], tmp_path: Path) -> None:
    """Colocated ones do in test_kill_matrix.py, where they die as well."""
    config, expected = reference
    arguments = ["train", str(config), "--run-dir", "run", "--placement", "separate", "--rollout.num_actors", "3"]
    code, output = cli.run(arguments, tmp_path)
    assert code == 0, output
    assert cli.summary(tmp_path / "run")["weights_sha256"] == cli.summary(expected)["weights_sha256"]


def test_a_run_directory_in_use_is_refused(tmp_path: Path) -> None:
    config = cli.write_config(tmp_path, num_steps=500)
    arguments = ["train", str(config), "--run-dir", "run", "--placement", "in_process"]
    process = cli.start(arguments, tmp_path)
    try:
        cli.wait_for((tmp_path / "run" / "metrics.jsonl").exists, process)
        other = tmp_path / "other"
        other.mkdir()
        code, output = cli.run(["train", str(config), "--run-dir", "../run", "--placement", "in_process"], other)
        assert code == 1
        assert f"in use by process {process.pid}" in output
    finally:
        cli.end(process)


def test_a_cluster_is_joined_if_it_can_hold_the_run_and_goes_on_afterwards(
    reference: tuple[Path, Path], tmp_path: Path
) -> None:
    import ray

    from services.process import local_cluster

    config, expected = reference
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with contextlib.chdir(elsewhere):  # workers of a joined cluster have another working directory than the run
        stack = contextlib.ExitStack()
        cluster = stack.enter_context(local_cluster(4, tmp_path))
    with stack:
        token = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH") if name in os.environ}
        arguments = ["train", str(config), "--run-dir", "run", "--address", cluster.address]
        code, output = cli.run([*arguments, "--rollout.num_actors", "5"], tmp_path, token, timeout_s=60)
        assert code == 1
        assert "6.5 CPUs and the Ray cluster has 4: 2.5 missing" in output
        arguments[3] = "run2"
        code, output = cli.run(arguments, tmp_path, token)
        assert code == 0, output
        assert ray.cluster_resources()["CPU"] == 4
        assert (tmp_path / "run2" / "checkpoints" / f"step_{NUM_STEPS}").is_dir()
    assert cli.summary(tmp_path / "run2")["weights_sha256"] == cli.summary(expected)["weights_sha256"]
