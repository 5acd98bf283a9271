"""`raylign evaluate` on a finished run of pictures: it finds what the run found, the gap, RLG, and the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from services.config import load_run_config
from services.evaluate import evaluate_target
from services.reward_gap import read_gaps
from services.run import train_run
from tests.service.command_line import write_config


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step with an adapter, evaluated at two stochasticities."""
    folder = tmp_path_factory.mktemp("evaluated")
    overrides = {
        "placement": "in_process",
        "learner.lr": "0.05",
        "eval.etas": "[0.5, 1.5]",
        "eval.samples_per_prompt": "4",
        "sampler.num_steps": "4",
    }
    config = load_run_config(str(write_config(folder, num_steps=1, tuning="lora")), overrides)
    assert train_run(config, "tiny", folder / "run", None) == 0
    return folder / "run"


def _evaluate(run_dir: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, dict[str, float]]:
    results = evaluate_target(run_dir, None, options.pop("overrides", {}), **options)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    return results


def test_it_finds_what_the_run_found(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = _evaluate(run_dir, capsys)
    assert list(results) == ["ode", "eta_0.5", "eta_1.5"]
    recorded = {point.eta: point for point in read_gaps(run_dir / "samples" / "reward_gap.json") if point.step == 1}
    for eta in (0.5, 1.5):
        column = results[f"eta_{eta:g}"]
        assert (column["gap"], column["gap_ci95"]) == (recorded[eta].gap.mean, recorded[eta].gap.half_width)
        assert column["gap"] == pytest.approx(column["mean"] - results["ode"]["mean"])
    assert "gap" not in results["ode"]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert results["ode"] == pytest.approx(summary["eval_final"])


def test_rlg_goes_from_the_base_model_past_the_trained_one(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = _evaluate(run_dir, capsys, rlg=[0, 1, 3])
    assert results["rlg_1"] == results["ode"]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert results["rlg_0"] == pytest.approx(summary["eval_initial"])
    assert results["rlg_3"]["mean"] not in (results["ode"]["mean"], results["rlg_0"]["mean"])


def test_a_plot_and_a_grid_for_each_column_are_written(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = {"eval.etas": "[1.0]", "eval.eta_steps": "[4, 6]"}
    results = _evaluate(
        run_dir,
        capsys,
        overrides=overrides,
        pictures=tmp_path / "grid.png",
        rlg=[2],
        plot=tmp_path / "gap.png",
    )
    assert {path.name for path in tmp_path.iterdir()} == {"gap.png", *(f"grid_{name}.png" for name in results)}
    assert len(results) == 6
    with Image.open(tmp_path / "gap.png") as plot:
        assert plot.size == (3 * 640, 600)


def test_the_runs_own_sampler_is_compared_where_nothing_is_asked_for(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = _evaluate(run_dir, capsys, overrides={"eval.etas": "[]"})
    assert list(results) == ["ode", "flow_sde"]
    assert results["flow_sde"]["gap"] == pytest.approx(results["flow_sde"]["mean"] - results["ode"]["mean"])


def test_many_columns_are_printed_in_several_tables(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_target(run_dir, None, {"eval.etas": "[0.25, 0.5, 0.75, 1, 1.25, 1.5]", "eval.num_prompts": "2"})
    printed = capsys.readouterr().out
    assert printed.count("held-out") == printed.count("gap to the ODE") >= 2
    assert "…" not in printed
    assert "+-" in printed
