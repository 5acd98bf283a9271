"""When an asynchronous run becomes synchronous and comes back: the guard alone, and what a configuration may ask."""

from __future__ import annotations

import math
from typing import Any

import pytest

from raylign.config import parse_config
from raylign.errors import ConfigError
from services.config import RunConfig
from services.staleness import AsyncGuardConfig, StalenessGuard


def step(deviation: float | None = None, kl: float | None = None, age: int = 0) -> dict[str, float]:
    """A step's metrics."""
    values = {"behaviour/deviation": deviation, "loss/kl": kl, "staleness/max": age}
    return {name: float(value) for name, value in values.items() if value is not None}


def guard(max_staleness: int = 2, **keys: Any) -> StalenessGuard:
    return StalenessGuard(AsyncGuardConfig.model_validate(keys), max_staleness)


@pytest.mark.parametrize(
    ("keys", "metrics", "band"),
    [
        ({}, step(deviation=0.0499), None),
        ({}, step(deviation=0.0501), "deviation"),
        ({}, step(deviation=math.nan), "deviation"),
        ({"max_deviation": 1e9}, step(deviation=5.0), None),
        ({"max_deviation": 1.0}, step(deviation=0.5), None),
        ({}, step(kl=100.0), None),
        ({"max_kl": 0.1}, step(kl=0.11), "kl"),
        ({"max_kl": 0.1}, step(kl=0.1), None),
        ({"max_kl": 0.1}, step(deviation=0.5, kl=0.2), "deviation"),
        ({"max_kl": 0.1}, step(), None),
    ],
)
def test_a_step_outside_of_a_band_lowers_the_limit_to_0(
    keys: dict[str, Any], metrics: dict[str, float], band: str | None
) -> None:
    watching = guard(**keys)
    assert watching.after_step(metrics) == band
    assert watching.limit == (2 if band is None else 0)
    # What happened is told once; the limit is told as long as it lasts.
    assert watching.after_step(metrics) is None


def test_by_default_it_never_comes_back() -> None:
    watching = guard()
    assert watching.after_step(step(deviation=1.0)) == "deviation"
    assert [watching.after_step(step(deviation=0.0)) for _ in range(50)] == [None] * 50
    assert watching.limit == 0


def test_it_comes_back_after_good_steps_in_a_row_that_had_no_older_samples() -> None:
    watching = guard(return_after_steps=3)
    watching.after_step(step(deviation=1.0))
    seen = [watching.after_step(step(deviation=d, age=a)) for d, a in [(0, 2), (0, 1), (0, 0), (0, 0), (9, 0)]]
    assert seen == [None] * 5, "old samples do not count, and a bad step starts the count anew"
    assert [watching.after_step(step(deviation=0.0)) for _ in range(3)] == [None, None, "returned"]
    assert watching.limit == 2
    assert watching.after_step(step(deviation=1.0)) == "deviation", "and it may fall again"


def test_a_parity_gap_may_wait_for_the_groups_that_were_admitted_and_no_longer() -> None:
    watching = guard()
    assert watching.forgives_gap(version=5, last_admitted_step=8)
    assert watching.gap(8) == "parity"
    assert watching.limit == 0
    assert [version for version in range(5, 12) if watching.wants_parity(version)] == [8]
    assert watching.forgives_gap(version=6, last_admitted_step=8), "an interval's check while the buffer runs empty"
    assert watching.gap(8) is None
    assert not watching.forgives_gap(version=8, last_admitted_step=8)


@pytest.mark.parametrize(("max_staleness", "parity"), [(0, True), (2, False)])
def test_a_gap_stops_the_run_at_once_when_it_is_synchronous_or_told_so(max_staleness: int, parity: bool) -> None:
    assert not guard(max_staleness, parity=parity).forgives_gap(version=5, last_admitted_step=8)


def test_events_are_metrics_of_asynchronous_runs_alone() -> None:
    watching = guard()
    assert watching.metrics([]) == {
        "staleness/limit": 2.0,
        "async/returned": 0.0,
        "failed/async_parity": 0.0,
        "failed/async_deviation": 0.0,
        "failed/async_kl": 0.0,
    }
    band = watching.after_step(step(deviation=1.0))
    assert band is not None
    told = watching.metrics([band])
    assert (told["staleness/limit"], told["failed/async_deviation"], told["failed/async_kl"]) == (0.0, 1.0, 0.0)
    assert guard(0).metrics([]) == {}


def test_its_state_goes_on_elsewhere() -> None:
    one, other = guard(return_after_steps=2), guard(return_after_steps=2)
    one.gap(7)
    one.after_step(step())
    other.restore(one.state())
    assert other.wants_parity(7)
    assert other.limit == 0
    assert other.after_step(step()) == one.after_step(step()) == "returned"


def test_a_state_does_not_raise_the_limit_of_a_run_that_allows_less() -> None:
    lower = guard(1)
    lower.restore(guard(4).state())
    assert lower.limit == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"async_guard": {"max_deviation": 0.1}}, r"max_staleness is 0; raise it, or remove the table"),
        (
            {"max_staleness": 1, "async_guard": {"max_kl": 0.5}, "algorithm": {"type": "nft", "kl_weight": 0}},
            r"async_guard.max_kl = 0.5 .*'nft' does not measure with kl_weight = 0; set algorithm.kl_weight above 0",
        ),
        ({"max_staleness": 1, "async_guard": {"max_deviation": 0}}, "async_guard.max_deviation"),
        ({"max_staleness": 1, "async_guard": {"max_deviatoin": 1}}, "did you mean `max_deviation`"),
        (
            {"max_staleness": 2, "algorithm": {"type": "flow_grpo"}, "sampler": {"type": "flow_sde"}},
            r"policies up to that many versions old; set algorithm.staleness_correction = 'decoupled'",
        ),
    ],
)
def test_impossible_asynchronous_runs_are_refused_with_the_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(RunConfig, settings, "test")


def test_asynchronous_runs_that_are_whole_are_taken() -> None:
    settings: dict[str, Any] = {"max_staleness": 4, "async_guard": {"max_kl": 0.5, "return_after_steps": 10}}
    assert parse_config(RunConfig, settings, "test").async_guard.return_after_steps == 10
    settings["algorithm"] = {"type": "flow_grpo", "staleness_correction": "decoupled"}
    assert parse_config(RunConfig, settings | {"sampler": {"type": "flow_sde"}}, "test").max_staleness == 4
