"""`raylign plan` with its probe, beside a real run of the same tiny configuration on a Ray cluster."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from raylign.errors import ClusterError
from services.config import load_run_config
from services.plan.probe import run_probe
from services.plan.sizes import model_sizes
from tests.service import command_line as cli
from tests.tiny_models import sd3_folder

WITHIN = 0.25
"""Of the measured peak; `benchmarks/plan.py` aims at 15 % on the quickstarts."""


def test_the_forecast_of_memory_is_what_a_run_takes(tmp_path: Path) -> None:
    config = cli.write_config(tmp_path, num_steps=2)
    code, output = cli.run(["plan", str(config), "--json"], tmp_path)
    assert code == 0, output
    plan = json.loads(output[output.index("\n{") :])
    planned = {role["role"]: role["host_bytes"] for role in plan["roles"]}
    code, output = cli.run(["train", str(config), "--run-dir", "run"], tmp_path)
    assert code == 0, output
    measured = cli.summary(tmp_path / "run")["peak_memory_bytes"]
    assert {worker.partition("_")[0] for worker in measured} == {"rollout", "learner"}
    for worker, peak in measured.items():
        forecast = planned["learner rank" if worker.startswith("learner") else "rollout actor"]
        assert abs(forecast / peak - 1) < WITHIN, (worker, forecast, peak, plan["roles"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert plan["payload_bytes"] == next(row["pull/bytes"] for row in reversed(rows) if "pull/bytes" in row)
    assert plan["batches"]["items_per_sample"] == plan["probe"]["learner"]["items_per_sample"]
    phases = [plan["step"][f"{phase}_s"] for phase in ("rollout", "credit", "train", "publish", "pull")]
    assert all(seconds > 0 for seconds in phases)
    assert abs(sum(phases) / plan["step"]["step_s"] - 1) < 1e-6


def test_a_probe_that_fails_says_why_and_how_to_plan_without_it(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(sd3_folder(), model)
    (weights,) = (model / "transformer").glob("*.safetensors")
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 1000)
    keys = {"placement": "in_process", "model.path": str(model)}
    config = load_run_config(str(cli.write_config(tmp_path, num_steps=2)), keys)
    assert model_sizes(config.model).from_files, "a header says nothing of what is missing behind it"
    heard: list[str] = []
    with pytest.raises(ClusterError, match=r"the probe's rollout failed: .*transformer.*--no-probe"):
        run_probe(config, heard.append)
    assert heard == ["rollout"]
