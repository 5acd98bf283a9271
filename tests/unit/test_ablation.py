"""What an ablation says: differences at matched calls worked out by hand, their errors, and words that fit them."""

from __future__ import annotations

import math

import pytest

from services.ablation import (
    SAME_WEIGHTS,
    Difference,
    SeedResult,
    at_matched_calls,
    curves,
    differences,
    in_words,
    levels,
    matched_calls,
    signed,
)
from services.frontier import Estimate, FrontierPoint, FrontierSeries


def _point(
    nfe: float, accuracy: float, gamma: float | None = 0.1, levels: dict[str, FrontierPoint] | None = None
) -> FrontierPoint:
    return FrontierPoint(gamma, accuracy, 0.03, nfe, 100, levels or {})


BASE = FrontierSeries(0, (_point(6, 0.2, 0.0), _point(4, 0.1, 1.0)), _point(5, 0.15))


def _result(variant: str, seed: int, own: FrontierPoint | None, few: float, many: float) -> SeedResult:
    """Swept at two budgets: `few` at 2 calls, `many` at 6."""
    return SeedResult(variant, seed, BASE, FrontierSeries(9, (_point(6, many, 0.0), _point(2, few, 1.0)), own))


# At 3 calls, a quarter of the way from 2 to 6: fixed 0.6 + 0.2 / 4 = 0.65, the learned weights 0.4 + 0.4 / 4 = 0.5.
FIXED = _result("fixed", 0, None, 0.6, 0.8)
LEARNED = _result("learned", 0, _point(3, 0.7), 0.4, 0.8)


def test_the_controller_is_compared_at_its_own_calls() -> None:
    same, fixed = differences([FIXED, LEARNED])
    assert (same.against, fixed.against) == (SAME_WEIGHTS, "fixed")
    assert same.by_seed[0].value == pytest.approx(0.2)
    assert fixed.by_seed[0].value == pytest.approx(0.05)
    # The errors of 3/4 and 1/4 of the prompts, and of the operating point.
    assert fixed.by_seed[0].error == pytest.approx(0.03 * math.hypot(1, 0.75, 0.25))


def test_the_operating_point_of_the_other_run_counts_as_a_point_of_its_frontier() -> None:
    fixed = _result("fixed", 0, _point(3, 0.75), 0.6, 0.8)
    assert differences([fixed, LEARNED])[1].by_seed[0].value == pytest.approx(-0.05)


def test_seeds_are_compared_with_their_own_kind() -> None:
    results = [FIXED, LEARNED, _result("fixed", 1, None, 0.2, 0.6), _result("learned", 1, _point(4, 0.7), 0.4, 0.8)]
    fixed = differences(results)[1]
    # Seed 1 at 4 calls, half way: 0.4, so +0.3; seed 0: +0.05.
    assert list(fixed.by_seed) == [0, 1]
    assert fixed.values == pytest.approx([0.05, 0.3])
    mean = fixed.mean
    assert mean is not None
    assert mean.value == pytest.approx(0.175)
    assert mean.error == pytest.approx(0.125), "the spread over seeds, as it explains more than the sampling"


def test_the_sampling_error_counts_where_seeds_happen_to_agree() -> None:
    agreeing = Difference("fixed", {0: Estimate(0.1, 0.04), 1: Estimate(0.1, 0.03)}, 0)
    mean = agreeing.mean
    assert mean is not None
    assert mean.error == pytest.approx(0.025)
    assert Difference("fixed", {}, 1).mean is None


def test_calls_that_the_other_never_reaches_are_counted_rather_than_compared() -> None:
    quick = _result("learned", 0, _point(1.5, 0.7), 0.4, 0.8)
    assert [(one.by_seed, one.unreached) for one in differences([FIXED, quick])] == [({}, 1), ({}, 1)]
    assert "nothing to compare" in in_words([FIXED, quick], "exact")[1]


def test_without_the_controller_there_is_no_difference_and_no_claim() -> None:
    assert differences([FIXED]) == []
    assert in_words([FIXED], "exact") == [
        "No run with learned budgets is finished, so what the controller adds cannot be said yet."
    ]
    assert curves([]) == []


