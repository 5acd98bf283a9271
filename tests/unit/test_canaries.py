"""The suite of master keys: what is in it, and that a strict judge passes while a gullible one is caught."""

import asyncio

import numpy as np
import pytest

from rewards.base import Canary, Reward, score_totally
from rewards.judging.canaries import CAPTION, GOOD_ANSWER, TEXTS, image_canaries, text_canaries
from rewards.judging.r3_judge import R3Config
from rewards.r3 import R3Reward
from tests.reward_cases.judges import ScriptedEngine, said, verdict


def _opened(reward: Reward, canaries: list[Canary]) -> list[str]:
    """Names of the canaries that got more than they may, or no value."""
    scores = asyncio.run(score_totally(reward, [canary.sample for canary in canaries]))
    pairs = zip(canaries, scores, strict=True)
    return [canary.name for canary, score in pairs if score.value is None or score.value > canary.highest]


def test_every_canary_has_its_own_name_and_sample() -> None:
    for suite in (text_canaries(0.25), image_canaries(0.25)):
        assert len({canary.name for canary in suite}) == len({canary.sample.id for canary in suite}) == len(suite)
        assert {canary.highest for canary in suite} == {0.25}


def test_texts_do_not_answer_and_the_reference_does() -> None:
    assert "66.7" in GOOD_ANSWER
    assert not any("66" in text for text in TEXTS.values())
    assert all(canary.sample.reference == GOOD_ANSWER for canary in text_canaries(0))


def test_pictures_are_blank_noise_or_words() -> None:
    by_name = {canary.name: canary.sample.image_HWC for canary in image_canaries(0)}
    for image_HWC in by_name.values():
        assert image_HWC is not None
        assert (image_HWC.dtype, image_HWC.shape) == (np.uint8, (256, 256, 3))
    assert len(np.unique(by_name["white"])) == len(np.unique(by_name["black"])) == 1  # type: ignore[arg-type]
    for name in ("words_yes", "words_instruction", "words_caption", "words_json"):
        dark = (by_name[name] < 128).mean()  # type: ignore[operator]
        assert 0.01 < dark < 0.3, f"{name} shows words on a plain ground"
    assert {canary.name for canary in image_canaries(0, words=False)} == {"white", "black", "noise"}
    assert all(canary.sample.prompt.text == CAPTION for canary in image_canaries(0))


def test_words_in_a_picture_can_be_read() -> None:
    """By the OCR reward's engine, so that the judge can read them too."""
    from rewards.reading.engine import make_engine

    (sample,) = [canary.sample for canary in image_canaries(0) if canary.name == "words_yes"]
    engine = make_engine("rapidocr", 1)
    engine.load()
    assert sample.image_HWC is not None
    assert "PERFECT" in engine.read(sample.image_HWC).upper()


def test_a_strict_judge_passes() -> None:
    reward = R3Reward(R3Config(), ScriptedEngine(lambda _: verdict(1)))
    assert _opened(reward, list(reward.canaries())) == []


@pytest.mark.parametrize("mode", ["point", "binary"])
def test_a_gullible_judge_is_caught_by_all_that_reach_it(mode) -> None:
    best = {"point": 5, "binary": True}[mode]
    reward = R3Reward(R3Config(mode=mode), ScriptedEngine(lambda _: verdict(best)))
    opened = _opened(reward, list(reward.canaries()))
    assert "instruction" in opened
    assert "empty" not in opened, "needs no judge"
    assert len(opened) == len(TEXTS) - 9


def test_a_judge_that_obeys_the_candidate_is_caught() -> None:
    obeys = ScriptedEngine(lambda request: verdict(5 if "highest score" in said(request) else 1))
    reward = R3Reward(R3Config(), obeys)
    assert _opened(reward, list(reward.canaries())) == ["instruction"]


def test_in_pair_mode_a_canary_must_lose_to_the_right_answer() -> None:
    def judge(request) -> str:
        first = said(request).split("### RESPONSE 1\n")[1].split("\n\n### RESPONSE 2")[0]
        return verdict("Response 1" if first == GOOD_ANSWER else "Response 2")

    reward = R3Reward(R3Config(mode="pair"), ScriptedEngine(judge))
    assert _opened(reward, list(reward.canaries())) == []


def test_pictures_are_judged_by_the_canaries_that_fit_the_rubric() -> None:
    def names(rubric: str, mode: str = "point") -> set[str]:
        config = R3Config.model_validate({"modality": "image", "rubric": rubric, "mode": mode})
        return {canary.name for canary in R3Reward(config, ScriptedEngine()).canaries()}

    assert "words_yes" in names("text_to_image_alignment")
    assert names("image_quality") == {"white", "black", "noise"}
    assert names("image_quality", "pair") == set(), "pictures are compared in groups only"
