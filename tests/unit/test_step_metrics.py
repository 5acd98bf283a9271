"""A step's numbers, worked out by hand."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from raylign.types import (
    Prompt,
    RewardBreakdown,
    RewardSample,
    RewardScore,
    RolloutGroup,
    RolloutStatus,
    StepResult,
    TokenTrajectory,
)
from rollout.prompts import GroupTask
from services.scoring import score_groups
from services.step_metrics import (
    diversity,
    eval_metrics,
    failed_samples,
    over_updates,
    reward_metrics,
    staleness_metrics,
    step_metrics,
    text_metrics,
)
from tests.fakes import FakeScorer, breakdown, make_group


def _group(*values: float | None, version: int = 4) -> RolloutGroup:
    group = make_group(GroupTask(Prompt("p", "text"), 0, 0), range(len(values)), version, seconds={"sample": 0.5})
    return group.with_rewards([breakdown(value) for value in values], seconds=0.25)


def test_rewards_are_means_over_samples_that_have_one() -> None:
    metrics = reward_metrics([_group(1.0, 0.0, None), _group(0.5, None, None)], "reward")
    assert metrics == {"reward/mean": 0.5, "reward/fake": 0.5, "reward/std_within_group": 0.5}


def test_numeric_details_become_metrics() -> None:
    scores = [
        RewardBreakdown(v, (RewardScore("ocr", v, details={"exact": v == 1.0, "text": "A"}),)) for v in (1.0, 0.5)
    ]
    group = _group(0.0, 0.0).with_rewards(scores)
    assert reward_metrics([group], "eval")["eval/ocr/exact"] == 0.5


def test_a_step_reports_ages_failures_phases_and_speed() -> None:
    metrics = step_metrics([_group(1.0, None)], 6, {"rollout": 1.0, "evaluate": 2.0}, 4.0)
    assert (metrics["staleness/mean"], metrics["staleness/max"]) == (1, 1)
    assert metrics["failed/reward_failed"] == 1
    assert metrics["time/other_s"] == 1.0
    assert metrics["throughput/samples_per_s"] == 1.0
    assert (metrics["busy/sample_s"], metrics["busy/reward_s"]) == (0.5, 0.25)


def test_ages_are_a_mean_a_maximum_and_a_histogram() -> None:
    # Ages of samples at version 9: 0, 0, 1, 4, 5 and 7.
    groups = [_group(1.0, 1.0, version=9), *(_group(1.0, version=version) for version in (8, 5, 4, 2))]
    assert staleness_metrics(groups, 9) == {
        "staleness/mean": 17 / 6,
        "staleness/max": 7,
        "samples/age_0": 2,
        "samples/age_1": 1,
        "samples/age_4": 1,
        "samples/age_5_up": 2,
    }


def test_failures_are_counted_with_their_first_cause() -> None:
    count, cause = failed_samples([_group(1.0, None), _group(None, None)])
    assert count == 3
    assert cause == "fake: model_error: the fake engine is out of ink"


def test_updates_average_but_maxima_stay_maxima() -> None:
    results = [
        StepResult({"loss": 1.0, "ratio/deviation_max": 0.0}, True),
        StepResult({"loss": 3.0, "ratio/deviation_max": 0.4}, True),
    ]
    assert over_updates(results) == {"loss": 2.0, "ratio/deviation_max": 0.4}


def test_an_evaluation_counts_the_samples_it_could_not_score() -> None:
    metrics = eval_metrics([_group(1.0, None), _group(0.0, 0.0)])
    assert metrics["eval/failed"] == 1
    assert metrics["eval/mean"] == pytest.approx(1 / 3)


def test_samples_that_were_not_drawn_are_not_scored() -> None:
    group = _group(1.0, 1.0)
    broken = replace(group.rollouts[1], status=RolloutStatus.GENERATION_FAILED, reward=None)
    asked: list[str] = []

    def value(sample: RewardSample) -> float:
        asked.append(sample.id)
        return 1.0

    (scored,) = asyncio.run(score_groups(FakeScorer(value), [replace(group, rollouts=(group.rollouts[0], broken))]))
    assert asked == ["p/0/0"]
    assert scored.rollouts[1].status is RolloutStatus.GENERATION_FAILED
    assert scored.rollouts[1].total is None
    assert failed_samples([scored])[1] == "the sampler's final state is not finite, so there is nothing to score"


def test_diversity_is_the_mean_pixel_distance_of_pairs() -> None:
    group = _group(1.0, 1.0, 1.0)
    pictures = np.zeros((3, 1, 1, 3), np.uint8)
    pictures[2] = 255
    # Pairs: 0-1 are equal, 0-2 and 1-2 are a full scale apart.
    assert diversity([replace(group, images_GHWC=pictures)]) == pytest.approx(2 / 3)
    assert diversity([replace(group, images_GHWC=None)]) is None
    large = np.zeros((3, 600, 512, 3), np.uint8)
    large[2, ::2, ::2] = 255  # which is all that is looked at
    assert diversity([replace(group, images_GHWC=large)]) == pytest.approx(2 / 3)


def _text_group(texts: tuple[str, ...], nfe: list[int], log_gamma: list[float] | None = None) -> RolloutGroup:
    count = len(texts)
    zeros = torch.zeros(count, 3)
    tokens = TokenTrajectory(
        tokens_GL=zeros.long(),
        reveal_step_GL=zeros.long(),
        rollout_logprob_GL=zeros,
        plain_logprob_GL=zeros,
        nfe_G=torch.tensor(nfe),
        cached_calls_G=torch.tensor(nfe) - 1,
        log_gamma_G=None if log_gamma is None else torch.tensor(log_gamma),
    )
    group = make_group(GroupTask(Prompt("p", "text"), 0, 0), range(count), 4)
    return replace(group, trajectory=tokens, texts=texts, images_GHWC=None)


def test_texts_report_calls_budgets_and_lengths() -> None:
    groups = [_text_group(("ab", "abcd"), [2, 4], [0.0, math.log(3.0)]), _text_group(("", "x"), [1, 1], [0.0, 0.0])]
    assert text_metrics(groups) == {
        "nfe/mean": 2.0,
        "cached_calls/mean": 1.0,
        "gamma/mean": pytest.approx(1.5),
        "characters/mean": 1.75,
    }
    assert text_metrics([_group(1.0)]) == {}
    assert "gamma/mean" not in text_metrics([_text_group(("a",), [1])])


def test_a_budget_of_zero_is_a_number() -> None:
    assert text_metrics([_text_group(("a",), [3], [-math.inf])])["gamma/mean"] == 0.0


def test_an_evaluation_of_texts_shows_calls_beside_rewards_and_how_alike_answers_are() -> None:
    group = _text_group(("ab", "ab", "cd"), [1, 2, 3]).with_rewards([breakdown(value) for value in (1.0, 0.0, 0.5)])
    metrics = eval_metrics([group])
    assert metrics["eval/mean"] == 0.5
    assert metrics["eval/nfe"] == 2.0
    assert metrics["eval/cached_calls"] == 1.0
    assert metrics["eval/diversity"] == pytest.approx(2 / 3)


def test_a_text_reaches_its_reward() -> None:
    scorer = FakeScorer(lambda sample: float(len(sample.text or "")))
    (group,) = asyncio.run(score_groups(scorer, [_text_group(("ab", "cde"), [1, 1])]))
    assert [rollout.total for rollout in group.rollouts] == [2.0, 3.0]
