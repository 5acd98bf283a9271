"""The OCR reward around a fake engine: where targets come from, and what each failure becomes."""

import asyncio

import numpy as np
import pytest
from pydantic import ValidationError

from raylign.errors import PromptError
from raylign.types import Prompt, RewardSample
from rewards import OcrConfig, OcrReward

IMAGE_HWC = np.zeros((8, 16, 3), np.uint8)


class FakeEngine:
    """Reads a picture by looking its first pixel up; a text that is missing raises, pixel 66 takes too long."""

    version, fingerprint = "0", "f" * 64

    def __init__(self, texts: dict[int, str]) -> None:
        self.texts = texts
        self.loaded = 0

    def load(self) -> None:
        self.loaded += 1

    def read(self, image_HWC: np.ndarray) -> str:
        if image_HWC[0, 0, 0] == 66:
            raise TimeoutError
        return self.texts[int(image_HWC[0, 0, 0])]


def _image(key: int) -> np.ndarray:
    return np.full((8, 16, 3), key, np.uint8)


def _sample(name: str, text: str, image_HWC: np.ndarray | None = IMAGE_HWC, **metadata) -> RewardSample:
    return RewardSample(name, Prompt(name, text, metadata), image_HWC)


def _score(reward: OcrReward, *samples: RewardSample):
    return asyncio.run(reward.score(samples))


def test_each_sample_gets_its_own_answer() -> None:
    reward = OcrReward(OcrConfig(), FakeEngine({1: "HELLO", 2: "", 3: "help"}))
    scores = _score(
        reward,
        _sample("good", 'a sign "Hello"', _image(1)),
        _sample("blank", 'a sign "Hello"', _image(2)),
        _sample("no quote", "a sign", _image(1)),
        _sample("broken engine", 'a sign "Hello"', _image(9)),
        _sample("no image", 'a sign "Hello"', None),
        _sample("metadata", "a sign", _image(3), target="Help"),
    )
    assert [score.value for score in scores] == [1.0, 0.0, None, None, None, 1.0]
    assert [score.error and score.error.code for score in scores] == [
        None, None, "invalid_input", "model_error", "invalid_input", None,
    ]  # fmt: skip
    assert dict(scores[0].details) == {"recognised": "HELLO", "exact": True}
    assert dict(scores[1].details) == {"recognised": "", "exact": False}
    assert all(score.name == "ocr" and score.version == reward.version for score in scores)


def test_the_text_of_an_engine_error_stays_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    (score,) = _score(OcrReward(OcrConfig(), FakeEngine({})), _sample("s7", 'a sign "Hello"', _image(9)))
    assert score.error is not None
    assert "KeyError" not in score.error.message
    assert "s7" in caplog.text
    assert "KeyError" in caplog.text


@pytest.mark.parametrize(
    ("image_HWC", "reason"),
    [
        (np.zeros((8, 16), np.uint8), "must be uint8"),
        (np.zeros((8, 16, 4), np.uint8), "must be uint8"),
        (np.zeros((8, 16, 3), np.float32), "must be uint8"),
        (np.zeros((0, 16, 3), np.uint8), "sides"),
        (np.zeros((1, 65, 3), np.uint8), "sides"),
    ],
)
def test_a_picture_that_is_none_is_invalid_input(image_HWC: np.ndarray, reason: str) -> None:
    (score,) = _score(OcrReward(OcrConfig(), FakeEngine({0: "x"})), _sample("s", 'a "x"', image_HWC))
    assert score.error is not None
    assert score.error.code == "invalid_input"
    assert reason in score.error.message


def test_modes_differ_in_surplus_text_and_curly_quotes() -> None:
    clean = OcrReward(OcrConfig(), FakeEngine({0: "HELLOHELLO"}))
    published = OcrReward(OcrConfig(mode="flow_grpo"), FakeEngine({0: "HELLOHELLO"}))
    straight, curly = _sample("a", 'a "hello"'), _sample("b", "a “hello”")
    assert [s.value for s in _score(clean, straight, curly)] == [0.5, 0.5]
    assert [s.value for s in _score(published, straight, curly)] == [1.0, None]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (Prompt("p3", "a sign without"), r"prompt 'p3' .* has no quoted target; put the text"),
        (Prompt("p3", 'an empty "" pair'), "needs a letter or a digit"),
        (Prompt("p3", 'only dots "..."'), "needs a letter or a digit"),
        (Prompt("p3", 'a "x"', {"target": 5}), "metadata.target 5; it must be a text"),
    ],
)
def test_check_names_the_prompt_and_the_remedy(prompt: Prompt, reason: str) -> None:
    reward = OcrReward(OcrConfig(), FakeEngine({}))
    with pytest.raises(PromptError, match=reason):
        reward.check(prompt)


def test_check_accepts_what_score_can_use() -> None:
    reward = OcrReward(OcrConfig(), FakeEngine({}))
    reward.check(Prompt("a", 'a "x"'))
    reward.check(Prompt("b", "a sign", {"target": "x"}))


def test_loading_is_the_engines() -> None:
    engine = FakeEngine({})
    OcrReward(OcrConfig(), engine).load()
    assert engine.loaded == 1


def test_a_reading_that_takes_too_long_may_be_tried_again() -> None:
    late, good = _score(
        OcrReward(OcrConfig(), FakeEngine({1: "x"})), *(_sample("s", 'a "x"', _image(k)) for k in (66, 1))
    )
    assert late.error is not None
    assert (late.error.code, late.error.retryable) == ("timeout", True)
    assert (good.value, good.fingerprint) == (1.0, "f" * 64)


def test_a_language_is_for_engines_that_have_several() -> None:
    with pytest.raises(ValidationError, match="language 'fra' has no effect on engine 'rapidocr'; leave it out"):
        OcrConfig(engine="rapidocr", language="fra")
    with pytest.raises(ValidationError, match="pattern"):
        OcrConfig(engine="tesseract", language="../secret")
    assert OcrConfig(engine="tesseract", language="eng+chi_sim").language == "eng+chi_sim"
