"""`raylign evaluate` on pictures: which columns there are, GenEval's figures, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from raylign.config import parse_config
from raylign.errors import ConfigError, ModelError
from rollout.drawn import EvalPoint
from services.cli import parse_numbers
from services.config import RunConfig
from services.evaluate import Way, evaluate_target, evaluation_ways, geneval_metrics
from tests.picture_groups import rewarded_group


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


def test_options_that_do_not_fit_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--rlg mixes the model before training with the one after"):
        evaluate_target(tmp_path, "quickstart_image", {}, rlg=[1.5])
    (tmp_path / "config.toml").touch()
    for weight in (-1.0, math.nan):
        with pytest.raises(ModelError, match="RLG weight is at least 0"):
            evaluate_target(tmp_path, "quickstart_image", {}, rlg=[weight])
    with pytest.raises(ConfigError, match=r"--plot draws .* give --etas or --rlg as well"):
        evaluate_target(tmp_path, "flux_flow_grpo", {}, plot=tmp_path / "gap.png")
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
