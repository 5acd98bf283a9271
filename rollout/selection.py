"""Which drafts are drawn again: rewards in, places out. Pure, deterministic, and stable where rewards are equal.

The modes are those of Sol-RL (2604.06916), its released code's where the paper is silent:

    best_worst       the floor(k / 2) best and the k - floor(k / 2) worst: the most contrast for credit
    mean_deviation   the k furthest from the mean reward
    extremes_random  the best one and the worst one, and any k - 2 of the rest
    random           any k: what selection itself is worth is measured against this

A draft without a reward is chosen only where those with one are too few. Equal rewards are taken in the pool's order,
and no draft twice, where the released code may take one from both ends.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from raylign.keys import KeyPart, generator

Selection = Literal["best_worst", "random", "mean_deviation", "extremes_random"]
_Scored = list[tuple[int, float]]
"""(place, reward) of the drafts that have one, in the pool's order."""


def select(totals: Sequence[float | None], k: int, how: Selection, key: Sequence[KeyPart]) -> list[int]:
    """The places of k drafts, ascending. `key` seeds what is chosen at random.

    Raises ValueError if there are fewer than k drafts.
    """
    if not 1 <= k <= len(totals):
        raise ValueError(f"{k} of {len(totals)} drafts cannot be selected; draft more, or select at least one")
    scored = [(place, total) for place, total in enumerate(totals) if total is not None]
    failed = [place for place, total in enumerate(totals) if total is None]
    count = min(k, len(scored))
    chosen = _SELECTIONS[how](scored, count, key) if count else []
    return sorted(chosen + failed[: k - count])


def _best_worst(scored: _Scored, k: int, key: Sequence[KeyPart]) -> list[int]:
    best_first = sorted(scored, key=lambda one: (-one[1], one[0]))
    best, rest = best_first[: k // 2], best_first[k // 2 :]
    worst_first = sorted(rest, key=lambda one: (one[1], one[0]))
    return _places(best + worst_first[: k - k // 2])


def _mean_deviation(scored: _Scored, k: int, key: Sequence[KeyPart]) -> list[int]:
    mean = statistics.fmean(total for _, total in scored)
    return _places(sorted(scored, key=lambda one: (-abs(one[1] - mean), one[0])))[:k]


def _extremes_random(scored: _Scored, k: int, key: Sequence[KeyPart]) -> list[int]:
    ends = _best_worst(scored, min(k, 2), key)
    rest = [one for one in scored if one[0] not in ends]
    return ends + _random(rest, k - len(ends), key)


def _random(scored: _Scored, k: int, key: Sequence[KeyPart]) -> list[int]:
    order = torch.randperm(len(scored), generator=generator(*key)).tolist()
    return [scored[place][0] for place in order[:k]]


def _places(scored: _Scored) -> list[int]:
    return [place for place, _ in scored]


_SELECTIONS: dict[Selection, Callable[[_Scored, int, Sequence[KeyPart]], list[int]]] = {
    "best_worst": _best_worst,
    "random": _random,
    "mean_deviation": _mean_deviation,
    "extremes_random": _extremes_random,
}
