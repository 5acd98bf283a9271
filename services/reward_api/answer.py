"""From scores to the answer: normalising, mixing, statuses, and the two cases in which nothing was answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import cast

from pydantic import JsonValue

from raylign.types import RewardFailure, RewardSample, RewardScore
from rewards.base import RewardAsk
from rewards.mix import Total, Values, affine, group_normalised, weighted_sums
from rewards.wire import Aggregate, Component, SampleResult, Status, plain_json, wire_error
from services.reward_api.refusals import ApiError, retry_after

Scores = Mapping[str, Sequence[RewardScore]]


def refuse_if_nothing_answered(scores: Scores, late: bool, retry_after_s: float) -> None:
    """Raise ApiError 429 if every reward was too busy for every sample, 504 if none was done by the deadline."""
    codes = {score.error.code if score.error else "ok" for column in scores.values() for score in column}
    if codes == {"overloaded"}:
        raise ApiError(429, "overloaded", "every reward's queue is full", retry_after(retry_after_s))
    if codes == {"timeout"} and late:
        raise deadline_passed()


def deadline_passed() -> ApiError:
    """504: nothing was scored in time."""
    return ApiError(504, "timeout", "no reward answered before the deadline; send fewer samples or allow more time")


def results_of(
    read: Sequence[tuple[str, RewardSample | RewardFailure]],
    scores: Scores,
    asks: Sequence[RewardAsk],
    aggregate: Aggregate,
    bounds: Mapping[str, tuple[float, float, bool]],
    with_details: bool,
) -> list[SampleResult]:
    """One result per sample of the request. `scores` cover those that could be read, in order."""
    group_ids = [sample.group_id for _, sample in read if isinstance(sample, RewardSample)]
    values = _normalised(scores, asks, aggregate, bounds, group_ids)
    totals = weighted_sums(values, asks)
    results: list[SampleResult] = []
    place = 0
    for sample_id, sample in read:
        if isinstance(sample, RewardFailure):
            status = cast("Status", sample.code)
            results.append(
                SampleResult(id=sample_id, status=status, reward=None, components={}, error=wire_error(sample))
            )
            continue
        components = {
            ask.name: _component(scores[ask.name][place], values[ask.name][place], ask, with_details) for ask in asks
        }
        results.append(_result(sample_id, totals[place], components, aggregate))
        place += 1
    return results


def counts_of(results: Sequence[SampleResult]) -> dict[str, int]:
    """Results per status."""
    return dict(Counter(result.status for result in results))


def ranking_of(results: Sequence[SampleResult]) -> tuple[str, ...]:
    """Ids by falling reward; equal ones stay in order."""
    ranked = [(result.reward, result.id) for result in results if result.reward is not None]
    return tuple(sample_id for _, sample_id in sorted(ranked, key=lambda pair: -pair[0]))


def _normalised(
    scores: Scores,
    asks: Sequence[RewardAsk],
    aggregate: Aggregate,
    bounds: Mapping[str, tuple[float, float, bool]],
    group_ids: Sequence[str],
) -> Mapping[str, Values]:
    raw = {ask.name: [score.value for score in scores[ask.name]] for ask in asks}
    if aggregate.method == "group_normalised":
        return group_normalised(raw, asks, group_ids)
    if aggregate.normalise == "affine":
        return {name: affine(column, bounds[name][:2], bounds[name][2]) for name, column in raw.items()}
    return raw


def _component(score: RewardScore, value: float | None, ask: RewardAsk, with_details: bool) -> Component:
    details = cast("dict[str, JsonValue]", plain_json(score.details)) if with_details else {}
    return Component(
        raw=score.value,
        value=value,
        weight=ask.weight,
        required=ask.required,
        # Every code comes from rewards.base.FailureCode; Component refuses any other.
        status="ok" if score.error is None else cast("Status", score.error.code),
        error=wire_error(score.error),
        version=score.version,
        model_fingerprint=score.fingerprint,
        cache=score.cache,
        latency_ms=score.seconds * 1000,
        details=details,
    )


def _result(sample_id: str, total: Total, components: Mapping[str, Component], aggregate: Aggregate) -> SampleResult:
    return SampleResult(
        id=sample_id,
        status=_status(total, list(components.values())),
        reward=total.value if aggregate.method != "none" else None,
        components=dict(components),
        flags=("renormalised",) if total.renormalised and aggregate.method != "none" else (),
    )


def _status(total: Total, components: Sequence[Component]) -> Status:
    """The status that explains a missing total best."""
    if total.value is not None:
        return "ok"
    failed = [component for component in components if component.status != "ok"]
    required = [component for component in failed if component.required]
    # Without a failed reward it was the weighted sum that overflowed.
    return (required or failed)[0].status if failed else "out_of_range"
