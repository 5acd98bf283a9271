"""The geometric detector reads what the shapes world draws, exactly, and refuses what is no shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from raylign.pretrain.shape_pictures import Group, Scene, Shape, compose, outlines, render
from rewards.scenes.colour import PixelColours
from rewards.scenes.prompts import draw_task
from rewards.scenes.rules import clean, flow_grpo, official, relations, select, threshold_of
from rewards.scenes.shapes import ShapesDetector, _blobs, _fits
from rewards.scenes.task import TAGS, Clause, Tag, Task

DETECTOR, COLOURS = ShapesDetector(), PixelColours()
SCENES_PER_TAG = 10
NUM_DISTORTED = 6


def scene_of(rng: np.random.Generator, task: Task, height: int, width: int) -> Scene:
    """A picture that a task deserves."""
    groups = [
        Group(clause.name, clause.count, clause.colour, clause.relation, clause.target) for clause in task.include
    ]
    return compose(rng, groups, height, width)


def scenes(tag: Tag, height: int, width: int, count: int = SCENES_PER_TAG) -> Iterator[tuple[Task, Scene]]:
    """Random tasks of a kind with a picture each."""
    rng = np.random.default_rng((TAGS.index(tag), height, width))
    for _ in range(count):
        task = draw_task(rng, tag, DETECTOR.names)
        yield task, scene_of(rng, task, height, width)


def judge(task: Task, picture: np.ndarray) -> list[float]:
    """The picture's values by the three rules."""
    threshold = threshold_of(task.tag)
    found = select(DETECTOR.detect(picture, threshold), threshold)
    return [
        rule(task, found, lambda seen: COLOURS.name_colours(picture, seen)).value
        for rule in (clean, official, flow_grpo)
    ]


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (64, 64), (128, 128), (40, 96)])
@pytest.mark.parametrize("tag", TAGS)
def test_every_drawn_scene_is_read_exactly(tag: Tag, size: tuple[int, int]) -> None:
    for task, scene in scenes(tag, *size):
        picture = render(scene)
        seen = DETECTOR.detect(picture, 0.9)
        colours = COLOURS.name_colours(picture, seen)
        left = [(shape.name, shape.colour, shape.box) for shape in scene.shapes]
        for one, colour in zip(seen, colours, strict=True):
            match = min(left, key=lambda shape: np.abs(np.subtract(shape[2], one.box)).max())
            assert (one.name, colour) == match[:2], scene
            width = one.box[2] - one.box[0]
            assert np.abs(np.subtract(match[2], one.box)).max() < 2 + width / 40, scene  # tips are faint
            assert one.mask_HW is not None
            left.remove(match)
        assert left == [], scene
        assert judge(task, picture) == [1.0, 1.0, 1.0], scene


@pytest.mark.parametrize("name", list(outlines()))
def test_a_drawn_shape_fits_its_own_kind_and_no_other(name: str) -> None:
    rng = np.random.default_rng(0)
    for size in np.repeat(np.geomspace(8, 40, 6), 4):
        side = round(3 * size)
        x, y = rng.uniform(size, 2 * size, 2)
        shape = Shape(name, "brown", x, y, size)
        ((alpha, _, _),) = _blobs(render(Scene(side, side, (shape,), ((118, 70, 34),))))
        fits = _fits(alpha)
        assert fits.pop(name) > 0.9
        assert max(fits.values()) < 0.87


