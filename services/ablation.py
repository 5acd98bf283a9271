"""What an ablation of the entropy budget says: comparisons at matched calls, tables and words. Pure.

A learned budget draws each answer with a budget of its own, so it may only be compared at matched calls. Two frontiers
of constant budgets are held against its operating point (accuracy a at n calls):

    constant, same weights     a - (the learned run's own weights at n calls): what choosing budgets per prompt adds
    variant `fixed`/`sampled`  a - (that run's weights at n calls): what training with the controller adds in all

The differences are per seed, and summed up as their mean and range. An error is the larger of what the spread over
seeds explains and what the sampling of held-out answers does; a difference within two errors is none to speak of.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.frontier import Estimate, FrontierPoint, FrontierSeries, Quality, accuracy_at, mean_point, mean_points
from services.frontier_picture import Curve

CONTROLLER = "learned"
SAME_WEIGHTS = "constant, same weights"
TITLES: Mapping[str, str] = {
    "one_token": "one token per call",
    "fixed": "fixed budget",
    "sampled": "sampled budgets",
    CONTROLLER: "learned budgets",
}


@dataclass(frozen=True, slots=True)
class SeedResult:
    """One finished run: before and after training."""

    variant: str
    seed: int
    before: FrontierSeries
    after: FrontierSeries


@dataclass(frozen=True, slots=True)
class Difference:
    """The controller's accuracy minus another's at the same calls, over the seeds where both reach them."""

    against: str
    by_seed: Mapping[int, Estimate]
    unreached: int
    """Seeds where the other needs more calls than the controller takes."""

    @property
    def values(self) -> list[float]:
        return [one.value for one in self.by_seed.values()]

    @property
    def mean(self) -> Estimate | None:
        """Mean over seeds with its error; None without a seed."""
        if not self.values:
            return None
        sampling = [one.error for one in self.by_seed.values() if one.error is not None]
        errors = [math.hypot(*sampling) / len(sampling)] if sampling else []
        if len(self.values) > 1:
            errors.append(statistics.stdev(self.values) / math.sqrt(len(self.values)))
        return Estimate(statistics.fmean(self.values), max(errors) if errors else None)


def differences(results: Sequence[SeedResult]) -> list[Difference]:
    """The controller against its own weights at a constant budget, and against each other variant."""
    runs = {(result.variant, result.seed): result.after for result in results}
    others = [variant for variant in TITLES if variant != CONTROLLER and any(v == variant for v, _ in runs)]
    found: list[Difference] = []
    for against in (SAME_WEIGHTS, *others):
        by_seed: dict[int, Estimate] = {}
        unreached = 0
        for (variant, seed), learned in runs.items():
            other = learned if against == SAME_WEIGHTS else runs.get((against, seed))
            if variant != CONTROLLER or learned.own is None or other is None:
                continue
            own = () if against == SAME_WEIGHTS or other.own is None else (other.own,)
            difference = _minus(learned.own, (*other.points, *own))
            if difference is None:
                unreached += 1
            else:
                by_seed[seed] = difference
        if by_seed or unreached:
            found.append(Difference(against, by_seed, unreached))
    return found


def at_matched_calls(results: Sequence[SeedResult], calls: Sequence[float]) -> dict[str, list[Estimate | None]]:
    """Accuracy of each variant's mean constant-budget frontier at given calls; the untrained model as "base"."""
    return {
        name: [accuracy_at(curve.points, nfe) for nfe in calls]
        for name, curve in zip(_names(results), curves(results), strict=True)
    }


def matched_calls(results: Sequence[SeedResult]) -> list[float]:
    """Calls at which variants are compared: each one's mean operating point, fewest first, near ones once."""
    chosen: list[float] = []
    for curve in curves(results)[1:]:
        if curve.own is not None and not any(abs(curve.own.nfe - one) < 0.02 * one for one in chosen):
            chosen.append(curve.own.nfe)
    return sorted(chosen)


def curves(results: Sequence[SeedResult]) -> list[Curve]:
    """The picture's curves: the base, then each variant as the mean of its seeds, with the seeds behind."""
    if not results:
        return []
    # Every variant of a seed starts from the same model and draws the same answers from it.
    base = {result.seed: result.before.points for result in results}
    drawn = [Curve("before training", mean_points(list(base.values())), base=True)]
    for variant in _names(results)[1:]:
        seeds = [result.after for result in results if result.variant == variant]
        own = [one.own for one in seeds if one.own is not None]
        drawn.append(
            Curve(
                TITLES.get(variant, variant),
                mean_points([one.points for one in seeds]),
                mean_point(own) if own else None,
                [one.points for one in seeds] if len(seeds) > 1 else (),
            )
        )
    return drawn


