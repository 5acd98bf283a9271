"""Advantage-weighted matching: what its ratio compares, and the settings it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from learner.algorithms.awm import AwmConfig
from learner.decay import DECAY_PRESETS
from learner.learner import Learner, LearnerConfig
from learner.noise_levels import TrainTimes
from raylign.types import Needs, StepResult
from tests.tiny_models import RUN_SEED, ToyPolicy, draw_groups, euler, train_step

SMALL: dict[str, Any] = {"num_train_times": 3, "times": TrainTimes(draw="stratified")}


def two_steps(updates: int = 2, **options: Any) -> tuple[Learner, list[StepResult]]:
    config = AwmConfig(**{**SMALL, **options})
    learner = Learner(LearnerConfig(lr=1e-2, updates_per_step=updates), config, ToyPolicy(), euler(), 1.0, 4, RUN_SEED)
    results: list[StepResult] = []
    for step in (1, 2):
        groups = draw_groups(ToyPolicy(), euler(), config.needs, num_groups=4, first_sequence=step)
        results += train_step(learner, groups, step)
    return learner, results


def test_the_ratio_is_to_the_steps_beginning_so_the_first_update_of_each_step_has_none() -> None:
    learner, results = two_steps()
    deviations = [result.metrics["ratio/deviation_max"] for result in results]
    assert deviations[0] == deviations[2] == 0
    assert min(deviations[1], deviations[3]) > 1e-4
    start = learner.policies.relatives["sampling"]
    for name, parameter in learner.policy.trainable_parameters().items():
        assert torch.equal(start[name], parameter)


def test_the_ratio_can_be_to_the_slow_copy() -> None:
    learner, results = two_steps(updates=1, ratio_to="old", old_decay=3)
    assert "sampling" not in learner.policies.relatives
    deviations = [result.metrics["ratio/deviation_max"] for result in results]
    assert deviations[0] == 0
    assert deviations[1] > 1e-4


def test_the_penalty_holds_the_policy_near_its_slow_copy() -> None:
    def gap(old_weight: float) -> float:
        config = AwmConfig(**SMALL, old_weight=old_weight, old_decay=DECAY_PRESETS[3])
        learner = Learner(LearnerConfig(lr=3e-3), config, ToyPolicy(), euler(), 1.0, 16, RUN_SEED)
        groups = draw_groups(ToyPolicy(), euler(), config.needs, num_groups=4)
        for step in range(1, 20):
            train_step(learner, groups, step)
        return train_step(learner, groups, 20)[0].metrics["velocity/old_gap"]

    assert gap(30.0) < 0.2 * gap(1e-3)


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({}, Needs.OLD | Needs.SAMPLING | Needs.REFERENCE),
        ({"old_weight": 0.0}, Needs.SAMPLING | Needs.REFERENCE),
        ({"old_weight": 0.0, "ratio_to": "old", "kl_weight": 0.0}, Needs.OLD),
    ],
)
def test_only_what_is_asked_is_kept(options: dict[str, Any], needs: Needs) -> None:
    assert AwmConfig(**options).needs == Needs.FINAL | needs


def test_a_setting_in_which_nothing_bounds_bad_samples_is_refused() -> None:
    with pytest.raises(ValidationError, match="nothing bounds"):
        AwmConfig(clip_range=None, old_weight=0.0)
    assert AwmConfig(clip_range=None).smallest_clip is None
    assert AwmConfig(old_weight=0.0).smallest_clip == 1.0
