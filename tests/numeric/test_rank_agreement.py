"""Rank correlation and recall, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from rollout.rank_agreement import kendall, recall, spearman


def test_without_ties_they_are_the_textbooks() -> None:
    # Pairs of finals in the drafts' order 1 3 2 4: five concordant, one (3, 2) discordant: (5 - 1) / 6.
    assert kendall([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    # Rank differences 0 1 -1 0: 1 - 6 x 2 / (4 x 15).
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 12 / 60)


def test_only_the_order_counts() -> None:
    drafts, finals = [0.1, 0.2, 0.9, 0.95], [10.0, 300.0, 20.0, 4000.0]
    assert kendall(drafts, finals) == kendall([1, 2, 3, 4], [1, 3, 2, 4])
    assert spearman(drafts, finals) == spearman([1, 2, 3, 4], [1, 3, 2, 4])
    assert kendall(drafts, [-one for one in drafts]) == pytest.approx(-1)


def test_ties_leave_the_denominator_of_tau_b() -> None:
    # (1, 1, 2) against (3, 4, 5): 3 pairs, one tied on the left; 2 concordant: 2 / sqrt(2 x 3).
    assert kendall([1, 1, 2], [3, 4, 5]) == pytest.approx(2 / math.sqrt(6))
    # Ranks (1.5, 1.5, 3) and (1, 2, 3): covariance 1.5, deviations sqrt(1.5) and sqrt(2).
    assert spearman([1, 1, 2], [3, 4, 5]) == pytest.approx(1.5 / math.sqrt(3))


def test_without_two_rewards_there_is_no_ranking() -> None:
    for measure in (kendall, spearman):
        assert measure([1, 1, 1], [1, 2, 3]) is None
        assert measure([1, 2, 3], [0, 0, 0]) is None
        assert measure([], []) is None
    assert recall([1, 2], [0, 0], 1) is None


def test_recall_is_what_is_found_again_of_the_best() -> None:
    assert recall([4, 3, 2, 1], [40, 30, 20, 10], 2) == 1
    assert recall([4, 3, 2, 1], [40, 10, 30, 20], 2) == 0.5  # the second draft is last in the end
    assert recall([4, 3, 2, 1], [1, 2, 3, 4], 2) == 0


def test_recall_counts_a_final_as_good_as_the_last_of_the_best_as_found() -> None:
    # Finals 1 1 1 0: any two of the first three are the best two.
    assert recall([4, 1, 3, 2], [1, 1, 1, 0], 2) == 1
    # The best two drafts are the first and the last; the last is worth 0.
    assert recall([4, 1, 2, 3], [1, 1, 1, 0], 2) == 0.5
    # Of three equal drafts the pool's first two are taken.
    assert recall([2, 2, 2, 1], [0, 5, 5, 5], 2) == 0.5
