"""The reward over its seams: the rule that was asked for, everything seen in the details, failures kept apart."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from raylign.config import parse_config
from raylign.errors import ConfigError, PromptError
from raylign.pretrain.shape_pictures import Group, Scene, Shape, compose, render
from raylign.types import Prompt, RewardSample, RewardScore
from rewards.geneval import GenevalConfig, GenevalParams, GenevalReward, Mode
from rewards.scenes.colour import ClipColourConfig, ClipColours, PixelColours
from rewards.scenes.detector import Mask2FormerConfig
from rewards.scenes.rules import Detection, geneval_accuracy
from rewards.scenes.shapes import ShapesDetector
from tests.tiny_clip import clip_folder
from tests.unit.test_geneval_detector import tiny_folder

BELOW: dict[str, Any] = {
    "tag": "position",
    "include": [
        {"class": "circle", "count": 1},
        {"class": "star", "count": 1, "color": "blue", "position": ["below", 0]},
    ],
}
SHAPES = (Shape("circle", "red", 20, 14, 14), Shape("star", "blue", 22, 44, 16))
PICTURE = render(Scene(64, 64, SHAPES, ((215, 38, 38), (40, 80, 210))))


def _sample(metadata: Mapping[str, Any], image: np.ndarray | None = PICTURE, name: str = "s") -> RewardSample:
    return RewardSample(name, Prompt(name, "a photo", metadata), image)


def _score(reward: GenevalReward, *samples: RewardSample) -> list[RewardScore]:
    return asyncio.run(reward.score(samples))


class Scripted:
    """A detector that sees what it is told, and fails on black pictures."""

    names = ("cat", "dog")
    version = "scripted"
    fingerprint = "f1"

    def __init__(self, *seen: Detection) -> None:
        self._seen = seen
        self.thresholds: list[float] = []

    def load(self) -> None: ...

    def detect(self, image_HWC: np.ndarray, threshold: float) -> list[Detection]:
        if not image_HWC.any():
            raise RuntimeError("a secret path: /tmp/model")
        self.thresholds.append(threshold)
        return list(self._seen)


class CountingColours(PixelColours):
    """Remembers how many objects it was asked about."""

    def __init__(self) -> None:
        self.asked = 0

    def name_colours(self, image_HWC: np.ndarray, detections: Sequence[Detection]) -> list[str]:
        self.asked += len(detections)
        return super().name_colours(image_HWC, detections)


def test_everything_seen_is_in_the_details() -> None:
    (score,) = _score(GenevalReward(GenevalConfig()), _sample(BELOW))
    assert score.value == 1.0
    assert score.details["tag"] == "position"
    assert score.details["official"] is True
    assert score.details["strict"] is True
    assert score.details["reasons"] == []
    assert score.details["clauses"] == [
        {"class": "circle", "aspect": "count", "value": 1.0},
        {"class": "star", "aspect": "count", "value": 1.0},
        {"class": "star", "aspect": "color", "value": 1.0},
        {"class": "star", "aspect": "position", "value": 1.0},
    ]
    objects: Any = score.details["objects"]
    assert {(one["class"], one.get("color")) for one in objects} == {("circle", None), ("star", "blue")}
    assert np.abs(np.subtract(objects[0]["box"], SHAPES[0].box)).max() < 2


@pytest.mark.parametrize(("mode", "value"), [("clean", 0.75), ("strict", 0.0), ("official", 0.0), ("flow_grpo", 4 / 5)])
def test_a_star_on_the_wrong_side(mode: Mode, value: float) -> None:
    # clean: counts 1 and 1, colour 1, position 0. flow_grpo: the same four and a 1 for nothing.
    above = {**BELOW, "include": [BELOW["include"][0], {**BELOW["include"][1], "position": ["above", 0]}]}
    reward = GenevalReward(GenevalConfig(mode=mode))
    (score,) = _score(reward, _sample(above))
    assert score.value == value
    assert score.details["reasons"] == ["expected star above circle, found it below it"]
    assert (score.details["official"], score.details["strict"]) == (False, False)
    assert mode in reward.version


def test_a_request_may_ask_for_another_rule() -> None:
    reward = GenevalReward(GenevalConfig())
    crowd = {"tag": "single_object", "include": [{"class": "heart", "count": 1}]}
    hearts = render(compose(np.random.default_rng(0), [Group("heart", 4)], 64, 64))
    values = {
        mode: _score(reward.with_params(GenevalParams(mode=mode)), _sample(crowd, hearts))[0].value
        for mode in (None, "clean", "strict", "official", "flow_grpo")
    }
    assert values == {None: 0.0, "clean": 0.0, "strict": 0.0, "official": 1.0, "flow_grpo": -2.0}
    assert reward.with_params(GenevalParams()) is reward
    assert reward.with_params(GenevalParams(mode="flow_grpo")).range == (-14.0, 1.0)
    with pytest.raises(ValidationError):
        GenevalParams(mode="soft")  # type: ignore[arg-type]


def test_counting_asks_for_surer_objects() -> None:
    box = (0.0, 0.0, 10.0, 10.0)
    detector = Scripted(Detection("cat", 0.95, box), Detection("cat", 0.5, box))
    reward = GenevalReward(GenevalConfig(), detector, PixelColours())
    include = [{"class": "cat", "count": 2}]
    scores = _score(
        reward, _sample({"tag": "counting", "include": include}), _sample({"tag": "two_object", "include": include})
    )
    assert [score.value for score in scores] == [0.5, 1.0]
    assert detector.thresholds == [0.9, 0.3]
    assert scores[0].fingerprint == "f1"


def test_colours_are_named_once_and_only_where_they_matter() -> None:
    box = (0.0, 0.0, 10.0, 10.0)
    colours = CountingColours()
    reward = GenevalReward(GenevalConfig(), Scripted(Detection("cat", 0.9, box), Detection("dog", 0.9, box)), colours)
    red_cat = {"class": "cat", "count": 1, "color": "red"}
    _score(reward, _sample({"tag": "color_attr", "include": [red_cat, {"class": "dog", "count": 1}]}))
    assert colours.asked == 1
    _score(reward, _sample({"tag": "color_attr", "include": [{**red_cat, "count": 2}]}))
    assert colours.asked == 1


def test_a_failing_detector_costs_its_sample_only(caplog: pytest.LogCaptureFixture) -> None:
    reward = GenevalReward(GenevalConfig(), Scripted(), PixelColours())
    cat = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}
    good, bad, wrong = _score(
        reward, _sample(cat), _sample(cat, np.zeros((8, 8, 3), np.uint8)), _sample({"tag": "single_object"})
    )
    assert good.value == 0.0
    assert bad.error is not None
    assert (bad.error.code, "secret" in bad.error.message) == ("model_error", False)
    assert "secret" in caplog.text
    assert wrong.error is not None
    assert wrong.error.code == "invalid_input"
    with pytest.raises(PromptError, match="did you mean 'cat'"):
        reward.check(Prompt("p", "x", {"tag": "colors", "include": [{"class": "bat", "count": 1}]}))


def test_scores_add_up_to_the_benchmark() -> None:
    reward = GenevalReward(GenevalConfig())
    upside_down = {**BELOW, "include": [BELOW["include"][0], {"class": "star", "count": 1, "position": ["above", 0]}]}
    single = {"tag": "single_object", "include": [{"class": "star", "count": 1}]}
    scores = _score(reward, _sample(BELOW), _sample(upside_down), _sample(single))
    accuracy = geneval_accuracy(score.details for score in scores)
    assert accuracy["official"].by_tag == {"single_object": 1.0, "position": 0.5}
    assert accuracy["official"].overall == 0.75


def test_the_published_engines_are_configured_by_name() -> None:
    config = parse_config(
        GenevalConfig,
        {"detector": {"type": "mask2former", "path": tiny_folder()}, "colour": {"type": "clip", "path": clip_folder()}},
        "test",
    )
    assert config.detector == Mask2FormerConfig(path=tiny_folder())
    reward = GenevalReward(config)
    red_dog = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    first, second = _score(reward, _sample(red_dog), _sample(red_dog))
    assert first.value == second.value is not None
    assert first.fingerprint == second.fingerprint
    assert [len(part) for part in first.fingerprint.split("+")] == [64, 64]
    assert "mask2former" in reward.version
    assert "clip" in reward.version
    assert isinstance(GenevalReward(GenevalConfig(colour=ClipColourConfig()), ShapesDetector())._colours, ClipColours)
    with pytest.raises(ConfigError, match="yolo"):
        parse_config(GenevalConfig, {"detector": {"type": "yolo"}}, "test")
