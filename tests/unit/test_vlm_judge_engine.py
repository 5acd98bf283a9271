"""Judges of pictures and texts on real engines: random checkpoints, asked in this process."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from raylign.types import Prompt, RewardSample, RewardScore
from rewards.base import score_totally
from rewards.judging.engines import DecisionEngineConfig
from rewards.judging.r3_judge import R3Config
from rewards.r3 import R3Reward
from rewards.vlm_judge import VlmJudgeConfig, VlmJudgeReward
from tests.tiny_judges import write_llava_judge, write_text_judge


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> DecisionEngineConfig:
    return DecisionEngineConfig(model=str(write_llava_judge(tmp_path_factory.mktemp("judges") / "llava")))


def _score(reward: VlmJudgeReward | R3Reward, *samples: RewardSample) -> list[RewardScore]:
    return asyncio.run(score_totally(reward, samples))


def _sample(text: str, level: int) -> RewardSample:
    return RewardSample("s", Prompt("p", text), np.full((16, 16, 3), level, np.uint8))


def test_p_yes_depends_on_the_caption_and_on_the_picture(llava: DecisionEngineConfig) -> None:
    reward = VlmJudgeReward(VlmJudgeConfig(engine=llava, normalise="vocabulary"))
    samples = [
        _sample("a red cube", 0),
        _sample("a red cube", 255),
        _sample("a blue ball", 0),
        _sample("a red cube", 0),
    ]
    scores = _score(reward, *samples)
    values = [score.value for score in scores]
    assert [score.error for score in scores] == [None] * 4
    assert values[0] == values[3]
    assert len(set(values)) == 3
    for score in scores:
        assert score.details["source"] == "decision"
        assert score.details["low_confidence"] is True, "a random model spreads its probability over all words"
        assert score.details["p_first"] == score.value
        assert score.fingerprint


def test_a_group_of_pictures_is_compared(llava: DecisionEngineConfig) -> None:
    reward = VlmJudgeReward(VlmJudgeConfig(engine=llava, mode="pairwise"))
    scores = asyncio.run(reward.score_group([_sample("a red cube", level) for level in (0, 128, 255)]))
    values = [score.value or 0.0 for score in scores]
    assert [score.error for score in scores] == [None] * 3
    assert sum(values) == pytest.approx(1.5)


def test_a_judge_that_babbles_gives_errors_and_no_numbers(llava: DecisionEngineConfig, tmp_path: Path) -> None:
    aspects = VlmJudgeReward(VlmJudgeConfig(engine=llava, mode="aspects", max_tokens=8, max_retries=1))
    text_judge = DecisionEngineConfig(model=str(write_text_judge(tmp_path / "text")))
    r3 = R3Reward(R3Config(engine=text_judge, max_tokens=8, context_tokens=4096, max_retries=1))
    text = RewardSample("s", Prompt("p", "What is 2 + 2?"), text="It is 4.")
    for score in (*_score(aspects, _sample("a red cube", 0)), *_score(r3, text)):
        assert score.value is None
        assert score.error
        assert score.error.code in ("truncated", "unparseable")
