"""The reward gap: paired differences by hand, intervals, names, the file, and the picture."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest

from raylign.errors import RunDirError
from rollout.drawn import AS_CONFIGURED, EvalPoint
from services.reward_gap import (
    GapPoint,
    Interval,
    gap_metrics,
    gap_points,
    gaps_json,
    interval,
    ode_of,
    paired_gap,
    point_name,
    prompt_means,
    read_gaps,
    t_quantile,
)
from services.reward_gap_picture import (
    HEIGHT,
    PANEL_WIDTH,
    Line,
    Panel,
    draw_panels,
    evaluation_panels,
    rewards_over_eta,
    run_panels,
)
from tests.picture_groups import rewarded_group


@pytest.mark.parametrize(
    # From tables of Student's t distribution, two-sided 95 %.
    ("freedom", "expected"),
    [(1, 12.706), (2, 4.303), (10, 2.228), (11, 2.201), (23, 2.069), (60, 2.000), (10_000, 1.960)],
)
def test_quantiles_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, abs=6e-4)


def test_an_interval_by_hand() -> None:
    # Mean 2, standard deviation 1, over the root of three 0.577, times 4.302653.
    assert interval([1.0, 2.0, 3.0]).half_width == pytest.approx(4.302653 / 3**0.5)
    assert interval([0.7]) == Interval(0.7, None, 1)
    assert (interval([0.7]).low, interval([0.7]).high) == (0.7, 0.7)
    with pytest.raises(statistics.StatisticsError):
        interval([])


def test_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    draws = np.random.default_rng(0).normal(0.3, 2.0, size=(2000, 5))
    held = [one.low <= 0.3 <= one.high for one in (interval(row.tolist()) for row in draws)]
    # 2000 trials at .95: a standard error of .005.
    assert sum(held) / len(held) == pytest.approx(0.95, abs=0.015)


def test_pairs_take_the_prompts_own_level_out() -> None:
    easy_and_hard = {"easy": 0.9, "hard": 0.1, "middle": 0.5}
    noisy = {prompt: reward + 0.05 for prompt, reward in easy_and_hard.items()}
    gap = paired_gap(noisy, easy_and_hard)
    assert gap is not None
    assert gap.mean == pytest.approx(0.05)
    assert gap.half_width == pytest.approx(0, abs=1e-9), "unpaired, the spread over prompts would drown it"
    assert paired_gap({"a": 1.0}, {"b": 1.0}) is None


def test_failed_samples_are_in_no_mean_and_prompts_without_any_in_no_pair() -> None:
    noisy = [rewarded_group("a", [1.0, None], num_steps=4), rewarded_group("b", [0.5, 0.7], num_steps=4)]
    ode = [rewarded_group("a", [0.8, 0.6], num_steps=4), rewarded_group("b", [None, None], num_steps=4)]
    assert prompt_means(noisy) == {"a": 1.0, "b": pytest.approx(0.6)}
    point = gap_points(7, {AS_CONFIGURED: ode, EvalPoint(eta=1.0): noisy})[EvalPoint(eta=1.0)]
    assert (point.step, point.eta, point.num_steps) == (7, 1.0, 4)
    assert (point.gap.mean, point.gap.count, point.gap.half_width) == (pytest.approx(0.3), 1, None)
    assert (point.reward.count, point.ode.count) == (2, 1)


def test_each_number_of_steps_has_an_ode_of_its_own() -> None:
    def groups(reward: float, num_steps: int) -> list:
        return [rewarded_group("a", [reward], num_steps=num_steps), rewarded_group("b", [reward], num_steps=num_steps)]

    twelve = EvalPoint(eta=0.5, num_steps=12)
    assert ode_of(twelve) == EvalPoint(num_steps=12)
    sweeps = {
        AS_CONFIGURED: groups(0.5, 6),
        EvalPoint(eta=0.5): groups(0.4, 6),
        ode_of(twelve): groups(0.7, 12),
        twelve: groups(0.8, 12),
    }
    measured = gap_points(0, sweeps)
    assert {point: round(one.gap.mean, 6) for point, one in measured.items()} == {EvalPoint(eta=0.5): -0.1, twelve: 0.1}
    assert measured[twelve].num_steps == 12
    metrics = gap_metrics(sweeps, measured)
    assert metrics.keys() == {
        "eval/eta_0.5/mean",
        "eval/ode_steps_12/mean",
        "eval/eta_0.5_steps_12/mean",
        "eval/gap/eta_0.5",
        "eval/gap/eta_0.5_steps_12",
        "eval/gap_ci95/eta_0.5",
        "eval/gap_ci95/eta_0.5_steps_12",
    }
    assert metrics["eval/gap/eta_0.5_steps_12"] == pytest.approx(0.1)
    assert point_name(AS_CONFIGURED) == "ode"


def _point(step: int, eta: float, gap: float, num_steps: int = 6) -> GapPoint:
    return GapPoint(step, eta, num_steps, Interval(0.5 + gap, 0.02, 9), Interval(0.5, 0.02, 9), Interval(gap, 0.01, 9))


RUN = [_point(step, eta, gap) for step, gap in ((0, 0.1), (10, 0.05), (20, 0.02)) for eta in (0.5, 1.5)]


def test_a_file_is_read_back_and_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "reward_gap.json"
    assert read_gaps(path) == []
    path.write_bytes(gaps_json([*RUN, GapPoint(30, 1.0, 6, Interval(1, None, 1), Interval(1, None, 1), RUN[0].gap)]))
    assert read_gaps(path)[:-1] == RUN
    assert read_gaps(path)[-1].reward.half_width is None
    for damage in ("{", "[]", '{"points": [{"step": 1}]}'):
        path.write_text(damage)
        with pytest.raises(RunDirError, match=r"reward_gap.json holds no gaps .*delete it to go on"):
            read_gaps(path)


def test_a_runs_panels_show_the_gap_over_steps_and_the_reward_before_and_after() -> None:
    gaps, rewards = run_panels(RUN)
    assert gaps.zero
    assert [(line.name, [x for x, _ in line.points]) for line in gaps.lines] == [
        ("eta 0.5", [0, 10, 20]),
        ("eta 1.5", [0, 10, 20]),
    ]
    assert [(line.name, line.base) for line in rewards.lines] == [("before training", True), ("after step 20", False)]
    after = [(x, round(one.mean, 6)) for x, one in rewards.lines[1].points]
    assert after == [(0.0, 0.5), (0.5, 0.52), (1.5, 0.52)], "the ODE stands at 0"
    only_first = run_panels(RUN[:2])[1]
    assert [line.name for line in only_first.lines] == ["before training"]


def test_numbers_of_steps_are_told_apart_where_there_are_several() -> None:
    points = [_point(0, 1.0, 0.1), _point(0, 1.0, 0.2, num_steps=12)]
    assert [line.name for line in run_panels(points)[0].lines] == ["eta 1, 6 steps", "eta 1, 12 steps"]
    rewards, gaps, guided = evaluation_panels(points, {6: [(1.0, Interval(0.5, 0.1, 9)), (2.0, Interval(0.6, 0.1, 9))]})
    assert [line.name for line in rewards.lines] == ["6 steps", "12 steps"] == [line.name for line in gaps.lines]
    assert [len(line.points) for line in guided.lines] == [2, 0]
    assert rewards_over_eta(points, None, 24) == []


def test_the_picture_grows_with_its_panels_and_shows_every_line() -> None:
    picture = draw_panels("gap", run_panels(RUN))
    assert picture.shape == (HEIGHT, 2 * PANEL_WIDTH, 3)
    assert picture.dtype == np.uint8
    empty = Panel("nothing", "x", [Line("none", [])])
    one = draw_panels("gap", [run_panels(RUN)[0], empty])
    assert one.shape == (HEIGHT, PANEL_WIDTH, 3), "a panel without points takes no room"
    colours = {tuple(pixel) for pixel in one.reshape(-1, 3)[::3].tolist()}
    assert {(59, 111, 212), (217, 119, 43)} <= colours
    with pytest.raises(ValueError, match="at least one point"):
        draw_panels("gap", [empty])


def test_equal_values_and_single_points_can_be_drawn() -> None:
    flat = Line("flat", [(1.0, Interval(0.0, None, 1))])
    assert draw_panels("flat", [Panel("flat", "x", [flat], zero=True)]).std() > 0
