"""Which drafts are selected, by hand: both ends, ties, failures, and what is left to chance but keyed."""

from __future__ import annotations

import typing

import pytest

from rollout.selection import Selection, select

MODES: tuple[Selection, ...] = typing.get_args(Selection)
KEY = (0, "prompt", 3, "explore")
#        0    1    2    3    4    5    6    7
POOL = [0.1, 0.9, 0.5, 0.8, 0.2, 0.4, 1.0, 0.0]


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (4, [0, 1, 6, 7]),  # best 6, 1; worst 7, 0
        (5, [0, 1, 4, 6, 7]),  # an odd one is a worst one: floor(k / 2) are best
        (1, [7]),
        (8, list(range(8))),
    ],
)
def test_best_worst_takes_both_ends(k: int, expected: list[int]) -> None:
    assert select(POOL, k, "best_worst", KEY) == expected


def test_equal_rewards_are_taken_in_the_pools_order_and_none_twice() -> None:
    assert select([0.5] * 6, 4, "best_worst", KEY) == [0, 1, 2, 3]
    # One is best for sure; the three 0.5 are both second best and second worst.
    assert select([0.5, 1.0, 0.5, 0.0, 0.5], 4, "best_worst", KEY) == [0, 1, 2, 3]
    assert select([0.0, 1.0, 0.0, 1.0], 2, "mean_deviation", KEY) == [0, 1]


def test_mean_deviation_takes_what_is_furthest_from_the_mean() -> None:
    # mean .4875: distances .3875 .4125 .0125 .3125 .2875 .0875 .5125 .4875
    assert select(POOL, 3, "mean_deviation", KEY) == [1, 6, 7]
    # One far outlier below draws the mean down: everything above it is nearer than it, but it is one.
    assert select([0.0, 10.0, 10.1, 10.2], 2, "mean_deviation", KEY) == [0, 3]


def test_extremes_random_takes_the_two_ends_and_any_others() -> None:
    found = [select(POOL, 4, "extremes_random", (seed, "p", 0, "explore")) for seed in range(20)]
    assert all({6, 7} <= set(one) for one in found)
    assert {place for one in found for place in one} == set(range(8))
    assert select(POOL, 2, "extremes_random", KEY) == [6, 7]
    assert select(POOL, 1, "extremes_random", KEY) == [7]


def test_random_is_a_function_of_its_key_and_not_of_rewards() -> None:
    assert select(POOL, 3, "random", KEY) == select([0.3] * 8, 3, "random", KEY)
    found = {tuple(select(POOL, 3, "random", (seed, "p", 0, "explore"))) for seed in range(30)}
    assert len(found) > 15


@pytest.mark.parametrize("how", MODES)
def test_a_failed_draft_is_chosen_only_where_the_others_are_too_few(how: Selection) -> None:
    totals = [None, 0.3, None, 0.9, 0.1, None, 0.5]
    assert set(select(totals, 4, how, KEY)) == {1, 3, 4, 6}
    assert select(totals, 6, how, KEY) == [0, 1, 2, 3, 4, 6], "lowest places first"
    assert select([None] * 4, 2, how, KEY) == [0, 1]
    assert not set(select(totals, 2, how, KEY)) & {0, 2, 5}


@pytest.mark.parametrize("how", MODES)
def test_every_selection_is_k_distinct_places_and_the_same_again(how: Selection) -> None:
    for k in range(1, 9):
        chosen = select(POOL, k, how, KEY)
        assert chosen == sorted(set(chosen)) == select(POOL, k, how, KEY)
        assert len(chosen) == k


def test_more_than_there_are_cannot_be_selected() -> None:
    with pytest.raises(ValueError, match="9 of 8 drafts cannot be selected; draft more"):
        select(POOL, 9, "best_worst", KEY)
    with pytest.raises(ValueError, match="0 of 8"):
        select(POOL, 0, "random", KEY)
