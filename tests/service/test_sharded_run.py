"""A run whose learner is two sharded processes on a cluster, and what goes on from its checkpoints with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from learner.checkpoint import load_checkpoint
from raylign.models import load_policy
from services.config import read_resolved_config
from services.export import trained_tensors
from tests.service import command_line as cli

CRD = ("--algorithm.type", "crd", "--algorithm.num_train_times", "2", "--algorithm.sampling_decay", "0-0.5-0-0.5")
SHARDED = ("--placement", "separate", "--rollout.num_actors", "1", "--learner.num_ranks", "2")
ONE_RANK = ("--num_steps", "4", "--placement", "in_process", "--learner.num_ranks", "1")


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_sharded_run_goes_on_with_one_rank(tmp_path: Path) -> None:
    config = cli.write_config(tmp_path, 2)
    sharded = ("train", str(config), *CRD, *SHARDED, "--learner.sharding", "fsdp", "--run-dir", "run")
    code, output = cli.run(sharded, tmp_path)
    assert code == 0, output
    run = tmp_path / "run"
    files = load_checkpoint(run / "checkpoints" / "step_2").manifest.files
    assert sorted(files) == ["learner-00000-of-00002.safetensors", "learner-00001-of-00002.safetensors"]
    # What rank 0 gathered and published is what the ranks wrote, each its part.
    policy = load_policy(read_resolved_config(run / "config.toml").model, "learner")
    assert policy.export_weights(2, trained_tensors(run)).sha256 == cli.summary(run)["weights_sha256"]

    code, output = cli.run(("train", str(config), *CRD, "--placement", "in_process", "--run-dir", "alone"), tmp_path)
    assert code == 0, output
    found, alone = rows(run)[1], rows(tmp_path / "alone")[1]
    assert found["reward/mean"] == alone["reward/mean"], "the samples of the first step are those of the loaded model"
    for name in ("loss", "grad/norm", "implicit/spread"):
        assert found[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-7), name

    code, output = cli.run(("resume", "run", *ONE_RANK), tmp_path)
    assert code != 0
    assert "learner.num_ranks: was 2, is 1" in output.replace("\n", " ")
    fork = ("fork", "run", "--run-dir", "fork", *ONE_RANK)
    allowed = ("--allow-config-change", "learner.num_ranks", "--allow-config-change", "placement")
    for command in (fork, ("resume", "run", *ONE_RANK, *allowed)):
        code, output = cli.run(command, tmp_path)
        assert code == 0, output
    assert cli.summary(run)["weights_sha256"] == cli.summary(tmp_path / "fork")["weights_sha256"]
    assert [row["loss"] for row in rows(run)[3:]] == [row["loss"] for row in rows(tmp_path / "fork")[1:]]
    assert list(load_checkpoint(run / "checkpoints" / "step_4").manifest.files) == ["learner.safetensors"]
