"""Which held-out means are worth a line on the screen and a card in the report, and which way they should go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

_MEASURES = ("mean", "diversity", "nfe", "cached_calls", "gamma", "characters")
"""Held-out means that are no reward: calls of the network (NFE), entropy budget and length of texts among them."""
_FEWER_IS_BETTER = ("nfe", "failed")
_NEITHER_IS_BETTER = ("cached_calls", "gamma", "characters")


def headline_means(means: Mapping[str, float]) -> dict[str, float]:
    """The held-out means worth a line: each reward and its details, diversity, and the mix if rewards are mixed.

    Of texts also the calls of the network and the entropy budget.
    """
    hidden = ("std_within_group", "characters")
    unless_some = ("failed", "cached_calls")
    shown = {name: value for name, value in means.items() if name not in hidden and (name not in unless_some or value)}
    rewards = [name for name in shown if "/" not in name and name not in (*_MEASURES, "failed")]
    if len(rewards) == 1:
        shown.pop("mean", None)
    return shown


def direction(name: str, first: float | None, last: float | None) -> Literal["better", "worse", ""]:
    """Whether a mean changed for the better: more of a reward, fewer calls; "" where neither can be said."""
    if first is None or last is None or first == last or name in _NEITHER_IS_BETTER:
        return ""
    return "better" if (last < first) == (name in _FEWER_IS_BETTER) else "worse"
