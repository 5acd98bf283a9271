"""The accuracy-calls frontier: points from groups, interpolation by hand, the file, and the picture."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raylign.errors import RunDirError
from raylign.types import RewardBreakdown, RewardFailure, RewardScore
from services.frontier import (
    FrontierPoint,
    FrontierSeries,
    accuracy_at,
    budget_of,
    frontier_json,
    level_of,
    mean_point,
    mean_points,
    measure,
    pareto,
    quality_of,
    read_frontier,
)
from services.frontier_picture import HEIGHT, WIDTH, Axes, Curve, draw_frontier
from tests.text_answers import answer_group


def _point(nfe: float, accuracy: float, error: float | None = 0.03, gamma: float | None = 0.1) -> FrontierPoint:
    return FrontierPoint(gamma, accuracy, error, nfe, 100)


FRONT = [_point(4, 0.8, 0.04), _point(1, 0.2, 0.03), _point(2, 0.6, 0.03)]


def test_a_point_is_the_share_solved_exactly_and_the_mean_of_calls() -> None:
    groups = [
        answer_group("a", ["12", "21"], rewards=[1.0, 0.5], exact=[True, False], calls=[2, 4]),
        answer_group("b", ["12", "12"], rewards=[1.0, 1.0], exact=[True, True], calls=[1, 1]),
    ]
    assert quality_of(groups) == "exact"
    point = measure(groups, "exact", gamma=0.3)
    assert point is not None
    assert (point.gamma, point.accuracy, point.nfe, point.samples) == (0.3, 0.75, 2.0, 4)
    # Prompts solve 0.5 and 1: standard deviation 0.3536, over the root of two prompts 0.25.
    assert point.error == pytest.approx(0.25)
    shaped = measure(groups, "reward")
    assert shaped is not None
    assert shaped.accuracy == 0.875


def test_a_failed_reward_is_in_no_mean() -> None:
    group = answer_group("a", ["1", "2", "3"], rewards=[1.0, 1.0, 1.0], exact=[True, True, False], calls=[2, 8, 2])
    failed = RewardBreakdown(None, (RewardScore("r", None, RewardFailure("timeout", "late")),))
    rewards = [group.rollouts[0].reward, failed, group.rollouts[2].reward]
    point = measure([group.with_rewards([one for one in rewards if one is not None])], "exact")
    assert point is not None
    assert (point.accuracy, point.nfe, point.samples, point.error) == (0.5, 2.0, 2, None)
    assert measure([group.with_rewards([failed] * 3)], "exact") is None


def test_without_an_exact_detail_the_reward_is_what_counts() -> None:
    groups = [answer_group("a", ["x"], rewards=[0.25], exact=None, calls=[3])]
    assert quality_of(groups) == "reward"
    point = measure(groups, "reward")
    assert point is not None
    assert point.accuracy == 0.25


def test_an_operating_point_has_the_mean_of_its_budgets_and_none_without_any() -> None:
    group = answer_group("a", ["x", "y"], rewards=[1.0, 1.0], exact=[True, True], calls=[3, 3])
    tokens = group.tokens
    drawn = replace(group, trajectory=replace(tokens, log_gamma_G=torch.tensor([math.log(0.1), math.log(0.3)])))
    own, bare = measure([drawn], "exact"), measure([group], "exact")
    assert own is not None
    assert bare is not None
    assert own.gamma == pytest.approx(0.2)
    assert bare.gamma is None


def test_a_budget_of_zero_reads_as_zero() -> None:
    tiny = torch.finfo(torch.float32).tiny
    group = answer_group("a", ["x"], rewards=[1.0], exact=[True], calls=[3], log_gamma=[math.log(tiny)])
    own = measure([group], "exact")
    assert own is not None
    assert own.gamma == 0.0
    assert budget_of(math.log(0.005)) == pytest.approx(0.005)


def test_prompts_that_tell_how_hard_they_are_are_also_measured_apart() -> None:
    groups = [
        answer_group("a", ["x"], rewards=[1.0], exact=[True], calls=[2], metadata={"num_digits": 3}),
        answer_group("b", ["x"], rewards=[0.0], exact=[False], calls=[8], metadata={"num_digits": 12}),
        answer_group("c", ["x"], rewards=[0.0], exact=[False], calls=[5], metadata={}),
    ]
    point = measure(groups, "exact")
    assert point is not None
    assert list(point.levels) == ["num digits 3", "num digits 12"], "by number, not by letter"
    assert [(one.accuracy, one.nfe) for one in point.levels.values()] == [(1.0, 2.0), (0.0, 8.0)]
    assert level_of({"difficulty": "hard", "length": 3}) == "difficulty hard"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"numbers": [3, 5, 7], "target": 15}, "numbers 3"),
        ({"level": "Level 4"}, "Level 4"),
        ({"difficulty": 0.5, "level": "Level 4"}, "difficulty 0.5"),
        ({"difficulty": None, "length": 9}, "length 9"),
        ({"answer": "1"}, ""),
    ],
)
def test_prompts_tell_how_hard_they_are_in_several_ways(metadata: dict, expected: str) -> None:
    assert level_of(metadata) == expected


def test_too_many_levels_are_not_told_apart() -> None:
    def points(count: int) -> int:
        groups = [
            answer_group(str(n), ["x"], rewards=[1.0], exact=[True], calls=[2], metadata={"length": n})
            for n in range(count)
        ]
        point = measure(groups, "exact")
        assert point is not None
        return len(point.levels)

    assert (points(12), points(13)) == (12, 0)


def test_the_front_holds_what_no_other_point_beats() -> None:
    beaten, equal = _point(3, 0.5), _point(2, 0.1)
    assert [(one.nfe, one.accuracy) for one in pareto([*FRONT, beaten, equal])] == [(1, 0.2), (2, 0.6), (4, 0.8)]


@pytest.mark.parametrize(
    ("nfe", "expected", "error"),
    [
        (1, 0.2, 0.03),
        (1.25, 0.3, math.hypot(0.75 * 0.03, 0.25 * 0.03)),
        (2, 0.6, 0.03),
        (3, 0.7, math.hypot(0.5 * 0.03, 0.5 * 0.04)),
        (9, 0.8, 0.04),
    ],
)
def test_between_points_the_frontier_is_a_straight_line(nfe: float, expected: float, error: float) -> None:
    found = accuracy_at(FRONT, nfe)
    assert found is not None
    assert found.value == pytest.approx(expected)
    assert found.error == pytest.approx(error)


def test_fewer_calls_than_any_point_has_are_not_attained() -> None:
    assert accuracy_at(FRONT, 0.99) is None
    assert accuracy_at([], 2) is None
    unknown = accuracy_at([_point(1, 0.2, None), _point(3, 0.4)], 2)
    assert unknown is not None
    assert unknown.error is None


def test_seeds_are_averaged_budget_by_budget() -> None:
    one = FrontierPoint(0.1, 0.4, 0.03, 2.0, 10, {"length 3": _point(1, 0.5, gamma=None)})
    two = FrontierPoint(0.1, 0.6, 0.04, 4.0, 10, {"length 3": _point(3, 0.7, gamma=None)})
    mean = mean_point([one, two])
    assert (mean.gamma, mean.accuracy, mean.nfe, mean.samples) == (0.1, 0.5, 3.0, 20)
    assert mean.error == pytest.approx(0.025)
    assert mean.levels["length 3"].accuracy == pytest.approx(0.6)
    lonely = _point(1, 0.1, gamma=0.7)
    assert [point.gamma for point in mean_points([[one, lonely], [two]])] == [0.1]


def test_the_file_reads_back_and_a_strange_one_is_refused(tmp_path: Path) -> None:
    own = FrontierPoint(None, 0.5, None, 2.0, 7, {"length 3": _point(1, 0.5)})
    series = {
        "before": FrontierSeries(0, tuple(FRONT), own),
        "after": FrontierSeries(60, (_point(1, 0.2, gamma=math.inf),)),
    }
    path = tmp_path / "frontier.json"
    assert read_frontier(path) == ("exact", {})
    path.write_bytes(frontier_json("reward", series))
    assert "Infinity" not in path.read_text(), "no JSON"
    assert read_frontier(path) == ("reward", series)
    for strange in ("[1]", "{", '{"quality": "exact", "series": {"a": {}}}'):
        path.write_text(strange)
        with pytest.raises(RunDirError, match=r"frontier\.json is no frontier"):
            read_frontier(path)


def test_a_picture_has_a_curve_a_star_and_room_for_everything() -> None:
    curves = [
        Curve("before", FRONT, FRONT[0], base=True),
        Curve("after", FRONT[1:], None, [[_point(1, 0.5), _point(3, 0.4)]]),
    ]
    picture = draw_frontier(curves, "exact")
    assert picture.shape == (HEIGHT, WIDTH, 3)
    assert picture.dtype == np.uint8
    assert _has(picture, (138, 146, 160)), "the base is grey"
    assert _has(picture, (0x3B, 0x6F, 0xD4)), "the first of the others has the palette's first colour"
    assert not np.array_equal(picture, draw_frontier([curves[0], replace(curves[1], seeds=())], "exact"))
    assert not np.array_equal(picture, draw_frontier(curves, "reward")), "the axis says what accuracy is"
    with pytest.raises(ValueError, match="at least one point"):
        draw_frontier([Curve("a", [])], "exact")


@pytest.mark.parametrize(
    "points",
    [[_point(3, 0.5)], [_point(1, 0.0), _point(64, 1.0)], [_point(2, -3.0), _point(2.1, 40.0)], [_point(0, 0.1)]],
)
def test_every_point_lies_inside_the_frame(points: list[FrontierPoint]) -> None:
    axes = Axes(points)
    for point in points:
        x, y = axes.place(point)
        assert 96 <= x <= WIDTH - 344
        assert 103.9 <= y <= HEIGHT - 83.9
    assert draw_frontier([Curve("a", points, points[0])], "reward").shape == (HEIGHT, WIDTH, 3)


def test_more_calls_are_further_right_and_more_accuracy_higher() -> None:
    for wide in (2.0, 60.0):
        axes = Axes([_point(1, 0.1), _point(wide, 0.9)])
        assert axes.log == (wide == 60.0)
        assert axes.x(1) < axes.x(1.5) < axes.x(wide)
        assert axes.y(0.9) < axes.y(0.5) < axes.y(0.1)


def _has(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == np.array(colour, np.uint8)).all(axis=-1).any())