@pytest.mark.parametrize("size", [(32, 32), (128, 128)])
def test_a_scene_of_another_task_is_not_perfect(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    for tag in TAGS:
        for task, _ in scenes(tag, *size, count=6):
            other = draw_task(rng, tag, DETECTOR.names)
            if {clause.name for clause in task.include} & {clause.name for clause in other.include}:
                continue
            assert judge(other, render(scene_of(rng, task, *size)))[0] == 0.0


def test_a_relation_drawn_the_other_way_round_is_seen() -> None:
    task = Task("position", (Clause("circle"), Clause("star", relation="above", target=0)))
    shapes = (Shape("circle", "red", 20, 14, 14), Shape("star", "blue", 22, 44, 16))
    picture = render(Scene(64, 64, shapes, ((215, 38, 38), (40, 80, 210))))
    assert judge(task, picture) == [pytest.approx(2 / 3), 0.0, 0.75]
    circle, star = (
        next(one for one in DETECTOR.detect(picture, 0.9) if one.name == name) for name in ("circle", "star")
    )
    assert relations(star.box, circle.box) == {"below"}


def _share_read(distort, side: int) -> float:
    """Share of scenes, all six kinds, that are still perfect when distorted."""
    rng = np.random.default_rng(3)
    values = [
        judge(task, distort(rng, render(scene)))[0] == 1.0
        for tag in TAGS
        for task, scene in scenes(tag, side, side, count=NUM_DISTORTED)
    ]
    return float(np.mean(values))


def _noisy(sigma: float):
    return lambda rng, picture: (picture + rng.normal(0, sigma, picture.shape)).round().clip(0, 255).astype(np.uint8)


def _blurred(sigma: float):
    return lambda rng, picture: cv2.GaussianBlur(picture, (0, 0), sigma)


def _compressed(quality: int):
    def distort(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
        ok, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
        decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
        assert ok
        assert decoded is not None
        return np.asarray(decoded, np.uint8)

    return distort


@pytest.mark.parametrize(
    ("distort", "side", "least"),
    [
        (_noisy(8), 32, 0.9),
        (_noisy(8), 64, 0.9),
        (_blurred(0.5), 32, 0.9),
        (_blurred(1.0), 64, 0.9),
        (_compressed(90), 64, 0.9),
    ],
)
def test_mild_distortion_is_survived(distort, side: int, least: float) -> None:
    assert _share_read(distort, side) >= least


def test_what_is_no_shape_scores_little() -> None:
    rng = np.random.default_rng(0)
    assert DETECTOR.detect(np.full((64, 64, 3), 128, np.uint8), 0.0) == []
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert select(DETECTOR.detect(noise, 0.3), 0.3) == {}
    counts = Counter(one.name for one in DETECTOR.detect(_bars(), 0.9))
    assert counts == {}


def _bars() -> np.ndarray:
    """Long bars and an L, which no shape is like."""
    picture = np.full((96, 96, 3), 128, np.uint8)
    cv2.rectangle(picture, (5, 5), (60, 12), (215, 38, 38), -1)
    cv2.rectangle(picture, (70, 20), (76, 90), (40, 80, 210), -1)
    cv2.rectangle(picture, (10, 40), (20, 85), (248, 248, 248), -1)
    cv2.rectangle(picture, (10, 78), (50, 88), (248, 248, 248), -1)
    return picture


def test_touching_shapes_are_not_counted_apart() -> None:
    shapes = (Shape("circle", "red", 20, 32, 20), Shape("circle", "red", 38, 32, 20))
    picture = render(Scene(64, 64, shapes, ((215, 38, 38),) * 2))
    assert len(DETECTOR.detect(picture, 0.9)) == 0


@pytest.mark.parametrize("side", [1, 2, 5, 700])
def test_any_picture_is_looked_at(side: int) -> None:
    rng = np.random.default_rng(side)
    for picture in (np.zeros((side, 2 * side, 3), np.uint8), rng.integers(0, 256, (side, side, 3), dtype=np.uint8)):
        assert all(0 < one.score <= 1 for one in DETECTOR.detect(picture, 0.0))
    assert len(outlines()) == 7


def test_a_large_picture_is_read_like_a_small_one() -> None:
    scene = compose(np.random.default_rng(2), [Group("heart", 1, "pink"), Group("cross", 2, "black")], 700, 900)
    seen = DETECTOR.detect(render(scene), 0.9)
    assert Counter(one.name for one in seen) == {"heart": 1, "cross": 2}
