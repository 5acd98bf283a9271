"""Numbers of one step, from its groups: rewards, failures, ages, phases, calls of the network. Pure."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from learner.ages import AGES, bucket
from raylign.types import Exploration, RolloutGroup, RolloutStatus, StepResult, TokenTrajectory, WeightVersion
from rollout.rank_agreement import kendall, recall, spearman

_COMPARED_SIDE = 256
"""Pixels of the longer side from which on pictures are compared at every n-th pixel only."""


def step_metrics(
    groups: Sequence[RolloutGroup], version: WeightVersion, phases: Mapping[str, float], seconds: float
) -> dict[str, float]:
    """The step's line of metrics.jsonl, but for what the learner reports.

    `phases` are wall seconds by phase of the loop; "evaluate" is left out of the throughput. "sample", "decode"
    and "reward" come from the groups: busy seconds of the workers, which overlap each other on the wall. Where drafts
    are explored these hold both rounds, and "draft", "regenerate", "select" and "draft_reward" tell them apart.
    """
    metrics: dict[str, float] = {"weight_version": version}
    metrics |= reward_metrics(groups, "reward")
    metrics |= text_metrics(groups)
    metrics |= explore_metrics(groups)
    busy: Counter[str] = Counter()
    for group in groups:
        busy.update(group.seconds)
    metrics |= {f"busy/{phase}_s": value for phase, value in busy.items()}
    metrics |= {f"time/{phase}_s": value for phase, value in phases.items()}
    metrics["time/step_s"] = seconds
    accounted = sum(phases.values())
    metrics["time/other_s"] = max(0.0, seconds - accounted)
    num_samples = sum(group.group_size for group in groups)
    metrics["throughput/samples_per_s"] = num_samples / max(seconds - phases.get("evaluate", 0.0), 1e-9)
    metrics |= staleness_metrics(groups, version - 1)
    for status in RolloutStatus:
        if status is not RolloutStatus.OK:
            metrics[f"failed/{status}"] = sum(r.status is status for g in groups for r in g.rollouts)
    return metrics


def staleness_metrics(groups: Sequence[RolloutGroup], newest: WeightVersion) -> dict[str, float]:
    """How many versions older than `newest` the weights were that drew each sample: mean, greatest, and how many
    samples there are of each age, `samples/age_0` and on (the last of `learner.ages.AGES` is open); no empty ones."""
    ages = [newest - rollout.min_version for group in groups for rollout in group.rollouts]
    counts = Counter(bucket(age) for age in ages)
    histogram = {f"samples/{age}": float(counts[age]) for age in AGES if counts[age]}
    return {"staleness/mean": statistics.fmean(ages), "staleness/max": max(ages), **histogram}


def over_updates(results: Sequence[StepResult]) -> dict[str, float]:
    """The learner's metrics over a step's updates: the greatest of those named `…_max`, the mean of the others."""
    names = dict.fromkeys(name for result in results for name in result.metrics)
    values = {name: [result.metrics[name] for result in results if name in result.metrics] for name in names}
    return {name: max(some) if name.endswith("_max") else statistics.fmean(some) for name, some in values.items()}


def reward_metrics(groups: Sequence[RolloutGroup], prefix: str) -> dict[str, float]:
    """Means over samples that have them: `<prefix>/mean`, `<prefix>/<name>`, and numeric details.

    A detail that is a boolean or a number, such as OCR's "exact", becomes `<prefix>/<name>/<detail>`.
    """
    values: dict[str, list[float]] = {}
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        if rollout.reward is None:
            continue
        if rollout.reward.total is not None:
            values.setdefault(f"{prefix}/mean", []).append(rollout.reward.total)
        for score in rollout.reward.scores:
            if score.value is None:
                continue
            values.setdefault(f"{prefix}/{score.name}", []).append(score.value)
            for detail, value in score.details.items():
                if isinstance(value, (bool, int, float)):
                    values.setdefault(f"{prefix}/{score.name}/{detail}", []).append(float(value))
    metrics = {name: statistics.fmean(numbers) for name, numbers in values.items()}
    spreads = [statistics.pstdev(totals) for group in groups if len(totals := valid_totals(group)) > 1]
    if spreads:
        metrics[f"{prefix}/std_within_group"] = statistics.fmean(spreads)
    return metrics


def eval_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """A held-out evaluation: reward means, how many samples have none ("failed"), and diversity."""
    metrics = reward_metrics(groups, "eval")
    metrics["eval/failed"] = float(failed_samples(groups)[0])
    metrics |= {f"eval/{name.removesuffix('/mean')}": value for name, value in text_metrics(groups).items()}
    spread = diversity(groups)
    if spread is not None:
        metrics["eval/diversity"] = spread
    return metrics


def text_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Of texts: calls of the network (NFE) per sample, those that computed a part only, entropy budget, characters.

    NFE is counted per sample until it is done; {} for pictures, which all take the sampler's steps.
    """
    tokens = [group.trajectory for group in groups if isinstance(group.trajectory, TokenTrajectory)]
    if not tokens:
        return {}
    budgets = [one.log_gamma_G for one in tokens if one.log_gamma_G is not None]
    means = {
        "nfe/mean": [float(nfe) for one in tokens for nfe in one.nfe_G.tolist()],
        "cached_calls/mean": [float(calls) for one in tokens for calls in one.cached_calls_G.tolist()],
        "gamma/mean": [math.exp(log) for log_gamma_G in budgets for log in log_gamma_G.tolist()],
        "characters/mean": [float(len(text)) for group in groups for text in group.texts or ()],
    }
    return {name: statistics.fmean(values) for name, values in means.items() if values}


