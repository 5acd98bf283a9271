"""Credit: centring, scaling, failures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import (
    STD_EPS,
    credit_groups,
    credit_metrics,
    decoupled_advantages,
    group_advantages,
    group_rewards,
    keep_best_and_worst,
    summed_advantages,
)
from raylign.errors import NumericsError
from raylign.types import Advantage, Needs, RewardBreakdown, RewardFailure, RewardScore
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


def decoupled(
    groups: Sequence[Sequence[dict[str, tuple[float, float]] | None]], clip: float | None = None
) -> list[list[float]]:
    return [advantage.adv_G.tolist() for advantage in decoupled_advantages(groups, clip)]


def test_decoupled_credit_tells_apart_what_the_sum_cannot() -> None:
    # Two 0/1 rewards. In the sum, earning the rare one or the common one is worth the same.
    one, half = [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]
    mixed = rows([[a + b for a, b in zip(one, half, strict=True)]])[0]
    assert mixed[0] == mixed[2]
    # Apart, by hand: "rare" has mean 1/4 and deviation sqrt(3)/4, "half" has 1/2 and 1/2.
    group = [{"rare": (a, 1.0), "half": (b, 1.0)} for a, b in zip(one, half, strict=True)]
    s_rare, s_half = math.sqrt(3) / 4 + STD_EPS, 0.5 + STD_EPS
    sums = np.array([0.75 / s_rare - 0.5 / s_half, -0.25 / s_rare - 0.5 / s_half, *[-0.25 / s_rare + 0.5 / s_half] * 2])
    expected = (sums - sums.mean()) / (sums.std() + STD_EPS)
    assert decoupled([group])[0] == pytest.approx(expected.tolist(), rel=1e-6)
    assert expected[0] > expected[2] > expected[1]


def test_decoupled_credit_does_not_care_for_a_rewards_scale() -> None:
    values = [(0.2, 30.0), (0.4, 10.0), (0.9, 20.0)]
    small = decoupled([[{"a": (a, 1.0), "b": (b, 0.5)} for a, b in values]])
    large = decoupled([[{"a": (1000 * a, 1.0), "b": (b, 0.5)} for a, b in values]])
    assert small[0] == pytest.approx(large[0], abs=2e-3)


def test_the_sum_is_scaled_by_the_whole_batch() -> None:
    # Weights 1 and 3 in groups of two: each group's sums are ±1 and ±3 (up to eps), the batch's deviation sqrt(5).
    groups = [[{"a": (0.0, 1.0)}, {"a": (2.0, 1.0)}], [{"a": (0.0, 3.0)}, {"a": (2.0, 3.0)}]]
    expected = [[-1 / math.sqrt(5), 1 / math.sqrt(5)], [-3 / math.sqrt(5), 3 / math.sqrt(5)]]
    for got, wanted in zip(decoupled(groups), expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-3)


def test_a_missing_optional_reward_leaves_its_weight_to_the_others() -> None:
    # "b" is 5 for both that have it, so it credits nobody; "a" has mean 2/3 and deviation sqrt(2)/3 (plus eps).
    group = [{"a": (0.0, 1.0), "b": (5.0, 1.0)}, {"a": (1.0, 1.0), "b": (5.0, 1.0)}, {"a": (1.0, 1.0)}]
    std = math.sqrt(2) / 3 + STD_EPS
    sums = np.array([-2 / 3 / std, 1 / 3 / std, 2 * 1 / 3 / std])  # the third: weights 1 of 2 present, so doubled
    expected = (sums - sums.mean()) / (sums.std() + STD_EPS)
    assert decoupled([group])[0] == pytest.approx(expected.tolist(), rel=1e-6)


def test_failed_samples_enter_no_decoupled_mean() -> None:
    fine = [{"a": (0.0, 1.0)}, {"a": (1.0, 1.0)}, {"a": (3.0, 1.0)}]
    (alone,), (with_failure,) = decoupled([fine]), decoupled([[fine[0], None, *fine[1:]]])
    assert [with_failure[0], *with_failure[2:]] == alone
    assert with_failure[1] == 0.0
    assert decoupled([[None, None]]) == [[0.0, 0.0]]
    assert decoupled([[{"a": (0.1, 1.0)}] * 3]) == [[0.0] * 3]


def test_decoupled_credit_of_drawn_groups_reads_scores_and_weights() -> None:
    def breakdown(group: int, sibling: int) -> RewardBreakdown:
        if sibling == 3:
            return RewardBreakdown(None, (RewardScore("a", None, RewardFailure("timeout", "late")),), None, (1.0,))
        scores = (RewardScore("a", float(sibling)), RewardScore("b", 100.0 * (sibling == 1)))
        return RewardBreakdown(float(sibling), scores, None, (1.0, -0.5))

    groups = [
        group.with_rewards([breakdown(place, sibling) for sibling in range(group.group_size)])
        for place, group in enumerate(draw_groups(ToyPolicy(), euler(), Needs.FINAL))
    ]
    given = [[{"a": (float(i), 1.0), "b": (100.0 * (i == 1), -0.5)} for i in range(3)] + [None]] * len(groups)
    for got, wanted in zip(credit_groups(groups, "gdpo", 5.0), decoupled(given, clip=5.0), strict=True):
        assert got.adv_G.tolist() == wanted
        assert got.valid_G.tolist() == [True, True, True, False]


def test_deviations_can_be_unbiased_and_their_floor_chosen() -> None:
    # Of 1, 2, 3 the biased variance is 2/3, the unbiased one 1.
    (biased,) = rows([[1.0, 2.0, 3.0]], std="group", eps=1e-8)
    (unbiased,) = rows([[1.0, 2.0, 3.0]], std="group", eps=1e-8, unbiased=True)
    assert biased == pytest.approx([-math.sqrt(1.5), 0.0, math.sqrt(1.5)])
    assert unbiased == pytest.approx([-1.0, 0.0, 1.0])
    (floored,) = rows([[1.0, 2.0, 3.0]], std="group", eps=1.0, unbiased=True)
    assert floored == pytest.approx([-0.5, 0.0, 0.5])


@pytest.mark.parametrize("eps", [1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("unbiased", [False, True])
def test_groups_without_variance_get_exactly_0(eps: float, unbiased: bool) -> None:
    values = [[0.1, 0.1, 0.1], [0.7], [None, 0.2, 0.2]]
    for std in ("global", "group"):
        assert rows(values, std=std, eps=eps, unbiased=unbiased) == [[0.0] * len(group) for group in values]
    several = [[{"a": (0.1, 1.0), "b": (0.3, 2.0)}] * 3]
    for credit in (summed_advantages, decoupled_advantages):
        assert [one.adv_G.tolist() for one in credit(several, 5.0, eps, unbiased)] == [[0.0] * 3]


def test_small_groups_are_compared_with_the_whole_step() -> None:
    # Three samples are enough, two are not: the second group's mean and deviation are those of all five.
    values = [[1.0, 2.0, 3.0], [6.0, 8.0]]
    whole = [1.0, 2.0, 3.0, 6.0, 8.0]
    large, small = rows(values, std="group", eps=1e-6, min_count=3)
    assert large == pytest.approx([-math.sqrt(1.5), 0.0, math.sqrt(1.5)], rel=1e-4)
    assert small == pytest.approx([(r - np.mean(whole)) / (np.std(whole) + 1e-6) for r in (6.0, 8.0)])
    # A failed sibling does not count.
    (thin, _) = rows([[1.0, 2.0, None], [6.0, 8.0]], std="group", eps=1e-6, min_count=3)
    assert thin[2] == 0
    assert thin[1] < 0


def test_summed_credit_adds_rewards_that_were_normalised_each() -> None:
    # a: 1, 2, 3 and b: 30, 10, 20 become -1, 0, 1 and 1, -1, 0; weights .75 and .25 give .75 a + .25 b.
    group = [{"a": (a, 0.75), "b": (b, 0.25)} for a, b in ((1.0, 30.0), (2.0, 10.0), (3.0, 20.0))]
    (advantage,) = summed_advantages([group], eps=1e-8, unbiased=True)
    assert advantage.adv_G.tolist() == pytest.approx([-0.5, -0.25, 0.75])
    doubled = [{name: (value, 2 * weight) for name, (value, weight) in sample.items()} for sample in group]
    (twice,) = summed_advantages([doubled], eps=1e-8, unbiased=True)
    assert twice.adv_G.tolist() == pytest.approx([-1.0, -0.5, 1.5])
    (clipped,) = summed_advantages([group], clip=0.6, eps=1e-8, unbiased=True)
    assert clipped.adv_G.tolist() == pytest.approx([-0.5, -0.25, 0.6])
    # Normalised over the batch of this one group after that, it is GDPO's.
    (gdpo,) = decoupled_advantages([group], eps=1e-8, unbiased=True)
    spread = np.std([-0.5, -0.25, 0.75], ddof=1)
    assert gdpo.adv_G.tolist() == pytest.approx([value / spread for value in (-0.5, -0.25, 0.75)])


def test_one_reward_summed_is_group_scaling() -> None:
    group = [None, *({"a": (value, 1.0)} for value in (1.0, 4.0, 5.0))]
    (summed,) = summed_advantages([group])
    (alone,) = group_advantages([[None, 1.0, 4.0, 5.0]], "group")
    assert summed.valid_G.tolist() == alone.valid_G.tolist()
    torch.testing.assert_close(summed.adv_G, alone.adv_G)


def test_totals_without_parts_are_one_reward() -> None:
    groups = draw_groups(ToyPolicy(), euler(), Needs.FINAL)
    for summed, alone in zip(
        credit_groups(groups, "per_reward", 5.0), credit_groups(groups, "group", 5.0), strict=True
    ):
        torch.testing.assert_close(summed.adv_G, alone.adv_G)
        assert summed.adv_G.abs().max() > 0


@pytest.mark.parametrize(
    ("adv", "count", "kept"),
    [
        ([0.5, -2.0, 1.0, 0.1, 2.0, -0.3], 4, {1, 5, 2, 4}),
        ([0.5, -2.0, 1.0, 0.1, 2.0, -0.3], 2, {1, 4}),
        ([0.0, 0.0, 0.0, 0.0], 2, {0, 3}),  # equal ones by place: the first is worst, the last best
        ([1.0, 0.0, 1.0, 0.0, 1.0], 2, {1, 4}),
        ([1.0, 2.0], 4, {0, 1}),
        ([None, 3.0, 1.0, None, 2.0], 2, {2, 1}),  # failed ones are never chosen
        ([None, None, 1.0], 2, {2}),
    ],
)
def test_best_and_worst_siblings_are_kept(adv: list[float | None], count: int, kept: set[int]) -> None:
    valid_G = torch.tensor([value is not None for value in adv])
    adv_G = torch.tensor([0.0 if value is None else value for value in adv])
    chosen = keep_best_and_worst(Advantage(adv_G, valid_G), count)
    assert set(chosen.valid_G.nonzero().flatten().tolist()) == kept
    for place, value in enumerate(chosen.adv_G.tolist()):
        assert value == (adv_G[place] if place in kept else 0)
