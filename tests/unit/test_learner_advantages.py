"""Credit: centring, scaling, failures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import STD_EPS, credit_metrics, group_advantages, group_rewards
from raylign.errors import NumericsError
from raylign.types import Needs
from tests.tiny_models import ToyPolicy, draw_groups, euler

REWARDS = [[1.0, 2.0, 3.0], [10.0, 10.0, 16.0]]
finite = st.floats(-100, 100)


def rows(values: Sequence[Sequence[float | None]], **options: object) -> list[list[float]]:
    return [advantage.adv_G.tolist() for advantage in group_advantages(values, **options)]  # type: ignore[arg-type]


def test_global_scaling_divides_by_the_biased_deviation_of_all_samples() -> None:
    scale = np.std(np.concatenate(REWARDS)) + STD_EPS
    expected = [[-1 / scale, 0.0, 1 / scale], [-2 / scale, -2 / scale, 4 / scale]]
    for got, wanted in zip(rows(REWARDS), expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-6)


def test_group_scaling_divides_by_each_groups_own() -> None:
    expected = [[(r - np.mean(g)) / (np.std(g) + STD_EPS) for r in g] for g in REWARDS]
    for got, wanted in zip(rows(REWARDS, std="group"), expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("failure", [None, math.nan])
@pytest.mark.parametrize("std", ["global", "group"])
def test_a_failed_sample_changes_nobody_elses_credit(failure: float | None, std: str) -> None:
    (with_failure, other), (without, other_alone) = (
        group_advantages([first, [5.0, 6.0]], std)  # type: ignore[arg-type]
        for first in ([1.0, failure, 2.0, 4.0], [1.0, 2.0, 4.0])
    )
    assert with_failure.valid_G.tolist() == [True, False, True, True]
    assert with_failure.adv_G[1] == 0
    assert torch.equal(with_failure.adv_G[with_failure.valid_G], without.adv_G)
    assert torch.equal(other.adv_G, other_alone.adv_G)


@pytest.mark.parametrize("std", ["global", "group"])
@pytest.mark.parametrize("value", [0.1, 1e9, -0.7])
def test_equal_rewards_are_exactly_no_credit(std: str, value: float) -> None:
    # .1 + .1 + .1 is not .3: a rounded mean must not be blown up by dividing by epsilon.
    assert rows([[value] * 3, [value] * 3], std=std) == [[0.0] * 3] * 2


@pytest.mark.parametrize("std", ["global", "group"])
def test_a_lone_survivor_and_a_lost_group_get_no_credit(std: str) -> None:
    lone, lost, fine = group_advantages([[None, 3.0], [None, None], [0.0, 1.0]], std)  # type: ignore[arg-type]
    assert lone.adv_G.tolist() == [0.0, 0.0]
    assert lone.valid_G.tolist() == [False, True]
    assert lost.valid_G.tolist() == [False, False]
    assert fine.adv_G[1] > 0


def test_credit_is_clipped() -> None:
    assert rows([[0.0] * 63 + [1.0]], clip=2.0)[0][-1] == 2.0
    assert rows([[0.0] * 63 + [1.0]])[0][-1] > 7


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_an_infinite_reward_is_refused(bad: float) -> None:
    with pytest.raises(NumericsError, match="hold an infinity"):
        group_advantages([[1.0, bad]])


def test_rewards_too_large_to_square_are_refused() -> None:
    with pytest.raises(NumericsError, match="not finite"):
        group_advantages([[1e308, -1e308, 1e308, 0.0]], "group")


@given(st.lists(finite, min_size=2, max_size=6), finite)
def test_a_constant_added_to_a_groups_rewards_changes_nothing(values: list[float], shift: float) -> None:
    moved = [value + shift for value in values]
    assert rows([moved], std="group")[0] == pytest.approx(rows([values], std="group")[0], rel=1e-3, abs=1e-3)


@given(st.lists(finite, min_size=2, max_size=6))
def test_credit_keeps_the_order_of_rewards(values: list[float]) -> None:
    (credit,) = rows([values])
    for first, second in zip(values, credit, strict=True):
        for other, other_credit in zip(values, credit, strict=True):
            assert not first < other or second <= other_credit


def test_group_rewards_and_metrics_of_drawn_groups() -> None:
    table = [[0.0, 1.0, None, 1.0], [2.0, 2.0, 2.0, 2.0], [None, 3.0, None, None]]
    groups = draw_groups(ToyPolicy(), euler(), Needs.FINAL, reward=lambda group, sibling: table[group][sibling])
    assert [group_rewards(group) for group in groups] == table
    metrics = credit_metrics(groups, group_advantages([group_rewards(group) for group in groups]))
    assert metrics["batch/valid_samples"] == 8
    assert metrics["reward/zero_variance_groups"] == 1
    assert metrics["reward/std_within_group"] == pytest.approx((np.std([0, 1, 1]) + 0.0) / 2)
    assert metrics["advantage/abs_mean"] > 0
