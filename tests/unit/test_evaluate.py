"""`raylign evaluate` on pictures: its columns, the gap, RLG, GenEval's figures, the files, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from raylign.config import parse_config
from raylign.errors import ConfigError, ModelError
from rollout.drawn import EvalPoint
from services.cli import parse_numbers
from services.config import RunConfig, load_run_config
from services.evaluate import Way, evaluate_target, evaluation_ways, geneval_metrics
from services.reward_gap import read_gaps
from services.run import train_run
from tests.picture_groups import rewarded_group
from tests.service.command_line import write_config
from tests.tiny_models import sd3_folder


def _config(**settings: Any) -> RunConfig:
    return parse_config(RunConfig, {"sampler": {"type": "euler_ode", "num_steps": 6}, **settings}, "test")


def _names(config: RunConfig, *rlg: float) -> list[str]:
    return [way.name for way in evaluation_ways(config, rlg)]


FLOW_SDE = {"sampler": {"type": "flow_sde", "num_steps": 6}}
GDDIM = {"sampler": {"type": "gddim", "num_steps": 6, "eta": 0.7}}
DECAYING = {"sampler": {"type": "gddim", "num_steps": 6, "eta": 0.7, "eta_end": 0.0}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["ode", "eta_1"]),
        (FLOW_SDE, ["ode", "flow_sde"]),
        (GDDIM, ["ode", "eta_0.7"]),
        (DECAYING, ["ode", "gddim"]),
        ({"sampler": {"type": "gddim", "num_steps": 6, "eta": 0.0}}, ["ode", "eta_1"]),
        ({"sampler": {"type": "euler_ode", "num_steps": 1}}, ["ode"]),
        (FLOW_SDE | {"eval": {"etas": [0, 0.5, 1, 0.5]}}, ["ode", "eta_0.5", "eta_1"]),
        (FLOW_SDE | {"eval": {"eta_steps": [6, 12]}}, ["ode", "flow_sde", "ode_steps_12", "flow_sde_steps_12"]),
        ({"eval": {"etas": [1], "eta_steps": [4]}}, ["ode_steps_4", "eta_1_steps_4"]),
    ],
)
def test_columns_are_the_ode_and_the_runs_own_noise_unless_asked_otherwise(
    settings: dict[str, Any], expected: list[str]
) -> None:
    assert _names(_config(**settings)) == expected


def test_rlg_weights_follow_each_number_of_steps() -> None:
    config = _config(eval={"etas": [1], "eta_steps": [6, 12]})
    steps_12 = ["ode_steps_12", "eta_1_steps_12", "rlg_1_steps_12", "rlg_1.5_steps_12"]
    assert _names(config, 1, 1.5) == ["ode", "eta_1", "rlg_1", "rlg_1.5", *steps_12]
    assert evaluation_ways(config, [1.5])[2] == Way("rlg_1.5", rlg=1.5)
    assert evaluation_ways(config, [1.5])[-2].point == EvalPoint(eta=1.0, num_steps=12)


def test_geneval_is_told_as_its_benchmark_does() -> None:
    def detail(tag: str, official: bool) -> dict[str, Any]:
        return {"tag": tag, "official": official, "strict": False}

    groups = [
        rewarded_group(
            "a", [1.0, 0.5, None], num_steps=4, details=[detail("colors", True), detail("colors", False), {}]
        ),
        rewarded_group("b", [0.0], num_steps=4, details=[detail("counting", False)]),
    ]
    # The mean over tags, (1/2 + 0) / 2, not over pictures, 1/3.
    assert geneval_metrics(groups) == {
        "fake/accuracy/counting": 0.0,
        "fake/accuracy/colors": 0.5,
        "fake/accuracy": 0.25,
    }
    assert geneval_metrics([rewarded_group("a", [1.0], num_steps=4)]) == {}


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


def test_the_runs_own_sampler_is_compared_without_a_plot_of_stochasticity(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = _evaluate(run_dir, capsys, overrides={"eval.etas": "[]"})
    assert list(results) == ["ode", "flow_sde"]
    assert results["flow_sde"]["gap"] == pytest.approx(results["flow_sde"]["mean"] - results["ode"]["mean"])
    with pytest.raises(ConfigError, match=r"--plot draws .* give --etas or --rlg as well"):
        evaluate_target(run_dir, None, {"eval.etas": "[]"}, plot=tmp_path / "gap.png")


def test_many_columns_are_printed_in_several_tables(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_target(run_dir, None, {"eval.etas": "[0.25, 0.5, 0.75, 1, 1.25, 1.5]", "eval.num_prompts": "2"})
    printed = capsys.readouterr().out
    assert printed.count("held-out") == printed.count("gap to the ODE") >= 2
    assert "…" not in printed
    assert "±" in printed


@pytest.mark.parametrize("weight", [-1.0, math.nan])
def test_a_weight_that_is_none_is_refused(run_dir: Path, weight: float) -> None:
    with pytest.raises(ModelError, match="RLG weight is at least 0"):
        evaluate_target(run_dir, None, {}, rlg=[weight])


def test_options_that_do_not_fit_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--rlg mixes the model before training with the one after"):
        evaluate_target(sd3_folder(), "quickstart_image", {}, rlg=[1.5])
    unfit: list[dict[str, Any]] = [{"rlg": [1.5]}, {"plot": tmp_path / "gap.png"}]
    for options in unfit:
        with pytest.raises(ConfigError, match=r"was given, but this model writes texts"):
            evaluate_target(tmp_path, "quickstart_text", {}, **options)
    with pytest.raises(ConfigError, match=r"eval.etas.* are for pictures"):
        evaluate_target(tmp_path, "quickstart_text", {"eval.etas": "[1]"})
    with pytest.raises(ConfigError, match=r"eval.etas.0: Input should be greater than or equal to 0"):
        evaluate_target(tmp_path, "quickstart_image", {"eval.etas": "[-1]"})
    with pytest.raises(ConfigError, match=r"eval.etas: Input should be a valid tuple"):
        evaluate_target(tmp_path, "quickstart_image", {"eval.etas": "[a,b]"})


def test_numbers_are_separated_by_commas() -> None:
    assert parse_numbers("rlg", "1, 1.5,2,") == (1.0, 1.5, 2.0)
    assert parse_numbers("rlg", "") == ()
    with pytest.raises(ConfigError, match=r"--rlg takes numbers separated by commas, such as 1,1.5, got '1;2'"):
        parse_numbers("rlg", "1;2")