def own_points(results: Sequence[SeedResult], variant: str) -> list[FrontierPoint]:
    """A variant's operating points, by seed."""
    return [one.after.own for one in results if one.variant == variant and one.after.own is not None]


def levels(results: Sequence[SeedResult]) -> dict[str, dict[str, FrontierPoint]]:
    """Difficulty → variant → its operating point on those prompts; {} where prompts do not tell how hard they are."""
    table: dict[str, dict[str, FrontierPoint]] = {}
    for variant in _names(results)[1:]:
        points = own_points(results, variant)
        if points:
            for level, point in mean_point(points).levels.items():
                table.setdefault(level, {})[variant] = point
    return table


def in_words(results: Sequence[SeedResult], quality: Quality) -> list[str]:
    """What the controller adds, as sentences; also why nothing can be said."""
    if not own_points(results, CONTROLLER):
        return ["No run with learned budgets is finished, so what the controller adds cannot be said yet."]
    own = mean_point(own_points(results, CONTROLLER))
    what = "solves {} of the held-out prompts exactly" if quality == "exact" else "has a mean reward of {}"
    solved = what.format(share(own.accuracy, quality))
    sentences = [f"With learned budgets the model {solved}, at {own.nfe:.2f} calls per answer."]
    sentences += [_sentence(one, quality) for one in differences(results)]
    seeds = len({result.seed for result in results if result.variant == CONTROLLER})
    if seeds == 1:
        sentences.append(
            "This is one seed: the errors are those of sampling the held-out answers alone, and runs with other seeds "
            "differ by more. Give --seeds 3 before you believe a small difference."
        )
    sentences.append(_sentence_on_levels(results))
    return [sentence for sentence in sentences if sentence]


def share(value: float, quality: Quality) -> str:
    """An accuracy: percent of prompts, or a reward."""
    return f"{100 * value:.1f} %" if quality == "exact" else f"{value:.3f}"


def signed(difference: Estimate | None, quality: Quality) -> str:
    """A difference with its error: points of percent for shares of solved prompts, else the number."""
    if difference is None:
        return "–"
    factor, digits, unit = (100, 1, " points") if quality == "exact" else (1, 3, "")
    error = "" if difference.error is None else f" ± {factor * difference.error:.{digits}f}"
    return f"{factor * difference.value:+.{digits}f}{error}{unit}"


def _sentence(difference: Difference, quality: Quality) -> str:
    against = {
        SAME_WEIGHTS: "a constant budget with the same weights (what choosing per prompt adds by itself)",
        "one_token": "a model trained with one token per call",
        "fixed": "a model trained with a fixed budget",
        "sampled": "a model trained with sampled budgets",
    }[difference.against]
    mean = difference.mean
    if mean is None:
        return f"Against {against}: it takes fewer calls than that was swept at, so there is nothing to compare."
    spread = ""
    if len(difference.values) > 1:
        low, high = (signed(Estimate(one, None), quality) for one in (min(difference.values), max(difference.values)))
        spread = f" (from {low} to {high} over {len(difference.values)} seeds)"
    verdict = "more than chance explains" if mean.error and abs(mean.value) > 2 * mean.error else "no clear difference"
    if mean.error is None:
        verdict = "with an unknown error"
    return f"Against {against}, at the same calls: {signed(mean, quality)}{spread}, {verdict}."


def _sentence_on_levels(results: Sequence[SeedResult]) -> str:
    """Whether the controller spends more calls where prompts are harder."""
    by_level = [(level, row[CONTROLLER]) for level, row in levels(results).items() if CONTROLLER in row]
    if len(by_level) < 2:
        return "The prompts do not tell how hard they are, so it cannot be seen whether budgets follow difficulty."
    budgets = [(level, point) for level, point in by_level if point.gamma is not None]
    if len(budgets) < 2:
        return ""
    low = min(budgets, key=lambda item: item[1].gamma or 0.0)
    high = max(budgets, key=lambda item: item[1].gamma or 0.0)
    return (
        f"Its mean budget ranges from {low[1].gamma:.3g} ({low[0]}, {low[1].nfe:.2f} calls) to {high[1].gamma:.3g} "
        f"({high[0]}, {high[1].nfe:.2f} calls)."
    )


def _minus(own: FrontierPoint, points: Sequence[FrontierPoint]) -> Estimate | None:
    other = accuracy_at(points, own.nfe)
    if other is None:
        return None
    # As if independent; they share prompts, so the real error is smaller rather than larger.
    error = None if own.error is None or other.error is None else math.hypot(own.error, other.error)
    return Estimate(own.accuracy - other.value, error)


def _names(results: Sequence[SeedResult]) -> list[str]:
    """ "base", then the variants that have results, in the order of the table."""
    return ["base", *(variant for variant in TITLES if any(result.variant == variant for result in results))]
