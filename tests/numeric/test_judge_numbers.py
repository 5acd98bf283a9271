"""Hand-worked numbers of the judges: win rates, ties, soft marks and label probabilities."""

import asyncio
import math

import pytest

from raylign.types import RewardFailure
from rewards.judging.engine import TokenAlternatives
from rewards.judging.probability import preference, soft_mark
from rewards.judging.tournament import Match, group_statistics, points, round_robin, standings

FAILED = RewardFailure("timeout", "too slow")


def _match(points: float, conflicts: int = 0) -> Match:
    return Match(points, 1, conflicts, {})


def test_points_are_a_win_only_if_both_orders_agree() -> None:
    assert [points(a, b) for a in (True, False) for b in (True, False)] == [1.0, 0.5, 0.5, 0.0]


def test_win_rates_by_hand() -> None:
    """0 beats 1, ties with 2 and the match with 3 fails; 1 beats 2, loses to 3; 2 ties with 3.

    0: (1 + 0.5) / 2 = 0.75. 1: (0 + 1 + 0) / 3. 2: (0.5 + 0 + 0.5) / 3. 3: (1 + 0.5) / 2 = 0.75.
    """
    matches = {
        (0, 1): _match(1.0), (0, 2): _match(0.5, 1), (0, 3): FAILED,
        (1, 2): _match(1.0), (1, 3): _match(0.0), (2, 3): _match(0.5, 1),
    }  # fmt: skip
    found = standings(4, matches)
    assert [standing.win_rate for standing in found] == [0.75, pytest.approx(1 / 3), pytest.approx(1 / 3), 0.75]
    assert [standing.num_matches for standing in found] == [2, 3, 3, 2]
    assert [standing.num_failed for standing in found] == [1, 0, 0, 1]
    assert [standing.num_position_conflicts for standing in found] == [1, 0, 2, 1]
    assert [standing.failure for standing in found] == [FAILED, None, None, FAILED]


def test_nothing_left_is_no_win_rate() -> None:
    (first, second) = standings(2, {(0, 1): FAILED})
    assert (first.win_rate, second.win_rate) == (None, None)


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_without_failures_the_win_rates_of_a_group_average_one_half(count: int) -> None:
    async def play(i: int, j: int) -> Match:
        return _match((i * 7 + j * 3) % 3 / 2)

    matches = asyncio.run(round_robin(count, play))
    assert len(matches) == count * (count - 1) // 2
    rates = [standing.win_rate or 0.0 for standing in standings(count, matches)]
    assert math.isclose(sum(rates) / count, 0.5)


def test_group_statistics_by_hand() -> None:
    """Of the 6 pairs of 1, 1, 1, 2 three are ties."""
    assert group_statistics([1, 1, 1, 2]) == {"size": 4, "tie_rate": 0.5, "zero_variance": False}
    assert group_statistics([0.5, 0.5]) == {"size": 2, "tie_rate": 1.0, "zero_variance": True}
    assert group_statistics([0.5]) == {"size": 1, "tie_rate": None, "zero_variance": None}


def _tokens(*pieces: str | tuple[str, dict[str, float]]) -> list[TokenAlternatives]:
    whole = [(piece, {piece: 1.0}) if isinstance(piece, str) else piece for piece in pieces]
    return [TokenAlternatives(text, {t: math.log(p) for t, p in alternatives.items()}) for text, alternatives in whole]


def test_the_soft_mark_is_read_at_the_last_score() -> None:
    """At the draft 1 is certain; at the verdict p(2) = 0.25 and p(5) = 0.75: (0.5 + 3.75) / 1 = 4.25."""
    verdict = ("5", {"2": 0.25, "5": 0.75})
    found = soft_mark(_tokens('{"score": ', ("1", {"1": 1.0}), "} or ", '{"sco', 're":', " ", verdict, "}"))
    assert found is not None
    assert (found.chosen, found.mean, found.label_mass) == (5, pytest.approx(4.25), pytest.approx(1.0))
    assert found.probability_by_mark["2"] == pytest.approx(0.25)


@pytest.mark.parametrize("mark", [" 4", '"4', "4}", ' "4"\n}'])
def test_a_mark_may_be_spelt_with_its_surroundings(mark: str) -> None:
    """p(4) = 0.4 + 0.1 of the bare spelling, p(3) = 0.25: (2 + 0.75) / 0.75 = 3.6667."""
    found = soft_mark(_tokens('"score":', (mark, {mark: 0.4, "4": 0.1, " 3": 0.25, "10": 0.2})))
    assert found is not None
    assert (found.mean, found.label_mass) == (pytest.approx(11 / 3), pytest.approx(0.75))


@pytest.mark.parametrize("pieces", [(), ("4",), ('{"score"', ": "), ('"score": 4}',), ('"score": ', "42")])
def test_no_mark_of_its_own_is_no_soft_mark(pieces: tuple[str, ...]) -> None:
    assert soft_mark(_tokens(*pieces)) is None


@pytest.mark.parametrize(("yes", "no"), [(-0.1, -3.0), (-2.0, -2.0), (-700.0, -705.0)])
def test_the_preference_is_the_sigmoid_of_the_difference(yes: float, no: float) -> None:
    found = preference({"yes": yes, "no": no}, "yes", "no")
    assert found is not None
    assert found.value == pytest.approx(1 / (1 + math.exp(no - yes)))
    assert found.label_mass == pytest.approx(math.exp(yes) + math.exp(no))
