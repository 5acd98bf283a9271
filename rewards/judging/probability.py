"""From the log-probs of a judge's next token to a number: P(yes), and the mean mark of a rubric."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rewards.judging.engine import TokenAlternatives

_SCORE_KEY = re.compile(r'"score"\s*:\s*"?\s*')
_MARK = re.compile(r'[\s":]*([1-5])[\s",}]*')


@dataclass(frozen=True, slots=True)
class Preference:
    """How much a judge prefers one of two labels, and how much of its probability the two have together."""

    value: float
    """P(first) / (P(first) + P(second)) = sigmoid(log P(first) - log P(second))."""
    first: float
    """P(first) over the whole vocabulary."""
    label_mass: float
    """P(first) + P(second)."""


def preference(logprob_by_label: Mapping[str, float], first: str, second: str) -> Preference | None:
    """A label without a log-prob was not among the likeliest tokens and counts as 0; None if both are missing."""
    p_first, p_second = (math.exp(logprob_by_label.get(label, -math.inf)) for label in (first, second))
    mass = p_first + p_second
    if not mass > 0:
        return None
    return Preference(p_first / mass, min(1.0, p_first), min(1.0, mass))


@dataclass(frozen=True, slots=True)
class SoftMark:
    """The mean of the marks 1 to 5 under their probabilities, and what the five have together."""

    chosen: int
    """The mark that was written."""
    mean: float
    label_mass: float
    probability_by_mark: Mapping[str, float]
    """Of the whole vocabulary, not renormalised."""


def soft_mark(tokens: Sequence[TokenAlternatives]) -> SoftMark | None:
    """sum k p(k) / sum p(k) at the token that follows `"score":`; None if that token is no mark of its own.

    Spellings of a mark (a space or a quote before it, a brace after it) are summed.
    """
    text = "".join(token.token for token in tokens)
    keys = list(_SCORE_KEY.finditer(text))
    if not keys:
        return None
    place, end = keys[-1].end(), 0
    for token in tokens:
        end += len(token.token)
        if end > place:
            return _mean_mark(token)
    return None


def _mean_mark(token: TokenAlternatives) -> SoftMark | None:
    chosen = _MARK.fullmatch(token.token)
    if chosen is None:
        return None
    probability_by_mark = dict.fromkeys("12345", 0.0)
    for text, logprob in token.logprob_by_token.items():
        match = _MARK.fullmatch(text)
        if match is not None:
            probability_by_mark[match.group(1)] += math.exp(logprob)
    mass = sum(probability_by_mark.values())
    if not mass > 0:
        return None
    mean = sum(int(mark) * p for mark, p in probability_by_mark.items()) / mass
    return SoftMark(int(chosen.group(1)), mean, min(1.0, mass), probability_by_mark)
