"""The loop with fakes: order of events, staleness, failures, stops. No model, no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from raylign.config import parse_config
from raylign.errors import CheckpointError, ConfigError, NumericsError, RewardError, StalenessError
from raylign.types import Prompt, RewardSample, RolloutGroup, RolloutStatus, StepResult
from rollout.drawn import AS_CONFIGURED, EvalPoint, Probe
from rollout.prompts import GroupTask, PromptStream
from services.config import RunConfig
from services.controller import Controller, check_age
from tests.fakes import FakeFleet, FakeLearner, FakeScorer, make_group

PROMPTS = [Prompt(str(n), f"prompt {n}") for n in range(5)]


class Recorder:
    """An Observer that remembers."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, dict[str, float]]] = []
        self.evaluations: list[int] = []
        self.sweeps: list[tuple[int, dict[EvalPoint, int]]] = []

    def stepped(self, step: int, metrics: Mapping[str, float], groups: Sequence[RolloutGroup]) -> None:
        self.steps.append((step, dict(metrics)))

    def evaluated(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        self.evaluations.append(step)

    def swept(self, step: int, sweeps: Mapping[EvalPoint, Sequence[RolloutGroup]]) -> None:
        self.sweeps.append((step, {point: len(groups) for point, groups in sweeps.items()}))


class Run:
    """A controller over fakes and what it left behind."""

    def __init__(
        self,
        scorer: FakeScorer | None = None,
        learner: FakeLearner | None = None,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> None:
        settings = {"num_steps": 4, "group_size": 2, "groups_per_step": 3, **config, **(settings or {})}
        self.config = parse_config(RunConfig, settings, "test")
        self.fleet, self.learner, self.recorder = FakeFleet(seed), learner or FakeLearner(), Recorder()
        self.saved: list[int] = []
        self.pulled: list[tuple[str, str]] = []
        self.controller = Controller(
            self.config,
            PromptStream(PROMPTS, 0),
            [GroupTask(PROMPTS[0], -1, 0)],
            self.fleet,
            scorer or FakeScorer(),
            self.learner,
            self.recorder,
            self._save,
            pulled=lambda slot, works: self.pulled.extend((slot, work.phase) for work in works),
        )

    async def _save(self, step: int) -> None:
        self.saved.append(step)

    def go(self, start_step: int = 0) -> Run:
        asyncio.run(asyncio.wait_for(self.controller.run(start_step), timeout=20))
        return self


def test_held_out_metrics_are_asked_in_evaluations_alone() -> None:
    scorer = FakeScorer()
    Run(scorer).go()
    # One call per group: 4 steps of 3 groups are trained on, one held-out prompt is evaluated before and after.
    assert (scorer.evaluations.count(False), scorer.evaluations.count(True)) == (12, 2)


def test_a_synchronous_run_trains_every_prompt_in_order_with_the_newest_weights() -> None:
    run = Run().go()
    sequences = [[group.sequence for group in step] for step in run.learner.trained]
    assert sequences == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    for step, groups in enumerate(run.learner.trained, 1):
        assert {group.min_version for group in groups} == {step - 1}
        assert all(group.images_GHWC is None for group in groups)
    assert [step for step, _ in run.recorder.steps] == [1, 2, 3, 4]
    assert run.recorder.evaluations == [0, 4]
    assert run.saved == [4]


@pytest.mark.parametrize("staleness", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_no_group_is_ever_older_than_allowed(staleness: int, seed: int) -> None:
    run = Run(seed=seed, num_steps=10, max_staleness=staleness).go()
    ages = [step - 1 - g.min_version for step, groups in enumerate(run.learner.trained, 1) for g in groups]
    assert max(ages) == staleness
    assert [s for s, _ in run.recorder.steps] == list(range(1, 11))


def test_old_weights_are_out_before_they_change() -> None:
    run = Run(num_steps=6, max_staleness=1).go()
    published = [call[1] for call in run.learner.calls if call[0] == "publish" and call[2] == "rollout"]
    assert published == list(range(7))
    for step in range(1, 6):
        assert run.learner.calls.index(("publish", step, "rollout")) < run.learner.calls.index(
            ("optimise", step + 1, 0)
        )


def test_updates_per_step_are_all_made() -> None:
    run = Run(num_steps=2, settings={"learner": {"updates_per_step": 3}}).go()
    assert [call[2] for call in run.learner.calls if call[0] == "optimise" and call[1] == 2] == [0, 1, 2]


def test_a_reward_that_fails_for_one_sample_masks_that_sample() -> None:
    def value(sample: RewardSample) -> float | None:
        return None if sample.id.endswith("/0/1") and sample.prompt.id == "2" else 1.0

    run = Run(FakeScorer(value)).go()
    failed = [
        (group.prompt.id, rollout.key.sample_index)
        for groups in run.learner.trained
        for group in groups
        for rollout in group.rollouts
        if rollout.status is RolloutStatus.REWARD_FAILED
    ]
    assert set(failed) == {("2", 1)}
    assert sum(metrics["failed/reward_failed"] for _, metrics in run.recorder.steps) == len(failed)
    assert run.saved == [4]


def test_a_reward_that_fails_for_all_stops_the_run_after_its_checkpoint() -> None:
    calls = iter(range(1000))
    run = Run(FakeScorer(lambda sample: 1.0 if next(calls) < 2 + 6 + 6 else None))
    with pytest.raises(ExceptionGroup) as raised:
        run.go()
    (error,) = raised.value.exceptions
    assert isinstance(error, RewardError)
    assert "out of ink" in str(error)
    assert "step 3: 6 of 6" in str(error)
    assert run.saved == [2]
    assert len(run.learner.trained) == 2


def test_refused_updates_are_counted_and_too_many_in_a_row_stop_the_run() -> None:
    run = Run(num_steps=8, learner=FakeLearner(finite=lambda step: step < 3), max_refused_steps=2)
    with pytest.raises(ExceptionGroup) as raised:
        run.go()
    assert isinstance(raised.value.exceptions[0], NumericsError)
    assert run.recorder.steps[-1][0] == 3
    assert run.recorder.steps[-1][1]["failed/refused_updates"] == 1
    assert run.saved == [3]


def test_one_refused_update_does_not_stop_the_run() -> None:
    run = Run(learner=FakeLearner(finite=lambda step: step != 2)).go()
    assert [metrics["failed/refused_updates"] for _, metrics in run.recorder.steps] == [0, 1, 0, 0]


def test_stop_ends_at_a_step_boundary_with_a_checkpoint() -> None:
    run = Run(num_steps=50)
    stepped = run.recorder.stepped

    def stop_after_two(step: int, metrics: Mapping[str, float], groups: Sequence[RolloutGroup]) -> None:
        stepped(step, metrics, groups)
        if step == 2:
            run.controller.stop.set()

    run.recorder.stepped = stop_after_two  # type: ignore[method-assign]  # the recorder is the test's own
    run.go()
    assert run.saved == [2]
    assert run.controller.step == 2


def test_a_dead_background_task_ends_the_run_with_its_error() -> None:
    run = Run()

    class Broken(FakeFleet):
        async def generate(self, request: Any) -> list[RolloutGroup]:
            if self.num_chunks == 5:
                raise RuntimeError("wire cut")
            return await super().generate(request)

    run.controller._fleet = Broken()
    with pytest.raises(ExceptionGroup) as raised:
        run.go()
    assert raised.group_contains(RuntimeError, match="wire cut")


def test_checkpoints_and_evaluations_follow_their_intervals() -> None:
    run = Run(num_steps=6, checkpoint={"every_steps": 2}, eval={"every_steps": 3}).go()
    assert run.saved == [2, 4, 6]
    assert run.recorder.evaluations == [0, 3, 6]


def test_what_pulls_took_the_actors_is_told() -> None:
    run = Run(num_steps=2, eval={"every_steps": 2}).go()
    rollout, held_out = ("rollout", "pull of rollout"), ("eval", "pull of eval")
    assert run.pulled == [rollout, held_out, rollout, rollout, held_out]


def test_a_resumed_run_goes_on_with_the_next_prompts() -> None:
    run = Run().go(start_step=2)
    assert [[g.sequence for g in step] for step in run.learner.trained] == [[6, 7, 8], [9, 10, 11]]
    assert run.recorder.evaluations == [4]


def test_a_group_that_is_too_old_is_refused() -> None:
    group = make_group(GroupTask(PROMPTS[0], 0, 0), (0, 1), version=3)
    check_age([group], newest=4, max_staleness=1)
    with pytest.raises(StalenessError, match="2 versions old"):
        check_age([group], newest=5, max_staleness=1)


def test_a_parity_gap_stops_the_run_before_anything_is_trained() -> None:
    run = Run()
    run.learner.parity_gap = 1e-2
    with pytest.raises(NumericsError, match=r"parity gate at version 0.*at sigma 1 .tolerance 0.001"):
        run.go()
    assert run.learner.trained == []


def test_the_parity_gap_is_logged_and_checked_again_at_its_interval() -> None:
    run = Run(num_steps=6, rollout={"parity_every_steps": 3, "parity_tolerance": 0.5})
    run.learner.parity_gap = 0.25
    run.go()
    assert {round(metrics["parity/gap"], 6) for _, metrics in run.recorder.steps} == {0.2}
    run = Run(num_steps=6, rollout={"parity_every_steps": 3, "parity_tolerance": 0.5})
    stepped = run.recorder.stepped

    def spoil_after_two(step: int, metrics: Mapping[str, float], groups: Sequence[RolloutGroup]) -> None:
        stepped(step, metrics, groups)
        run.learner.parity_gap = 3.0 if step == 2 else 0.0

    run.recorder.stepped = spoil_after_two  # type: ignore[method-assign]
    with pytest.raises(ExceptionGroup) as raised:
        run.go()
    assert raised.group_contains(NumericsError, match="parity gate at version 3")
    # Step 3 is trained when its hand-off fails, and is saved as what it is.
    assert run.saved == [3]


def test_a_step_that_broke_off_halfway_is_not_saved_as_the_one_before() -> None:
    class BreaksOff(FakeLearner):
        async def optimise(self, update: int) -> StepResult:
            if (self._step, update) == (2, 1):
                raise NumericsError("not a number")
            return await super().optimise(update)

    run = Run(learner=BreaksOff(), settings={"learner": {"updates_per_step": 2}})
    with pytest.raises(ExceptionGroup) as raised:
        run.go()
    assert raised.group_contains(NumericsError, match="not a number")
    assert run.saved == []
    assert "step 2 was half done" in raised.value.exceptions[0].__notes__[0]


def test_a_checkpoint_that_cannot_be_written_is_not_tried_twice() -> None:
    run = Run(checkpoint={"every_steps": 2})

    async def full(step: int) -> None:
        run.saved.append(step)
        raise CheckpointError("disk full")

    run.controller._save = full
    with pytest.raises(ExceptionGroup) as raised:
        run.go()
    assert raised.group_contains(CheckpointError, match="disk full")
    assert run.saved == [2]


def test_held_out_failures_stop_the_run_like_others() -> None:
    run = Run(FakeScorer(lambda sample: None if sample.id.split("/")[1] == "-1" else 1.0))
    with pytest.raises(RewardError, match="evaluation at step 0: 2 of 2 samples"):
        run.go()


def test_the_first_and_the_last_evaluation_are_repeated_at_each_budget() -> None:
    text = {
        "model": {"type": "tiny_text"},
        "sampler": {"type": "entropy_bounded"},
        "algorithm": {"type": "d1"},
        "eval": {"every_steps": 2, "gammas": [0.1, 1.0]},
    }
    run = Run(num_steps=4, settings=text).go()
    assert run.recorder.evaluations == [0, 2, 4]
    sweep = {AS_CONFIGURED: 1, EvalPoint(gamma=0.1): 1, EvalPoint(gamma=1.0): 1}
    assert run.recorder.sweeps == [(0, sweep), (4, sweep)]
    assert [request.point.gamma for request in run.fleet.requests if request.slot == "eval"] == [
        *(None, 0.1, 1.0),
        *(None,),
        *(None, 0.1, 1.0),
    ]


def test_every_evaluation_of_pictures_is_repeated_at_each_stochasticity() -> None:
    run = Run(num_steps=4, eval={"every_steps": 2, "etas": [0.0, 0.5, 1.5]}).go()
    noisy = [EvalPoint(eta=0.5), EvalPoint(eta=1.5)]
    drawn = [request for request in run.fleet.requests if request.slot == "eval"]
    assert [request.point for request in drawn] == [AS_CONFIGURED, *noisy] * 3, "the ODE is the evaluation itself"
    assert all(request.tasks == drawn[0].tasks for request in drawn), "the same keys every time"
    assert run.recorder.sweeps == [(step, dict.fromkeys([AS_CONFIGURED, *noisy], 1)) for step in (0, 2, 4)]


def test_other_numbers_of_steps_bring_an_ode_of_as_many() -> None:
    config = {"num_steps": 1, "sampler": {"num_steps": 6}, "eval": {"etas": [1.0], "eta_steps": [6, 12]}}
    run = Run(settings=config).go()
    assert [step for step, _ in run.recorder.sweeps] == [0, 1]
    assert list(run.recorder.sweeps[0][1]) == [
        AS_CONFIGURED,
        EvalPoint(eta=1.0),
        EvalPoint(num_steps=12),
        EvalPoint(eta=1.0, num_steps=12),
    ]


def test_nothing_is_repeated_unless_asked_for() -> None:
    assert Run(num_steps=1).go().recorder.sweeps == []
    assert Run(num_steps=1, eval={"etas": [0]}).go().recorder.sweeps == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval": {"etas": [-0.5]}}, r"eval.etas.0: Input should be greater than or equal to 0 .got -0.5"),
        ({"eval": {"etas": [1.0], "num_steps": 1}}, r"eval.etas need at least 2 denoising steps.*raise eval.num_steps"),
        ({"eval": {"eta_steps": [1]}}, r"eval.eta_steps.0: Input should be greater than or equal to 2"),
        (
            {"model": {"type": "tiny_text"}, "sampler": {"type": "low_confidence"}, "algorithm": {"type": "d1"}}
            | {"eval": {"etas": [1.0]}},
            "eval.etas and eval.eta_steps are for pictures; texts have eval.gammas",
        ),
    ],
)
def test_a_stochasticity_that_cannot_be_drawn_is_refused_before_the_run(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(RunConfig, settings, "test")


class Watched(FakeLearner):
    """A learner whose parity gap and metrics follow a plan by version and by step."""

    def __init__(
        self, gap: Callable[[int], float] = lambda version: 0.0, deviation: Callable[[int], float] = lambda step: 0.0
    ) -> None:
        super().__init__()
        self._gap, self._deviation = gap, deviation
        self.checked: list[int] = []

    async def predict(self, probe: Probe) -> torch.Tensor:
        self.checked.append(probe.version)
        return probe.answer * (1 + self._gap(probe.version))

    async def optimise(self, update: int) -> StepResult:
        await super().optimise(update)
        return StepResult({"loss": 1.0, "behaviour/deviation": self._deviation(len(self.trained))}, True)


def _ages(run: Run) -> list[int]:
    """The greatest age of each step's groups."""
    return [max(step - group.min_version for group in groups) for step, groups in enumerate(run.learner.trained)]


def _column(run: Run, name: str) -> list[float]:
    return [metrics[name] for _, metrics in run.recorder.steps]


def _levels(run: Run) -> tuple[list[float], list[float]]:
    return _column(run, "buffer/ready"), _column(run, "buffer/admitted")


@pytest.mark.parametrize("seed", range(4))
def test_leaving_the_ratio_band_makes_the_run_synchronous_without_losing_a_group(seed: int) -> None:
    learner = Watched(deviation=lambda step: 0.5 if step == 4 else 0.0)
    run = Run(learner=learner, seed=seed, num_steps=12, max_staleness=2).go()
    assert [g.sequence for groups in learner.trained for g in groups] == list(range(36))
    assert _column(run, "staleness/limit") == [2] * 3 + [0] * 9
    assert _column(run, "failed/async_deviation") == [0] * 3 + [1] + [0] * 8
    ages = _ages(run)
    # What was admitted when step 4 was done reaches to step 6 (two steps beyond step 4's tickets, still out).
    assert max(ages[:6]) > 0
    assert ages[6:] == [0] * 6
    assert _column(run, "staleness/max") == ages
    # Three steps' groups have tickets at most.
    assert 0 < max(_column(run, "buffer/admitted")[:3]) <= 9
    assert all(ready <= admitted for ready, admitted in zip(*_levels(run), strict=True))


def test_the_run_is_asynchronous_again_after_good_steps() -> None:
    learner = Watched(deviation=lambda step: 0.5 if step == 2 else 0.0)
    settings = {"async_guard": {"return_after_steps": 3}}
    run = Run(learner=learner, num_steps=20, max_staleness=2, settings=settings).go()
    (back,) = [step for step, value in enumerate(_column(run, "async/returned"), 1) if value]
    assert _ages(run)[back - 3 : back] == [0, 0, 0]
    assert max(_ages(run)[back:]) == 2


def test_a_parity_gap_that_goes_away_makes_an_asynchronous_run_synchronous() -> None:
    learner = Watched(gap=lambda version: 0.5 if version == 3 else 0.0)
    run = Run(learner=learner, num_steps=10, max_staleness=2, rollout={"parity_every_steps": 3}).go()
    # Groups up to step 5 were admitted at version 3; the gap is measured again when those are trained on.
    assert learner.checked == [0, 3, 5, 6, 9]
    assert _ages(run)[5:] == [0] * 5
    assert sum(_column(run, "failed/async_parity")) == 1
    assert max(_column(run, "parity/gap")) == pytest.approx(1 / 3)
    assert _column(run, "parity/gap")[-1] == 0
    assert run.saved == [10]


def test_a_parity_gap_that_stays_stops_the_run_and_nothing_is_drawn_meanwhile() -> None:
    learner = Watched(gap=lambda version: 0.5 if version >= 3 else 0.0)
    run = Run(learner=learner, num_steps=10, max_staleness=2, rollout={"parity_every_steps": 3})
    with pytest.raises(ExceptionGroup) as raised:
        run.go()
    assert raised.group_contains(NumericsError, match="parity gate at version 5")
    assert [request.tasks[0].sequence for request in run.fleet.requests if request.slot == "rollout"] == list(range(15))
    assert run.saved == [5]


@pytest.mark.parametrize(("gap", "parity"), [(0.5, False), (float("nan"), True), (float("inf"), True)])
def test_a_parity_gap_stops_at_once_where_waiting_is_of_no_use(gap: float, parity: bool) -> None:
    learner = Watched(gap=lambda version: gap if version >= 3 else 0.0)
    settings = {"rollout": {"parity_every_steps": 3}, "async_guard": {"parity": parity}}
    with pytest.raises(ExceptionGroup) as raised:
        Run(learner=learner, num_steps=10, max_staleness=2, settings=settings).go()
    assert raised.group_contains(NumericsError, match=r"parity gate at version 3.*tolerance 0.001")


def test_a_run_that_fell_back_stays_synchronous_when_it_is_resumed() -> None:
    run = Run(num_steps=8, max_staleness=2)
    run.controller.guard.restore({"limit": 0, "num_good": 0, "recheck_at": 0})
    run.go(start_step=2)
    assert [g.min_version for groups in run.learner.trained for g in groups] == [v for v in range(2, 8) for _ in "abc"]


def test_a_synchronous_run_says_nothing_of_its_guard() -> None:
    _, metrics = Run(num_steps=1).go().recorder.steps[0]
    assert not [name for name in metrics if name.startswith(("async/", "failed/async")) or name == "staleness/limit"]
    assert (metrics["staleness/mean"], metrics["staleness/max"], metrics["samples/age_0"]) == (0, 0, 6)
