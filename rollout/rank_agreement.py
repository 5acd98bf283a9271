"""How well drafts foretell what their keys are worth at full quality: rank correlation and recall.

Of pairs (draft reward, final reward) of one prompt. Without two different rewards on either side there is no ranking
to agree with, and the answer is None: not 0, and not 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def kendall(drafts: Sequence[float], finals: Sequence[float]) -> float | None:
    """Kendall's tau-b: concordant less discordant pairs, over the pairs that are tied on neither side."""
    from scipy.stats import kendalltau  # not when a configuration is read

    if not _ranked(drafts, finals):
        return None
    measured: Any = kendalltau(drafts, finals)
    return float(measured.statistic)


def spearman(drafts: Sequence[float], finals: Sequence[float]) -> float | None:
    """Spearman's rho: Pearson's correlation of the ranks, tied ones at their mean."""
    from scipy.stats import spearmanr

    if not _ranked(drafts, finals):
        return None
    measured: Any = spearmanr(drafts, finals)
    return float(measured.statistic)


def recall(drafts: Sequence[float], finals: Sequence[float], k: int) -> float | None:
    """Which share of the k best drafts is worth no less in the end than the k-th best of all finals.

    So a tie at the border counts as found: whichever of equal samples is taken, it is as good. Equal drafts are taken
    in the pool's order.
    """
    if not _ranked(drafts, finals):
        return None
    best = sorted(range(len(drafts)), key=lambda place: (-drafts[place], place))[:k]
    border = sorted(finals, reverse=True)[k - 1]
    return sum(finals[place] >= border for place in best) / k


def _ranked(drafts: Sequence[float], finals: Sequence[float]) -> bool:
    return len(set(drafts)) > 1 and len(set(finals)) > 1
