"""Comparing the candidates of one prompt: pairs judged in both orders, win rates, and how much a group tells apart.

Judges favour a position (R3's pairwise accuracy suffers from it), so a pair is asked about twice with the order
swapped. Agreeing verdicts are a win and a loss; disagreeing ones show the position, not the candidates, and are a tie.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from raylign.types import JsonValue, RewardFailure, RewardSample, RewardScore


@dataclass(frozen=True, slots=True)
class Match:
    """One pair, judged in both orders as often as asked."""

    points: float
    """Of the first: the mean over draws of 1 for a win, 0 for a loss, 0.5 for a tie."""
    num_draws: int
    num_position_conflicts: int
    details: Mapping[str, JsonValue]
    """What the judge said, for the record."""
    label_mass: float = 1.0
    """Least probability that the two verdicts had together, where it is known."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How one candidate fared."""

    win_rate: float | None
    """Mean points over its judged matches; None when there was none."""
    num_matches: int
    num_failed: int
    num_position_conflicts: int
    failure: RewardFailure | None
    """Of its first failed match."""
    judged: tuple[Match, ...] = ()
    """The matches that were judged, whichever side it was on."""

    def record(self) -> dict[str, JsonValue]:
        """The counts, for a score's details."""
        return {
            "num_matches": self.num_matches,
            "num_failed_matches": self.num_failed,
            "num_position_conflicts": self.num_position_conflicts,
        }


def points(first_wins: bool, first_wins_swapped: bool) -> float:
    """1 or 0 when both orders agree on the winner, else 0.5."""
    return 0.5 if first_wins != first_wins_swapped else float(first_wins)


def points_of_preferences(p_first: float, p_first_swapped: float) -> float:
    """The same from how probably each order's first picture is preferred; an even preference chooses nobody."""
    if p_first == 0.5 or p_first_swapped == 0.5:
        return 0.5
    return points(p_first > 0.5, p_first_swapped < 0.5)


def group_problem(samples: Sequence[RewardSample], max_group: int) -> str | None:
    """Why samples cannot be compared with each other, or None."""
    if len(samples) > max_group:
        return f"groups of up to {max_group} are compared, got {len(samples)}"
    if len({sample.prompt.text for sample in samples}) > 1:
        return "the candidates of a group must answer the same prompt"
    return None


def with_statistics(scores: Sequence[RewardScore]) -> list[RewardScore]:
    """The scores of a group, with how well they tell it apart in their details."""
    statistics = group_statistics([score.value for score in scores if score.value is not None])
    return [
        score if score.value is None else replace(score, details={**score.details, "group": statistics})
        for score in scores
    ]


async def round_robin(
    count: int, play: Callable[[int, int], Awaitable[Match | RewardFailure]]
) -> dict[tuple[int, int], Match | RewardFailure]:
    """Every pair of candidates once, all at the same time: the engine bounds what is in flight."""
    pairs = list(combinations(range(count), 2))
    return dict(zip(pairs, await asyncio.gather(*(play(*pair) for pair in pairs)), strict=True))


def standings(count: int, matches: Mapping[tuple[int, int], Match | RewardFailure]) -> list[Standing]:
    """What the matches make of each candidate. A failed match counts for neither side."""
    return [_standing(i, matches) for i in range(count)]


def _standing(candidate: int, matches: Mapping[tuple[int, int], Match | RewardFailure]) -> Standing:
    own = [(pair, match) for pair, match in matches.items() if candidate in pair]
    judged = [(pair[0] == candidate, match) for pair, match in own if isinstance(match, Match)]
    failures = [match for _, match in own if isinstance(match, RewardFailure)]
    won = [match.points if is_first else 1 - match.points for is_first, match in judged]
    return Standing(
        win_rate=sum(won) / len(won) if won else None,
        num_matches=len(judged),
        num_failed=len(failures),
        num_position_conflicts=sum(match.num_position_conflicts for _, match in judged),
        failure=failures[0] if failures else None,
        judged=tuple(match for _, match in judged),
    )


def group_statistics(values: Sequence[float]) -> Mapping[str, JsonValue]:
    """How well a reward tells the members of a group apart, over those that have a value.

    tie_rate: share of pairs with equal values. zero_variance: all are equal, so group-relative credit is nil; its
    mean over groups is the zero-variance rate. Both are null with fewer than two values.
    """
    pairs = list(combinations(values, 2))
    if not pairs:
        return {"size": len(values), "tie_rate": None, "zero_variance": None}
    num_ties = sum(a == b for a, b in pairs)
    return {"size": len(values), "tie_rate": num_ties / len(pairs), "zero_variance": num_ties == len(pairs)}
