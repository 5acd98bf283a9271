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
    _, work = timeline(tmp_path / "run", 2)
    pulled = {who for who, phase, _, _ in work if phase == "pull"} - {"loop"}
    assert len(pulled) == 3
    assert {who for who, phase, _, _ in work if phase == "sample"} <= pulled


def timeline(run_dir: Path, step: int) -> tuple[float, list[tuple[str, str, float, float]]]:
    """Seconds of a recorded step, and who did what from when on for how long."""
    told = json.loads((run_dir / "groups" / f"train_{step:08d}.json").read_bytes())["timeline"]
    assert told["left_out"] == 0
    return told["seconds"], [tuple(piece) for piece in told["work"]]


def test_the_work_of_a_step_is_told_and_lies_within_it(reference: tuple[Path, Path]) -> None:
    _, run_dir = reference
    rows = {row["step"]: row for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())}
    for step in (2, NUM_STEPS):
        seconds, work = timeline(run_dir, step)
        assert seconds == pytest.approx(rows[step]["time/step_s"], abs=1e-3)
        (process,) = {who for who, *_ in work} - {"rewards", "loop"}
        phases = {(who, phase) for who, phase, _, _ in work}
        evaluated = {(who, "evaluate") for who in (process, "rewards", "loop")} if step == NUM_STEPS else set()
        assert phases - {("loop", "parity")} == evaluated | {
            *((process, phase) for phase in ("sample", "decode", "pull")),
            ("rewards", "score"),
            *(("loop", phase) for phase in ("rollout", "credit", "train", "publish", "pull")),
        }
        # In one process nothing is drawn ahead; what the observer takes to be told of the step is some milliseconds.
        assert min(start for _, _, start, _ in work) > -0.25
        assert max(start + taken for _, _, start, taken in work) < seconds + 0.01
        for phase in ("train", "credit"):
            told = sum(taken for who, name, _, taken in work if (who, name) == ("loop", phase))
            assert told == pytest.approx(rows[step][f"time/{phase}_s"], abs=1e-3)
        drawn = sum(taken for who, name, _, taken in work if (who, name) == (process, "sample"))
        assert drawn == pytest.approx(rows[step]["busy/sample_s"], abs=1e-3), "a chunk's groups share its work"


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
