"""The guard's decisions on hand-made curves: what trips which signal, when it acts again, and what it does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import pytest

from raylign.config import parse_config
from services.guard import AGREEMENT, GuardState, Verdict, judge, replay
from services.guard_config import GuardConfig, Watched

NAMES = Watched(trained={"ocr": 1.0}, held_out=("reader",), statistics=("sharpness",))
TWO = Watched(trained={"ocr": 1.0, "bright": 0.5}, held_out=("reader",), statistics=())


def config(**table: object) -> GuardConfig:
    return parse_config(GuardConfig, table, "test")


def evaluation(step: int, **means: float) -> dict[str, float]:
    return {"step": step, **{f"eval/{name}": value for name, value in means.items()}}


def curve(ocr: Sequence[float], reader: Sequence[float]) -> list[dict[str, float]]:
    return [evaluation(step, ocr=o, reader=r) for step, (o, r) in enumerate(zip(ocr, reader, strict=True))]


def acted(verdicts: Sequence[Verdict]) -> list[tuple[int, str]]:
    return [(event.step, event.signal) for verdict in verdicts for event in verdict.events]


def test_a_reward_that_rises_while_the_held_out_metric_falls_trips_divergence() -> None:
    # 4 % of the best, 0.80, is 0.032: 0.77 is within, 0.76 is 5 % below.
    state, verdicts = replay(config(), NAMES, curve([0.5, 0.6, 0.7, 0.8, 0.9], [0.6, 0.8, 0.79, 0.77, 0.76]))
    assert acted(verdicts) == [(4, "divergence")]
    assert verdicts[4].metrics["guard/divergence"] == pytest.approx((0.80 - 0.76) / 0.80 / 0.04)
    assert verdicts[4].metrics["guard/did_warn"] == 1.0
    told = state.events[0].told
    assert "reader fell from 0.800 to 0.760" in told
    assert "from 0.600 to 0.900" in told


def test_a_run_that_loses_both_is_not_hacked_until_it_has_lost_much() -> None:
    _, verdicts = replay(config(), NAMES, curve([0.6, 0.5, 0.4, 0.3], [0.8, 0.75, 0.70, 0.67]))
    assert acted(verdicts) == [(3, "held_out")]
    assert [verdict.metrics["guard/divergence"] for verdict in verdicts] == [0, 0, 0, 0]


def test_what_the_reward_lost_as_well_is_no_divergence() -> None:
    # The metric lost 6 % of its best; 3 % and 1 % of those the reward lost too.
    _, verdicts = replay(config(), NAMES, curve([1.0, 0.97, 0.99], [0.5, 0.47, 0.47]))
    assert [verdict.metrics["guard/divergence"] for verdict in verdicts] == pytest.approx([0, 0.03 / 0.04, 0.05 / 0.04])
    assert acted(verdicts) == [(2, "divergence")]


def test_a_run_that_gains_both_trips_nothing() -> None:
    _, verdicts = replay(config(), NAMES, curve([0.45, 0.9, 0.95, 0.99], [0.4, 0.88, 0.96, 0.95]))
    assert acted(verdicts) == []


def test_a_fall_within_the_noise_is_no_fall() -> None:
    rows = curve([0.5, 0.6], [0.8, 0.75])
    assert acted(replay(config(), NAMES, rows)[1]) == [(1, "divergence")]
    # Half of 0.12 is 0.06, and 0.05 was lost.
    rows[1]["ci95/eval/reader"] = 0.12
    assert acted(replay(config(), NAMES, rows)[1]) == []
    rows[1]["ci95/eval/reader"] = 0.09
    assert acted(replay(config(), NAMES, rows)[1]) == [(1, "divergence")]


def test_what_tripped_must_come_half_way_back_before_it_trips_anew() -> None:
    reader = [1.0, 0.95, 0.97, 0.95, 0.99, 0.95]
    _, verdicts = replay(config(act_again_after=9), NAMES, curve([0.5] * 6, reader))
    # 0.97 is 3 %, below the limit of 4 but not below 2; 0.99 is.
    assert acted(verdicts) == [(1, "divergence"), (5, "divergence")]
    assert [verdict.metrics["guard/tripped"] for verdict in verdicts] == [0, 1, 1, 1, 0, 1]


def test_what_stays_beyond_the_limit_acts_once_more_after_a_while() -> None:
    settings = config(act_again_after=2, max_fall=0.9, actions={"divergence": ["lower_lr"]}, lr_factor=0.5)
    state, verdicts = replay(settings, NAMES, curve([0.5] * 6, [1.0, 0.9, 0.9, 0.9, 0.9, 0.9]))
    assert [step for step, _ in acted(verdicts)] == [1, 3, 5]
    assert state.lr_scale == 0.125
    assert [verdict.adjust for verdict in verdicts] == [False, True, False, True, False, True]


def test_diversity_is_asked_only_where_the_held_out_metric_does_not_explain_it() -> None:
    def spread(reader: float) -> list[dict[str, float]]:
        return [
            evaluation(0, ocr=0.5, reader=0.5, diversity=0.2),
            evaluation(1, ocr=0.6, reader=reader, diversity=0.03),
        ]

    assert acted(replay(config(), NAMES, spread(reader=0.5))[1]) == [(1, "diversity")]
    assert acted(replay(config(), NAMES, spread(reader=0.9))[1]) == []
    # 0.03 of 0.2 is 15 %, and a tenth may be left.
    assert acted(replay(config(min_diversity=0.1), NAMES, spread(reader=0.5))[1]) == []
    nothing_held_out = Watched({"ocr": 1.0}, (), ())
    assert acted(replay(config(), nothing_held_out, spread(reader=0.5))[1]) == []


@pytest.mark.parametrize(
    ("sharpness", "trips"), [(0.05, False), (0.2, False), (0.26, True), (0.009, True), (0.0, True)]
)
def test_a_statistic_may_move_by_a_factor_either_way(sharpness: float, trips: bool) -> None:
    rows = [evaluation(0, ocr=0.5, sharpness=0.05), evaluation(1, ocr=0.5, sharpness=sharpness)]
    assert acted(replay(config(), NAMES, rows)[1]) == ([(1, "artefacts")] if trips else [])


def test_rewards_that_no_longer_agree_are_told_of() -> None:
    def rows(late: float) -> list[dict[str, float]]:
        values = [0.6, 0.4, 0.5, 0.5, 0.5, *[late] * 6]
        return [{"step": step, AGREEMENT: value} for step, value in enumerate(values, 1)]

    # The mean of the first five is 0.5. At -0.1 the mean of five falls by 0.12 a step: 0.5 only with the fifth.
    assert acted(replay(config(), TWO, rows(late=-0.1))[1]) == [(10, "disagreement")]
    assert acted(replay(config(), TWO, rows(late=0.05))[1]) == []


def test_the_kl_band_is_a_mean_over_five_steps_and_not_watched_when_not_given() -> None:
    rows = [
        {"step": float(step), "loss/kl": value} for step, value in enumerate([0.0, 0.0, 0.0, 0.0, 0.4, 0.4, 0.4], 1)
    ]
    assert acted(replay(config(), NAMES, rows)[1]) == []
    assert acted(replay(config(max_kl=0.2), NAMES, rows)[1]) == [(7, "kl")]


def test_drop_reward_takes_the_one_that_rose_most_and_leaves_one() -> None:
    settings = config(act_again_after=1, actions={"divergence": ["drop_reward"]}, max_fall=0.9)
    rows = [
        evaluation(0, ocr=0.5, bright=0.2, reader=0.8),
        evaluation(1, ocr=0.55, bright=0.6, reader=0.7),
        # Without `bright` the trained reward lost more than the metric did, so nothing diverges.
        evaluation(2, ocr=0.4, bright=0.9, reader=0.7),
        evaluation(3, ocr=0.55, bright=0.9, reader=0.7),
    ]
    state, verdicts = replay(settings, TWO, rows)
    assert state.dropped == ("bright",)
    assert verdicts[1].metrics["guard/did_drop_reward"] == 1.0
    assert verdicts[2].metrics["guard/divergence"] == 0.0
    assert "no reward is left to drop" in state.events[-1].told
    assert "guard/did_drop_reward" not in verdicts[3].metrics
    named = config(drop="ocr", actions={"divergence": ["drop_reward"]})
    assert replay(named, TWO, rows[:2])[0].dropped == ("ocr",)


def test_it_goes_back_to_the_best_evaluation_a_few_times_and_then_stops() -> None:
    settings = config(max_rollbacks=2, max_fall=0.9, actions={"divergence": ["roll_back", "lower_lr"]})
    reader = [0.6, 0.8, 0.78, 0.7, 0.79, 0.7, 0.75]
    state, verdicts = replay(settings, NAMES, curve([0.5] * 7, reader))
    assert [verdict.is_best for verdict in verdicts] == [True, True, False, False, False, False, False]
    assert [verdict.roll_back_to for verdict in verdicts] == [None, None, None, 1, None, 1, None]
    assert [verdict.stop for verdict in verdicts] == [False] * 6 + [True]
    assert verdicts[3].metrics["guard/did_roll_back"] == 1.0
    assert verdicts[3].adjust
    assert verdicts[6].metrics["guard/did_stop"] == 1.0
    assert "gone back 2 times" in state.events[-1].told
    assert (state.best_step, state.num_rollbacks, state.lr_scale) == (1, 2, 0.125)


def test_a_run_may_go_back_and_stop_there() -> None:
    settings = config(actions={"divergence": ["roll_back", "stop"]})
    _, verdicts = replay(settings, NAMES, curve([0.5, 0.5], [0.8, 0.7]))
    assert (verdicts[1].roll_back_to, verdicts[1].stop) == (0, True)


def test_without_a_best_evaluation_there_is_nothing_to_go_back_to() -> None:
    settings = config(max_kl=0.2, actions={"kl": ["roll_back"]})
    state, verdicts = replay(settings, NAMES, [{"step": step, "loss/kl": 1.0} for step in range(1, 6)])
    assert (verdicts[4].roll_back_to, verdicts[4].stop) == (None, True)
    assert "nothing to go back to" in state.events[0].told


def test_dropping_a_reward_begins_the_agreement_anew() -> None:
    settings = config(actions={"disagreement": ["drop_reward"]})
    values = [0.9] * 5 + [-0.9] * 5
    state, verdicts = replay(settings, TWO, [{"step": step, AGREEMENT: value} for step, value in enumerate(values, 1)])
    # 0.9 less the mean of 0.9 three times and -0.9 twice is 0.72.
    assert acted(verdicts) == [(7, "disagreement")]
    assert state.dropped == ("ocr",)
    assert (state.tripped, state.first_agreement) == ({}, (-0.9, -0.9, -0.9))


def test_an_evaluation_beyond_a_limit_is_nothing_to_go_back_to() -> None:
    settings = config(act_again_after=9, actions={"artefacts": ["roll_back"]})
    rows = [
        evaluation(0, ocr=0.5, reader=0.5, sharpness=0.01),
        evaluation(1, ocr=0.6, reader=0.9, sharpness=0.06),
    ]
    state, verdicts = replay(settings, NAMES, rows)
    assert verdicts[1].roll_back_to == 0
    assert not verdicts[1].is_best
    assert state.best_step == 0


def test_one_step_takes_each_action_once() -> None:
    both = config(max_fall=0.1, actions={"divergence": ["lower_lr"], "held_out": ["lower_lr", "stop"]})
    state, verdicts = replay(both, NAMES, curve([0.5, 0.6], [0.8, 0.6]))
    assert acted(verdicts) == [(1, "divergence"), (1, "held_out")]
    assert [event.actions for event in state.events] == [("warn", "lower_lr"), ("warn", "stop")]
    assert state.lr_scale == 0.5
    assert verdicts[1].stop


def test_raise_kl_multiplies_its_weight() -> None:
    settings = config(actions={"divergence": ["raise_kl"]}, kl_factor=3.0)
    state, verdicts = replay(settings, NAMES, curve([0.5, 0.6], [0.8, 0.7]))
    assert state.kl_scale == 3.0
    assert verdicts[1].metrics["guard/kl_scale"] == 3.0
    assert verdicts[1].adjust


def test_a_run_that_goes_on_from_its_state_decides_as_it_would_have() -> None:
    settings = config(act_again_after=2, actions={"divergence": ["lower_lr", "roll_back"]}, max_kl=0.2)
    rows: list[dict[str, float]] = []
    for step, reader in enumerate([0.6, 0.8, 0.7, 0.79, 0.7, 0.7, 0.7, 0.81, 0.6]):
        rows.append({**evaluation(step, ocr=0.5 + step / 100, reader=reader), "loss/kl": 0.05 * step, AGREEMENT: 0.3})
    whole, verdicts = replay(settings, NAMES, rows)
    for cut in range(1, len(rows)):
        state, _ = replay(settings, NAMES, rows[:cut])
        state = GuardState.model_validate(json.loads(json.dumps(state.model_dump(mode="json"))))
        for row, expected in zip(rows[cut:], verdicts[cut:], strict=True):
            state, verdict = judge(settings, NAMES, state, int(row["step"]), row)
            assert verdict == expected
        assert state == whole


def test_a_step_is_judged_once() -> None:
    rows = curve([0.5, 0.6], [0.8, 0.7])
    state, _ = replay(config(), NAMES, rows)
    again, verdict = judge(config(), NAMES, state, 1, rows[1])
    assert (again, verdict) == (state, Verdict())


@pytest.mark.parametrize("row", [{}, {"eval/ocr": float("nan"), "eval/reader": 0.1}, {"eval/reader": 0.1}])
def test_what_is_missing_or_not_finite_says_nothing(row: Mapping[str, float]) -> None:
    state, _ = replay(config(), NAMES, curve([0.5], [0.8]))
    _, verdict = judge(config(), NAMES, state, 1, row)
    assert verdict.events == ()


def test_a_guard_that_is_off_says_nothing() -> None:
    state, verdicts = replay(config(enabled=False), NAMES, curve([0.5, 0.9], [0.8, 0.1]))
    assert state == GuardState()
    assert verdicts == [Verdict(), Verdict()]
