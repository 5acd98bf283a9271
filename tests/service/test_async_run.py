"""Whole asynchronous runs on a local cluster: overlap, ages within the bound, ratios by age, falls, and resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.service import command_line as cli

NUM_STEPS = 8
ASYNCHRONOUS = ["--placement", "separate", "--max_staleness", "2", "--rollout.num_actors", "2"]


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if "reward/mean" in row]


def test_a_policy_ratio_run_must_say_what_it_does_about_old_samples(tmp_path: Path) -> None:
    config = cli.write_config(tmp_path, NUM_STEPS)
    code, output = cli.run(["train", str(config), "--run-dir", "run", *ASYNCHRONOUS], tmp_path)
    assert code == 1
    assert "set algorithm.staleness_correction = 'decoupled'" in " ".join(output.split())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_asynchronous_run_trains_older_samples_within_the_bound_and_tells_them_apart(tmp_path: Path) -> None:
    config = cli.write_config(tmp_path, NUM_STEPS)
    command = ["train", str(config), "--run-dir", "run", *ASYNCHRONOUS]
    code, output = cli.run([*command, "--algorithm.staleness_correction", "decoupled"], tmp_path)
    assert code == 0, output
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    ages = [row["staleness/max"] for row in rows]
    assert ages[0] == 0
    assert 0 < max(ages) <= 2
    assert all(row["staleness/limit"] == 2 for row in rows)
    for row in rows:
        told = {name: value for name, value in row.items() if name.startswith("behaviour/deviation/age_")}
        # Every age that has samples is told, and a fresh sample's policy is the learner's own, bit for bit.
        assert len(told) == sum(name.startswith("samples/age_") for name in row)
        assert told.get("behaviour/deviation/age_0", 0.0) == 0.0
        # The ratio is to the policy of the step's beginning, so in its only update it is 1 at any age.
        assert row["ratio/deviation_max"] == 0.0
        assert row["behaviour/weight"] > 0
    old = [
        row[name] for row in rows for name in row if name in ("behaviour/deviation/age_1", "behaviour/deviation/age_2")
    ]
    assert max(old) > 0
    assert max(row["behaviour/weight_max"] for row in rows) <= 2.0


def test_a_run_that_leaves_its_band_goes_on_synchronously_and_stays_so_when_resumed(tmp_path: Path) -> None:
    config = cli.write_config(tmp_path, NUM_STEPS)
    # No policy that has moved at all is within the band.
    guard = ["--async_guard.max_deviation", "1e-12", "--checkpoint.keep", "9"]
    command = ["train", str(config), "--run-dir", "run", *ASYNCHRONOUS, *guard]
    code, output = cli.run([*command, "--algorithm.staleness_correction", "clip"], tmp_path)
    assert code == 0, output
    assert "1 async deviation" in output
    run_dir = tmp_path / "run"
    rows = rows_of(run_dir)
    (fell,) = [row["step"] for row in rows if row["failed/async_deviation"]]
    assert [row["staleness/limit"] for row in rows] == [2] * (fell - 1) + [0] * (NUM_STEPS - fell + 1)
    # Two more steps' groups at most were admitted by then.
    assert [row["staleness/max"] for row in rows if row["step"] > fell + 2] == [0] * (NUM_STEPS - fell - 2)
    for step in (7, 8):
        newest = run_dir / "checkpoints" / f"step_{step}"
        if newest.exists():
            newest.rename(tmp_path / newest.name)
    code, output = cli.run(["resume", "run"], tmp_path)
    assert code == 0, output
    again = rows_of(run_dir)
    assert [row["step"] for row in again] == list(range(1, NUM_STEPS + 1))
    assert [(row["staleness/limit"], row["staleness/max"]) for row in again if row["step"] > 6] == [(0, 0), (0, 0)]