def explore_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Of groups that were chosen among drafts: how well drafts foretold rewards, and what the choice did to them.

    Means over groups: `explore/kendall`, `explore/spearman` and `explore/recall` (of the better half) compare the
    chosen drafts' rewards with those of the same keys drawn again; `explore/spread` is the deviation of the chosen
    over that of the pool, whose mean reward is `explore/reward_pool_mean`. A number that no group has is left out: a
    ranking without two rewards, drafts that were not drawn again. `failed/drafts` counts drafts without a reward.
    """
    explored = [(group, group.exploration) for group in groups if group.exploration is not None]
    if not explored:
        return {}
    values: dict[str, list[float | None]] = {"kendall": [], "spearman": [], "recall": [], "spread": []}
    values["reward_pool_mean"] = []
    for group, seen in explored:
        pool = [total for total in seen.totals if total is not None]
        values["reward_pool_mean"].append(statistics.fmean(pool) if pool else None)
        finals, deviation = valid_totals(group), statistics.pstdev(pool or [0.0])
        values["spread"].append(statistics.pstdev(finals) / deviation if deviation and finals else None)
        pairs = draft_and_final(group, seen)
        if len(pairs) < 2 or not seen.redrawn:
            continue
        drafts, again = [draft for draft, _ in pairs], [final for _, final in pairs]
        values["kendall"].append(kendall(drafts, again))
        values["spearman"].append(spearman(drafts, again))
        values["recall"].append(recall(drafts, again, len(pairs) // 2))
    known = {name: [value for value in some if value is not None] for name, some in values.items()}
    metrics = {f"explore/{name}": statistics.fmean(some) for name, some in known.items() if some}
    return metrics | {"failed/drafts": float(sum(seen.num_failed for _, seen in explored))}


def draft_and_final(group: RolloutGroup, seen: Exploration) -> list[tuple[float, float]]:
    """(draft reward, final reward) of each sibling that has both."""
    draft_of = dict(zip(seen.indices, seen.totals, strict=True))
    pairs = [(draft_of[rollout.key.sample_index], rollout.total) for rollout in group.rollouts]
    return [(draft, final) for draft, final in pairs if draft is not None and final is not None]


def valid_totals(group: RolloutGroup) -> list[float]:
    """The mixed rewards of the siblings that have one."""
    return [rollout.total for rollout in group.rollouts if rollout.total is not None]


def failed_samples(groups: Sequence[RolloutGroup]) -> tuple[int, str]:
    """How many samples have no reward, and the first cause in words ("" if none)."""
    failed, cause = 0, ""
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        if rollout.status is RolloutStatus.OK:
            continue
        failed += 1
        if not cause and rollout.reward is not None:
            errors = [f"{s.name}: {s.error.code}: {s.error.message}" for s in rollout.reward.scores if s.error]
            cause = errors[0] if errors else str(rollout.reward.failure and rollout.reward.failure.message)
    return failed, cause


def diversity(groups: Sequence[RolloutGroup]) -> float | None:
    """How unlike two samples of one prompt are, in [0, 1]; None without pairs.

    Pictures: mean root-mean-square pixel distance, at every n-th pixel of large ones. Texts: the share of pairs that
    are not equal. A reward that does not ask for variety lets it collapse, so it is shown next to the reward.
    """
    distances: list[float] = []
    for group in groups:
        if group.texts is not None:
            distances += [float(one != other) for one, other in itertools.combinations(group.texts, 2)]
        if group.images_GHWC is None:
            continue
        stride = max(1, max(group.images_GHWC.shape[1:3]) // _COMPARED_SIDE)
        seen_GHWC = group.images_GHWC[:, ::stride, ::stride]
        pictures = seen_GHWC.astype(np.float32).reshape(group.group_size, -1) / 255.0
        distances += [float(np.sqrt(np.mean((one - other) ** 2))) for one, other in itertools.combinations(pictures, 2)]
    return statistics.fmean(distances) if distances else None