def test_words_say_how_much_and_whether_chance_explains_it() -> None:
    words = in_words([FIXED, LEARNED], "exact")
    assert words[0] == (
        "With learned budgets the model solves 70.0 % of the held-out prompts exactly, at 3.00 calls per answer."
    )
    assert "+20.0 ± 3.8 points, more than chance explains." in words[1]
    assert "+5.0 ± 3.8 points, no clear difference." in words[2]
    assert "one seed" in words[3]
    assert "do not tell how hard" in words[4]
    assert "mean reward of 0.700" in in_words([LEARNED], "reward")[0]


def test_words_for_several_seeds_give_their_range() -> None:
    results = [FIXED, LEARNED, _result("fixed", 1, None, 0.6, 0.8), _result("learned", 1, _point(4, 0.6), 0.4, 0.8)]
    words = in_words(results, "exact")
    assert "(from -10.0 points to +5.0 points over 2 seeds)" in words[2]
    assert not any("This is one seed" in sentence for sentence in words)


def test_budgets_that_follow_difficulty_are_said_to() -> None:
    hard, easy = _point(4, 0.5, 0.05), _point(2, 0.9, 0.4)
    own = _point(3, 0.7, levels={"length 3": easy, "length 8": hard})
    result = _result("learned", 0, own, 0.4, 0.8)
    assert levels([result, FIXED]) == {"length 3": {"learned": easy}, "length 8": {"learned": hard}}
    assert in_words([result], "exact")[-1] == (
        "Its mean budget ranges from 0.05 (length 8, 4.00 calls) to 0.4 (length 3, 2.00 calls)."
    )


def test_the_table_of_matched_calls_has_the_base_and_every_variant() -> None:
    sampled = _result("sampled", 0, _point(5, 0.7), 0.5, 0.9)
    results = [_result("fixed", 0, _point(2.01, 0.6), 0.6, 0.8), LEARNED, sampled]
    assert matched_calls(results) == [2.01, 3, 5]
    table = at_matched_calls(results, [3, 5])
    assert list(table) == ["base", "fixed", "sampled", "learned"]
    assert table["base"][0] is None, "the base takes at least 4 calls"
    assert [one and one.value for one in table["sampled"]] == pytest.approx([0.6, 0.8])


def test_near_operating_points_share_a_column() -> None:
    results = [_result("fixed", 0, _point(3.01, 0.6), 0.6, 0.8), LEARNED]
    assert len(matched_calls(results)) == 1


def test_the_base_counts_once_per_seed() -> None:
    other = SeedResult("fixed", 1, FrontierSeries(0, (_point(6, 0.4, 0.0), _point(4, 0.3, 1.0))), FIXED.after)
    base = curves([FIXED, LEARNED, other])[0]
    assert [(point.accuracy, point.samples) for point in base.points] == [(pytest.approx(0.3), 200), (0.2, 200)]
    # Two seeds, each with an error of 0.03.
    assert base.points[0].error == pytest.approx(0.03 / math.sqrt(2))


def test_curves_are_the_mean_of_their_seeds_with_the_base_first() -> None:
    base, fixed, learned = curves([FIXED, LEARNED, _result("fixed", 1, _point(3, 0.7), 0.2, 0.4)])
    assert (base.base, base.name, fixed.name, learned.name) == (
        True,
        "before training",
        "fixed budget",
        "learned budgets",
    )
    assert [point.accuracy for point in fixed.points] == pytest.approx([0.6, 0.4])
    assert (len(fixed.seeds), len(learned.seeds)) == (2, 0)
    assert fixed.own is not None
    assert fixed.own.accuracy == pytest.approx(0.7), "of the seeds that have one"


def test_differences_are_in_points_where_accuracy_is_a_share() -> None:
    assert signed(Estimate(0.0512, 0.02), "exact") == "+5.1 ± 2.0 points"
    assert signed(Estimate(-0.0512, None), "reward") == "-0.051"
    assert signed(None, "exact") == "–"
