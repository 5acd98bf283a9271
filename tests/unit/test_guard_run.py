"""The guard at work: what it measures of groups, what the loop does as it says, and what a resumed run makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from raylign.config import parse_config
from raylign.types import (
    Prompt,
    RewardBreakdown,
    RewardFailure,
    RewardSample,
    RewardScore,
    RolloutGroup,
    RolloutStatus,
)
from rollout.drawn import EvalPoint
from rollout.prompts import GroupTask, PromptStream
from services.config import RunConfig
from services.controller import Controller
from services.guard import AGREEMENT
from services.guard_run import RewardGuard, agreement_metrics
from tests.fakes import FakeFleet, FakeLearner, make_group

PROMPTS = [Prompt(str(n), f"prompt {n}") for n in range(5)]
REWARDS = [
    {"type": "ocr"},
    {"type": "brightness"},
    {"type": "glyph_pixels", "only_eval": True},
]
BROKEN = RewardFailure("model_error", "out of ink")


def scored(ocr: Sequence[float | None], bright: Sequence[float | None]) -> RolloutGroup:
    """A group with the scores of two rewards that weigh 1 each."""
    breakdowns = [
        RewardBreakdown(
            None if a is None or b is None else a + b,
            (
                RewardScore("ocr", a, None if a is not None else BROKEN),
                RewardScore("brightness", b, None if b is not None else BROKEN),
            ),
            weights=(1.0, 1.0),
        )
        for a, b in zip(ocr, bright, strict=True)
    ]
    return make_group(GroupTask(PROMPTS[0], 0, 0), range(len(ocr)), 0).with_rewards(breakdowns)


def test_agreement_is_the_rank_correlation_within_groups() -> None:
    weights = {"ocr": 1.0, "brightness": 1.0}
    same, reverse = scored([0.1, 0.2, 0.3], [1, 2, 9]), scored([0.1, 0.2, 0.3], [3, 2, 1])
    # Ranks 1 2 3 against 2 1 3: 1 - 6 (1 + 1) / (3 * 8) = 0.5.
    half = scored([0.1, 0.2, 0.3], [2, 1, 3])
    assert agreement_metrics([same, half], weights) == {AGREEMENT: pytest.approx(0.75)}
    assert agreement_metrics([reverse], weights) == {AGREEMENT: pytest.approx(-1.0)}
    assert agreement_metrics([reverse], {**weights, "brightness": -1.0}) == {AGREEMENT: pytest.approx(1.0)}
    # Without two different values there is no ranking, and a failed reward ranks nobody.
    assert agreement_metrics([scored([0.1, 0.2, 0.3], [1, 1, 1]), same], weights) == {AGREEMENT: pytest.approx(1.0)}
    assert agreement_metrics([scored([0.1, 0.2, None], [1, 2, 3])], weights) == {}
    assert agreement_metrics([same], {"ocr": 1.0}) == {}


def test_a_dropped_reward_counts_nothing_and_fails_nobody() -> None:
    config = parse_config(RunConfig, {"rewards": REWARDS}, "test")
    guard = RewardGuard(config)
    group = scored([0.25, 0.5, None], [3.0, None, 1.0])
    assert guard.to_train_on([group]) == [group]
    guard.restore({**guard.state(), "dropped": ["brightness"]})
    (mixed,) = guard.to_train_on([group])
    assert [rollout.total for rollout in mixed.rollouts] == [0.25, 0.5, None]
    assert [rollout.status for rollout in mixed.rollouts] == [
        RolloutStatus.OK,
        RolloutStatus.OK,
        RolloutStatus.REWARD_FAILED,
    ]
    first = mixed.rollouts[0].reward
    assert first is not None
    assert first.weights == (1.0, 0.0)
    assert [score.value for score in first.scores] == [0.25, 3.0]


class Scorer:
    """Two rewards in training; in evaluations the held-out reader as well, which falls from the third one on."""

    def __init__(self, reader: Callable[[int], float] = lambda nth: 0.8 if nth < 2 else 0.6) -> None:
        self._reader = reader
        self.num_evaluations = 0

    async def score(self, samples: Sequence[RewardSample], evaluation: bool = False) -> list[RewardBreakdown]:
        await asyncio.sleep(0)
        held_out: tuple[RewardScore, ...] = ()
        if evaluation:
            held_out = (RewardScore("glyph_pixels", self._reader(self.num_evaluations)),)
            self.num_evaluations += 1
        scores = (RewardScore("ocr", 0.5), RewardScore("brightness", 0.3), *held_out)
        weights = (1.0, 1.0, 0.0)[: len(scores)]
        return [RewardBreakdown(0.8, scores, weights=weights) for _ in samples]


class Recorder:
    """An Observer that remembers the rows."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def stepped(self, step: int, metrics: Mapping[str, float], groups: Sequence[RolloutGroup]) -> None:
        self.rows[step] = dict(metrics)

    def evaluated(self, step: int, groups: Sequence[RolloutGroup]) -> None: ...

    def swept(self, step: int, sweeps: Mapping[EvalPoint, Sequence[RolloutGroup]]) -> None: ...


