"""What every row of the REWARDS table owes: total, ordered, finite, the same however samples are split."""

import asyncio
import math
from collections.abc import Mapping, Sequence

import pytest
from pydantic import TypeAdapter

from raylign.types import RewardSample, RewardScore
from rewards import REWARDS, Reward, RewardConfig, RewardUnion
from rewards.base import TakesParams, score_totally
from tests.reward_cases import geneval, judges, learned, pictures, remote, text
from tests.reward_cases.case import Case

CASES = [*pictures.CASES, *geneval.CASES, *learned.CASES, *text.CASES, *judges.CASES, *remote.CASES]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: type(case.config).__name__)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def reward(case: Case) -> Reward:
    built = case.make(case.config)
    built.load()
    return built


def _score(reward: Reward, samples: Sequence[RewardSample]) -> list[RewardScore]:
    return asyncio.run(reward.score(samples))


def _values(scores: Sequence[RewardScore]) -> list[tuple]:
    return [(score.value, score.error, dict(score.details), score.version, score.fingerprint) for score in scores]


def test_every_row_has_a_case() -> None:
    assert {type(case.config) for case in CASES} == set(REWARDS)


def test_the_configuration_is_a_row_by_its_type(case: Case) -> None:
    data = case.config.model_dump(mode="json")
    assert data["type"] == data["name"]
    assert TypeAdapter[RewardConfig](RewardUnion).validate_python(data) == case.config
    assert (case.config.weight, case.config.required) == (1.0, True)


def test_it_says_what_it_is(reward: Reward, case: Case) -> None:
    assert reward.name == case.config.name
    assert reward.version
    assert reward.modality in ("image", "text")
    assert reward.range is None or reward.range[0] < reward.range[1]
    assert reward.higher_is_better in (True, False)
    assert reward.deterministic in (True, False)
    assert reward.uses_seed in (True, False)
    assert isinstance(reward.fingerprint, str)
    assert isinstance(reward.metadata_keys, Mapping)
    assert all(isinstance(key, str) and meaning for key, meaning in reward.metadata_keys.items())


def test_no_samples_are_no_scores(reward: Reward) -> None:
    assert _score(reward, []) == []


def test_bad_samples_are_errors_and_leave_good_ones_alone(reward: Reward, case: Case) -> None:
    good = case.good(2)
    alone = _score(reward, good)
    mixed = _score(reward, [good[0], *case.bad, good[1]])
    assert _values([mixed[0], mixed[-1]]) == _values(alone)
    assert case.bad
    for sample, score in zip(case.bad, mixed[1:-1], strict=True):
        assert score.error is not None, sample.id
        assert score.error.code == "invalid_input", sample.id
        assert score.error.message


def test_good_samples_have_finite_values_in_range(reward: Reward, case: Case) -> None:
    low, high = reward.range or (-math.inf, math.inf)
    for score in _score(reward, case.good(4)):
        assert score.error is None
        assert score.value is not None
        assert math.isfinite(score.value)
        assert low <= score.value <= high
        assert (score.name, score.version) == (reward.name, reward.version)
        assert score.seconds >= 0


def test_splitting_and_reordering_change_nothing(reward: Reward, case: Case) -> None:
    samples = case.good(6)
    together = _values(_score(reward, samples))
    apart = [value for sample in samples for value in _values(_score(reward, [sample]))]
    backwards = _values(_score(reward, samples[::-1]))[::-1]
    assert together == apart == backwards


def test_a_deterministic_reward_repeats_itself(reward: Reward, case: Case) -> None:
    if not reward.deterministic:
        pytest.skip("not deterministic, and says so")
    samples = case.good(3)
    assert _values(_score(reward, samples)) == _values(_score(reward, samples))


def test_a_prompt_that_can_be_scored_passes_the_check(reward: Reward, case: Case) -> None:
    reward.check(case.prompt)


def test_its_probe_gets_a_value(reward: Reward) -> None:
    probe = reward.probe()
    if probe is None:
        pytest.skip("a probe would cost somebody else, and the reward says so")
    assert [score.error for score in asyncio.run(score_totally(reward, [probe]))] == [None]


def test_its_default_parameters_change_no_score(reward: Reward, case: Case) -> None:
    if not isinstance(reward, TakesParams):
        pytest.skip("takes no parameters")
    assert reward.params_model.model_json_schema()["additionalProperties"] is False
    adjusted = reward.with_params(reward.params_model())
    assert _values(_score(adjusted, case.good(2))) == _values(_score(reward, case.good(2)))
