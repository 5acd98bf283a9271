"""Whole runs with low-precision drafts and rollouts, and what stops one before it starts."""

from __future__ import annotations

import json
from pathlib import Path

from tests.service import command_line as cli

ONE_PROCESS = ["--placement", "in_process", "--rollout.num_actors", "1"]
NFT = ["--algorithm.type", "nft", "--sampler.type", "euler_ode", "--algorithm.kl_weight", "0"]


def _train(folder: Path, *options: str) -> tuple[int, str]:
    config = cli.write_config(folder, 2, "lora")
    return cli.run(["train", str(config), "--run-dir", str(folder / "run"), *options], folder, timeout_s=300)


def _steps(folder: Path) -> list[dict[str, float]]:
    """The metrics of each step, without evaluations."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "parity/gap" in row]


def test_a_run_with_drafts_in_nvfp4_trains(tmp_path: Path) -> None:
    explore = ["--rollout.explore.pool_size", "4", "--rollout.explore.num_steps", "2"]
    code, output = _train(
        tmp_path, *ONE_PROCESS, *explore, "--rollout.explore.precision", "nvfp4", "--rollout.chunk_size", "2"
    )
    assert code == 0, output
    rows = _steps(tmp_path)
    assert [row["weight_version"] for row in rows] == [1, 2]
    # Actors and learner predict alike, drafts or none: the gate is of what trains.
    assert max(row["parity/gap"] for row in rows) < 1e-5


def test_a_run_with_rollouts_in_fp8_passes_its_parity_gate(tmp_path: Path) -> None:
    code, output = _train(tmp_path, *ONE_PROCESS, *NFT, "--rollout.precision", "fp8")
    assert code == 0, output
    assert 1e-4 < _steps(tmp_path)[0]["parity/gap"] < 0.06


def test_a_pattern_that_matches_nothing_ends_the_run_before_its_first_step(tmp_path: Path) -> None:
    pattern = ["--rollout.quantizer.keep_high", '["atn"]']
    code, output = _train(tmp_path, *NFT, "--rollout.precision", "fp8", *pattern)
    assert code == 1
    assert "'atn' matches none of the 32 linear layers" in output
    assert "mend or remove the pattern" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
