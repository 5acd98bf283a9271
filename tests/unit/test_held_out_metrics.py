"""Held-out metrics (`only_eval`): asked in evaluations only, never part of a reward, wherever rewards are scored."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import pytest
from pydantic import ValidationError

from learner.advantages import AdvantageStd, credit_groups
from raylign.config import parse_config
from raylign.errors import ConfigError, PromptError
from raylign.types import Prompt, RewardBreakdown, RewardFailure, RewardSample, RewardScore, RolloutGroup
from rewards import GlyphPixelsConfig, JpegConfig, SharpnessConfig, make_mix
from rewards.base import RewardAsk
from rewards.mix import mix
from rewards.remote import RewardClient
from rollout.prompts import GroupTask
from services.config import RunConfig
from services.nodes import required_resources
from services.reward_app import RewardService
from services.roles import Scorer
from services.scoring import HttpScorer, WithLightMetrics, score_groups
from services.step_metrics import eval_metrics
from tests.fakes import FakeScorer, make_group
from tests.reward_cases.local_http import SAMPLES, LocalBackend, app_of

METRICS = (
    JpegConfig(),
    SharpnessConfig(only_eval=True),
    JpegConfig(name="large", direction="incompress", only_eval=True),
)
EVERYTHING = ["jpeg", "sharpness", "large"]


def score(scorer: Scorer, evaluation: bool) -> list[RewardBreakdown]:
    return asyncio.run(scorer.score(SAMPLES, evaluation))


def names(breakdowns: Sequence[RewardBreakdown]) -> list[str]:
    (asked,) = {tuple(score.name for score in breakdown.scores) for breakdown in breakdowns}
    return list(asked)


def test_a_held_out_metric_weighs_nothing_and_is_not_required() -> None:
    config = SharpnessConfig(only_eval=True)
    assert (config.name, config.weight, config.required) == ("sharpness", 0.0, False)
    assert SharpnessConfig.model_validate(config.model_dump()) == config
    assert (SharpnessConfig().weight, SharpnessConfig().required) == (1.0, True)


@pytest.mark.parametrize("keys", [{"weight": 0.5}, {"required": True}])
def test_a_held_out_metric_cannot_count_too(keys: Mapping[str, Any]) -> None:
    with pytest.raises(ValidationError, match="'sharpness' is only_eval, a held-out metric, so it cannot have weight"):
        SharpnessConfig(only_eval=True, **keys)


def test_a_run_needs_something_to_train_on() -> None:
    metric = {"type": "sharpness", "only_eval": True}
    with pytest.raises(ConfigError, match="every reward is only_eval, so there is nothing to train on"):
        parse_config(RunConfig, {"rewards": [metric]}, "test")
    assert parse_config(RunConfig, {"rewards": [metric, {"type": "ocr"}]}, "test").rewards[0].only_eval


def test_the_mix_asks_them_in_evaluations_only_and_totals_stay_equal() -> None:
    rewards = make_mix(METRICS)
    trained, evaluated = score(rewards, False), score(rewards, True)
    assert (names(trained), names(evaluated)) == (["jpeg"], EVERYTHING)
    assert [one.total for one in trained] == [one.total for one in evaluated]
    assert evaluated[0].weights == (1.0, 0.0, 0.0)


def test_a_metric_that_fails_costs_no_sample() -> None:
    failure = RewardFailure("model_error", "broken")
    scores = {"jpeg": [RewardScore("jpeg", 0.5)], "sharpness": [RewardScore("sharpness", None, failure)]}
    (breakdown,) = mix(scores, [JpegConfig(), SharpnessConfig(only_eval=True)])
    assert breakdown.total == 0.5
    # Nor does it where the only reward has weight 0, of which there is nothing to hand on.
    (breakdown,) = mix(scores, [JpegConfig(weight=0.0), SharpnessConfig(only_eval=True)])
    assert breakdown.total == 0.0


def test_prompts_need_not_suit_a_metric() -> None:
    make_mix([JpegConfig(), GlyphPixelsConfig(only_eval=True)]).check(Prompt("p", "no target"))
    with pytest.raises(PromptError):
        make_mix([GlyphPixelsConfig()]).check(Prompt("p", "no target"))


@pytest.mark.parametrize("compares", [False, True])
def test_over_http_the_values_are_those_of_the_mix(compares: bool) -> None:
    samples = [RewardSample(s.id, SAMPLES[0].prompt, s.image_HWC, group_id="g") for s in SAMPLES]

    async def main() -> list[list[RewardBreakdown]]:
        transport = httpx2.ASGITransport(app_of(LocalBackend(METRICS)))
        async with RewardClient("http://test", transport=transport) as client:
            scorer = HttpScorer(client, compares, ["jpeg"])
            return [await scorer.score(samples, evaluation) for evaluation in (False, True)]

    trained, evaluated = asyncio.run(main())
    assert (names(trained), names(evaluated)) == (["jpeg"], EVERYTHING)
    expected = score(make_mix(METRICS), True)
    assert [[s.value for s in one.scores] for one in evaluated] == [[s.value for s in one.scores] for one in expected]
    assert [one.total for one in trained] == [one.total for one in evaluated] == [one.total for one in expected]


class Handles:
    """Scores by handle would, in this process."""

    def __init__(self) -> None:
        self.backend = LocalBackend(METRICS)
        self.asked: list[list[str]] = []

    async def score(self, samples: Sequence[RewardSample], asks: Sequence[RewardAsk]) -> dict[str, list[RewardScore]]:
        self.asked.append([ask.name for ask in asks])
        return await self.backend.score(samples, asks)


def test_the_service_is_asked_for_them_in_evaluations_only() -> None:
    handles = Handles()
    service = RewardService([], 1.0, handles, make_mix(METRICS), None)  # type: ignore[arg-type]  # a scorer by handle
    assert [one.total for one in score(service, False)] == [one.total for one in score(service, True)]
    assert handles.asked == [["jpeg"], EVERYTHING]


def test_light_metrics_are_measured_beside_the_scorer() -> None:
    inner = FakeScorer(lambda sample: None if sample.id == "s0" else 2.0)
    scorer = WithLightMetrics(inner, make_mix([SharpnessConfig(only_eval=True)]))
    assert names(score(scorer, False)) == ["fake"]
    evaluated = score(scorer, True)
    assert inner.evaluations == [False, True]
    assert names(evaluated) == ["fake", "sharpness"]
    assert [one.total for one in evaluated] == [None, 2.0, 2.0], "a failed reward stays failed, whatever is measured"
    alone = score(make_mix([SharpnessConfig()]), False)
    assert [one.scores[1].value for one in evaluated] == [one.total for one in alone]


def test_light_metrics_reserve_no_replica_unless_told_to() -> None:
    def cpus(*rewards: Mapping[str, Any], **service: Any) -> float:
        data = {"rewards": [{"type": "ocr"}, *rewards], "reward_service": service}
        return required_resources(parse_config(RunConfig, data, "test"))["CPU"]

    light, heavy = {"type": "sharpness", "only_eval": True}, {"type": "aesthetic", "only_eval": True}
    alone = cpus()
    assert cpus(light) == alone
    assert cpus(light, per_reward={"sharpness": {"num_cpus_per_replica": 2.0}}) == alone + 2.0
    assert cpus(heavy) == cpus({"type": "sharpness"}) > alone


def pictures() -> RolloutGroup:
    """Three siblings whose pictures are unlike."""
    group = make_group(GroupTask(Prompt("p", "a sign"), 0, 0), range(3), 0)
    images = np.random.default_rng(0).integers(0, 256, (3, 12, 16, 3), dtype=np.uint8)
    return replace(group, images_GHWC=images // np.array([1, 4, 32])[:, None, None, None].astype(np.uint8))


def test_groups_are_scored_as_asked() -> None:
    scorer = FakeScorer()
    asyncio.run(score_groups(scorer, [pictures()]))
    asyncio.run(score_groups(scorer, [pictures()], evaluation=True))
    assert scorer.evaluations == [False, True]


def test_an_evaluation_reports_them_beside_an_equal_mean() -> None:
    rewards = make_mix([JpegConfig(), SharpnessConfig(only_eval=True)])
    trained, evaluated = (
        eval_metrics(asyncio.run(score_groups(rewards, [pictures()], evaluation))) for evaluation in (False, True)
    )
    assert evaluated.keys() - trained.keys() == {"eval/sharpness"}
    assert {name: evaluated[name] for name in trained} == trained


@pytest.mark.parametrize("std", ["global", "group", "gdpo"])
def test_credit_would_not_see_them_even_in_an_evaluation(std: AdvantageStd) -> None:
    rewards = make_mix([JpegConfig(), SharpnessConfig(only_eval=True)])
    trained, evaluated = (
        credit_groups(asyncio.run(score_groups(rewards, [pictures()], evaluation)), std, 5.0)[0]
        for evaluation in (False, True)
    )
    assert trained.adv_G.tolist() == evaluated.adv_G.tolist()
    assert len(set(trained.adv_G.tolist())) == 3
