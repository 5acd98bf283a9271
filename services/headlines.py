"""Which held-out means are worth a line on the screen and a card in the report, and which way they should go.

Means over held-out prompts are of three kinds: rewards that were trained on, held-out metrics that were not (rewards
with `only_eval`, and diversity), and measures of texts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

DIVERSITY = "diversity"
"""A held-out metric of every evaluation with two samples or more per prompt."""
_MEASURES = ("mean", DIVERSITY, "nfe", "cached_calls", "gamma", "characters")
"""Held-out means that are no reward: calls of the network (NFE), entropy budget and length of texts among them."""
_FEWER_IS_BETTER = ("nfe", "failed")
_NEITHER_IS_BETTER = ("cached_calls", "gamma", "characters", "sharpness")


def is_metric(name: str, metrics: Collection[str]) -> bool:
    """Whether a mean is a held-out metric or one of its details; `metrics` are the names of `only_eval` rewards."""
    return name == DIVERSITY or name.partition("/")[0] in metrics


def headline_means(means: Mapping[str, float], metrics: Collection[str] = ()) -> dict[str, float]:
    """The held-out means worth a line: each reward and its details, and the mix if rewards are mixed; of texts also
    the calls of the network and the entropy budget; at last the held-out metrics, without details.
    """
    hidden = ("std_within_group", "characters")
    unless_some = ("failed", "cached_calls")
    shown = {name: value for name, value in means.items() if name not in hidden and (name not in unless_some or value)}
    trained = {name: value for name, value in shown.items() if not is_metric(name, metrics)}
    rewards = [name for name in trained if "/" not in name and name not in (*_MEASURES, "failed")]
    if len(rewards) == 1:
        trained.pop("mean", None)
    return trained | {name: value for name, value in shown.items() if name in (*metrics, DIVERSITY)}


def headline_label(name: str, metrics: Collection[str]) -> str:
    """What a mean is called where nothing else says what it is."""
    return f"held-out metric {name}" if is_metric(name, metrics) else f"held-out {name}"


def direction(name: str, first: float | None, last: float | None) -> Literal["better", "worse", ""]:
    """Whether a mean changed for the better: more of a reward, fewer calls; "" where neither can be said."""
    if first is None or last is None or first == last or name in _NEITHER_IS_BETTER:
        return ""
    return "better" if (last < first) == (name in _FEWER_IS_BETTER) else "worse"
