"""What every row of the REWARDS table owes: total, ordered, finite, the same however samples are split."""

import asyncio
import math
from collections.abc import Sequence

import numpy as np
import pytest
from pydantic import TypeAdapter

from raylign.types import Prompt, RewardSample, RewardScore
from rewards import REWARDS, Reward, RewardConfig, RewardUnion, make_reward

PROMPT = Prompt("p", 'a sign that says "HELLO"', {"answer": "4"})


@pytest.fixture(scope="module", params=list(REWARDS), ids=lambda cls: cls.__name__)
def config(request: pytest.FixtureRequest) -> RewardConfig:
    return request.param()


@pytest.fixture(scope="module")
def reward(config) -> Reward:
    built = make_reward(config)
    built.load()
    return built


def _good(count: int) -> list[RewardSample]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 24, 80, 3), dtype=np.uint8)
    return [RewardSample(f"s{i}", PROMPT, image, f"<answer>{i}</answer>") for i, image in enumerate(images)]


def _bad() -> list[RewardSample]:
    return [
        RewardSample("nothing", PROMPT),
        RewardSample("no text in the prompt", Prompt("q", ""), np.zeros((24, 80, 3), np.uint8), ""),
        RewardSample("grey", PROMPT, np.zeros((24, 80), np.uint8)),
        RewardSample("float", PROMPT, np.zeros((24, 80, 3), np.float32)),
        RewardSample("empty", PROMPT, np.zeros((0, 0, 3), np.uint8)),
        RewardSample("one pixel", PROMPT, np.zeros((1, 1, 3), np.uint8), "\0"),
        RewardSample("sliver", PROMPT, np.zeros((1, 5000, 3), np.uint8)),
        RewardSample("metadata", Prompt("r", 'a "x"', {"target": [1, None]}), np.zeros((24, 80, 3), np.uint8)),
    ]


def _values(scores: Sequence[RewardScore]) -> list[tuple]:
    return [(score.value, score.error, dict(score.details), score.version) for score in scores]


def test_the_configuration_is_a_row_by_its_type(config: RewardConfig) -> None:
    data = config.model_dump(mode="json")
    assert data["type"] == data["name"]
    assert TypeAdapter[RewardConfig](RewardUnion).validate_python(data) == config
    assert (config.weight, config.required) == (1.0, True)


def test_it_says_what_it_is(reward: Reward, config: RewardConfig) -> None:
    assert reward.name == config.name
    assert reward.version
    assert reward.modality in ("image", "text")
    assert reward.range is None or reward.range[0] < reward.range[1]
    assert reward.higher_is_better in (True, False)
    assert reward.deterministic in (True, False)


def test_no_samples_are_no_scores(reward: Reward) -> None:
    assert asyncio.run(reward.score([])) == []


def test_bad_samples_are_errors_and_leave_good_ones_alone(reward: Reward) -> None:
    good, bad = _good(2), _bad()
    alone = asyncio.run(reward.score(good))
    mixed = asyncio.run(reward.score([good[0], *bad, good[1]]))
    assert len(mixed) == len(bad) + 2
    assert _values([mixed[0], mixed[-1]]) == _values(alone)
    assert mixed[1].error is not None
    assert mixed[1].error.code == "invalid_input"


def test_good_samples_have_finite_values_in_range(reward: Reward) -> None:
    low, high = reward.range or (-math.inf, math.inf)
    for score in asyncio.run(reward.score(_good(4))):
        assert score.error is None
        assert score.value is not None
        assert math.isfinite(score.value)
        assert low <= score.value <= high
        assert (score.name, score.version) == (reward.name, reward.version)
        assert score.seconds >= 0


def test_splitting_and_reordering_change_nothing(reward: Reward) -> None:
    samples = _good(6)
    together = _values(asyncio.run(reward.score(samples)))
    apart = [value for sample in samples for value in _values(asyncio.run(reward.score([sample])))]
    backwards = _values(asyncio.run(reward.score(samples[::-1])))[::-1]
    assert together == apart == backwards


def test_a_deterministic_reward_repeats_itself(reward: Reward) -> None:
    if not reward.deterministic:
        pytest.skip("not deterministic, and says so")
    samples = _good(3)
    assert _values(asyncio.run(reward.score(samples))) == _values(asyncio.run(reward.score(samples)))


def test_a_prompt_that_can_be_scored_passes_the_check(reward: Reward) -> None:
    reward.check(PROMPT)
