"""The benchmark of asynchronous runs: what it reads, plays and writes, and the controller's own pace."""

from __future__ import annotations

import argparse
import cProfile
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.async_runs import METHODS, arguments, make_parser, markdown, run_simulate
from benchmarks.async_simulation import Cluster, controller_cost, extrapolate, play
from benchmarks.simulated_roles import Recording, StepTimes, read_recording
from raylign.types import Needs
from services.cli import split_configs
from services.config import load_run_config

# A step of two groups per actor: 2 x 3 s of drawing, then .5 s of rewards; 4 s of training; .2 s and .3 s to hand off.
TIMES = StepTimes(draw_s=3.0, reward_s=0.5, train_s=4.0, publish_s=0.2, pull_s=0.3)
RECORDING = Recording(num_actors=2, groups_per_step=4, group_size=8, steps=(TIMES,))


def simulated(max_staleness: int, **changes: Any) -> dict[str, float]:
    return extrapolate(RECORDING, Cluster(3, 6, 8, max_staleness, 20, **changes))


def test_a_synchronous_step_is_the_sum_of_its_phases() -> None:
    row = simulated(0)
    assert row["step_s"] == pytest.approx(6 + 0.5 + 4 + 0.2 + 0.3)
    assert row["samples_per_s"] == pytest.approx(48 / 11)
    assert (row["staleness_mean"], row["staleness_max"], row["lost_chunks"]) == (0, 0, 0)
    assert row["actors_busy"] == pytest.approx(6 / 11, rel=0.01), "the first publication is counted in"
    assert row["learner_busy"] == pytest.approx(4 / 11, rel=0.01)


def test_an_asynchronous_step_is_as_long_as_its_longest_part() -> None:
    # Actors: 6 s of drawing and .3 s of pulling. The learner's 4 s hide behind them, whatever the staleness.
    rows = {staleness: simulated(staleness) for staleness in (1, 2, 4)}
    for staleness, row in rows.items():
        assert row["step_s"] == pytest.approx(6.3, rel=0.02)
        assert row["staleness_max"] <= staleness
    # A learner that takes 8 s is what is waited for, and samples become as old as they may.
    slow = simulated(4, train_factor=2.0)
    assert slow["step_s"] == pytest.approx(8.0, rel=0.02)
    assert slow["staleness_mean"] == pytest.approx(4.0, abs=0.5)


def test_deaths_cost_time_and_no_group() -> None:
    quiet, deadly = simulated(1, jitter=0.1), simulated(1, jitter=0.1, deaths_per_hour=200.0)
    assert deadly["lost_chunks"] > 5
    assert deadly["samples_per_s"] < quiet["samples_per_s"]
    assert deadly["staleness_max"] <= 1


def test_a_simulation_is_the_same_every_time() -> None:
    cluster = Cluster(3, 6, 8, 2, 8, jitter=0.3, deaths_per_hour=100.0)
    first, again = (play(cluster, lambda: TIMES).stopwatch for _ in range(2))
    assert first == again


def test_a_recording_leaves_out_the_first_step_and_evaluations(tmp_path: Path) -> None:
    row = {
        "busy/sample_s": 11.0,
        "busy/decode_s": 1.0,
        "busy/reward_s": 2.0,
        "time/train_s": 3.75,
        "time/credit_s": 0.25,
        "time/publish_s": 0.2,
        "time/pull_s": 9.0,
        "pull/load_s": 0.3,
    }
    lines: list[dict[str, float]] = [{"eval/mean": 0.5}, {**row, "busy/sample_s": 99.0}, row]
    (tmp_path / "config.toml").write_text("groups_per_step = 4\ngroup_size = 8\n[rollout]\nnum_actors = 2\n")
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert read_recording(tmp_path) == RECORDING
    options = make_parser().parse_args(["simulate", str(tmp_path), "--actors", "2", "4", "--staleness", "0", "1"])
    rows = run_simulate(options)["rows"]
    assert [(row["actors"], row["max_staleness"]) for row in rows] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert rows[0]["speedup"] == 1.0
    assert rows[3]["speedup"] == pytest.approx(11 / 6.3, rel=0.1)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row))
    with pytest.raises(SystemExit, match="fewer than two recorded steps"):
        read_recording(tmp_path)


def test_a_sample_costs_the_controller_as_much_whatever_the_number_of_actors() -> None:
    """Function calls stand for time, which `async_runs.py cost` measures: they are the same on a busy machine."""

    def calls_per_sample(actors: int) -> float:
        profile = cProfile.Profile()
        row = profile.runcall(controller_cost, actors, 12, 2, 3000)
        return sum(entry.callcount for entry in profile.getstats()) / row["samples"]

    few, many = calls_per_sample(8), calls_per_sample(256)
    assert many < 1.2 * few, "linear in the number of actors; quadratic would be 32 times as many"
    # At a tenth of a microsecond each, 5 000 samples per second are 2 000 calls per sample.
    assert few < 200


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("staleness", [0, 1, 8])
def test_every_run_of_the_sweep_is_a_configuration(method: str, staleness: int) -> None:
    options = argparse.Namespace(steps=30, every=10, actors=1, heldout=32, address=None)
    names, overrides = split_configs(
        "quickstart_image", "quickstart_image", arguments(method, staleness, 2, options)[1:]
    )
    config = load_run_config(names, overrides)
    assert (config.seed, config.max_staleness, config.placement) == (2, staleness, "separate")
    assert (Needs.LOGPROBS in config.algorithm.needs) == method.startswith("flow_grpo")
    if staleness and method.startswith("flow_grpo"):
        assert config.async_guard.max_deviation == 1e9


def test_the_page_compares_each_method_with_itself() -> None:
    def run(method: str, staleness: int, rate: float, drift: float | None) -> dict[str, Any]:
        moved = {} if drift is None else {"behaviour/deviation": drift}
        row: dict[str, Any] = {"method": method, "staleness": staleness, "samples_per_s": rate, "drift": moved}
        row |= {"seed": 0, "staleness_mean": staleness / 2, "final": 0.9, "diversity": 0.2}
        return row | {"steps_to_wanted": 12.0, "seconds_to_wanted": None}

    runs = [run("nft", 0, 10.0, None), run("nft", 2, 15.0, None), run("flow_grpo_clip", 2, 7.0, 2e-3)]
    page = markdown({"command": "c", "date": "d", "commit": "e", "hardware": "h", "runs": runs})
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[4] for row in rows] == ["1.00", "1.50", "–"]
    assert [row.split(" | ")[-1] for row in rows] == ["– |", "– |", "2.0e-03 |"]
    assert "| 12 | 0 of 1 |" in rows[0]


@settings(max_examples=60, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**32),
    num_actors=st.integers(1, 6),
    max_staleness=st.integers(0, 4),
    jitter=st.sampled_from([0.0, 0.5, 1.5]),
    deaths_per_hour=st.sampled_from([0.0, 500.0]),
    train_factor=st.sampled_from([0.05, 1.0, 5.0]),
)
def test_the_controller_keeps_the_bound_whatever_happens(
    seed: int, num_actors: int, max_staleness: int, jitter: float, deaths_per_hour: float, train_factor: float
) -> None:
    cluster = Cluster(num_actors, 3, 2, max_staleness, 7, jitter, deaths_per_hour, train_factor, seed)
    watch = play(cluster, lambda: TIMES).stopwatch
    assert len(watch.done_s) == 7, "no step is lost, and none waits forever"
    assert max(watch.max_ages) <= max_staleness