class Run:
    """A controller over fakes whose held-out metric is evaluated after every step."""

    def __init__(self, actions: Sequence[str], scorer: Scorer | None = None, **settings: Any) -> None:
        table = {"max_fall": 0.9, "actions": {"divergence": list(actions)}}
        data = {"num_steps": 4, "group_size": 2, "groups_per_step": 3, "rewards": REWARDS, "guard": table}
        data |= {"eval": {"every_steps": 1}, "algorithm": {"type": "nft", "kl_weight": 1e-3}, **settings}
        self.config = parse_config(RunConfig, data, "test")
        self.learner, self.recorder = FakeLearner(), Recorder()
        self.saved: list[int] = []
        self.notes: list[str] = []
        self.guard = RewardGuard(self.config, self.notes.append, Path("checkpoints"))
        self.controller = Controller(
            self.config,
            PromptStream(PROMPTS, 0),
            [GroupTask(PROMPTS[0], -1, 0)],
            FakeFleet(),
            scorer or Scorer(),
            self.learner,
            self.recorder,
            self._save,
            watch=self.guard,
        )

    async def _save(self, step: int) -> None:
        if step not in self.saved:
            self.saved.append(step)
            await self.learner.save(Path(f"step_{step}"), {})

    def go(self, start_step: int = 0) -> Run:
        asyncio.run(asyncio.wait_for(self.controller.run(start_step), timeout=20))
        return self

    def calls(self, verb: str) -> list[tuple[Any, ...]]:
        return [call for call in self.learner.calls if call[0] == verb]


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_warning_changes_nothing_but_the_row_and_the_screen(max_staleness: int) -> None:
    run = Run(["warn"], max_staleness=max_staleness).go()
    assert [row.get("guard/did_warn") for row in run.recorder.rows.values()] == [None, 1.0, None, None]
    assert [row["guard/tripped"] for row in run.recorder.rows.values()] == [0, 1, 1, 1]
    assert run.recorder.rows[2]["guard/divergence"] == pytest.approx(0.25 / 0.04)
    (note,) = run.notes
    assert "step 2, divergence: held-out glyph_pixels fell from 0.800 to 0.600" in note
    assert run.saved == [4]
    assert run.calls("adjust") == []


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_lower_lr_and_raise_kl_reach_the_learner_before_the_next_step(max_staleness: int) -> None:
    run = Run(["lower_lr", "raise_kl"], max_staleness=max_staleness).go()
    assert run.calls("adjust") == [("adjust", 0.5, 2.0)]
    place = run.learner.calls.index(("adjust", 0.5, 2.0))
    assert run.learner.calls.index(("end_step", 2)) < place < run.learner.calls.index(("begin_step", 3))
    assert [row["guard/lr_scale"] for row in run.recorder.rows.values()] == [1.0, 0.5, 0.5, 0.5]


def test_drop_reward_leaves_it_out_of_the_next_steps_groups() -> None:
    run = Run(["drop_reward"]).go()
    totals = [{rollout.total for group in groups for rollout in group.rollouts} for groups in run.learner.trained]
    # Both rose alike since the best evaluation, by nothing, so the first of them goes.
    assert totals == [{0.8}, {0.8}, {0.3}, {0.3}]
    assert [row["reward/mean"] for row in run.recorder.rows.values()] == pytest.approx([0.8, 0.8, 0.3, 0.3])
    assert all(row["reward/ocr"] == 0.5 for row in run.recorder.rows.values())


def test_stop_ends_the_run_after_its_checkpoint() -> None:
    run = Run(["stop"]).go()
    assert (run.controller.step, run.saved) == (2, [2])
    assert run.recorder.rows[2]["guard/did_stop"] == 1.0
    assert not run.controller.went_back


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_roll_back_writes_the_steps_checkpoint_with_the_best_ones_weights(max_staleness: int) -> None:
    run = Run(["roll_back", "lower_lr"], max_staleness=max_staleness).go()
    assert run.controller.went_back
    assert run.controller.step == 2
    # The first evaluation is the best; the second only equals it.
    assert run.saved == [0, 2]
    assert run.guard.spared == 0
    assert run.learner.calls[-2:] == [("load", "step_0"), ("save", "step_2")]
    assert list(run.recorder.rows) == [1, 2]
    # Going on from that checkpoint is what goes on: with the state, and with the lower rate.
    again = Run(["roll_back", "lower_lr"], Scorer(lambda nth: 0.8), max_staleness=max_staleness)
    again.guard.restore(run.guard.state())
    again.go(2)
    assert not again.controller.went_back
    assert again.calls("adjust") == [("adjust", 0.5, 1.0)]
    assert again.learner.calls.index(("adjust", 0.5, 1.0)) < again.learner.calls.index(("publish", 2, "rollout"))
    assert list(again.recorder.rows) == [3, 4]


def test_it_goes_back_no_more_often_than_it_may() -> None:
    def attempt(earlier: Run | None) -> Run:
        run = Run(["roll_back"], Scorer(lambda nth: 0.8 if nth == 0 and earlier is None else 0.6), num_steps=20)
        if earlier is not None:
            run.guard.restore(earlier.guard.state())
        return run.go(0 if earlier is None else earlier.controller.step)

    runs = [attempt(None)]
    while runs[-1].controller.went_back:
        runs.append(attempt(runs[-1]))
    assert [run.controller.step for run in runs] == [1, 2, 3]
    assert runs[-1].controller.stop.is_set()
    assert "gone back 2 times" in runs[-1].notes[-1]


def test_a_guard_that_is_off_waits_for_nothing_and_keeps_no_state() -> None:
    run = Run(["stop"], guard={"enabled": False}).go()
    assert run.controller.step == 4
    assert not any(name.startswith("guard/") for row in run.recorder.rows.values() for name in row)
    run.guard.restore({**run.guard.state(), "lr_scale": 0.5})
    assert run.guard.state()["lr_scale"] == 1.0
