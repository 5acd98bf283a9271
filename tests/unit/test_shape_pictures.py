"""Scenes of plain shapes: what is asked for is there, apart, inside, in its relation, and of its colour."""

from __future__ import annotations

import numpy as np
import pytest

from raylign.pretrain.shape_pictures import (
    COLOURS,
    GAP,
    JITTER,
    MARGIN,
    Group,
    Scene,
    Shape,
    compose,
    coverage,
    outlines,
    render,
)


@pytest.mark.parametrize(
    ("name", "area"),
    [
        ("circle", np.pi / 4),
        ("square", 1.0),
        ("triangle", 3**0.5 / 4),
        ("diamond", 0.5),
        ("cross", 5 / 9),
    ],
)
def test_a_shape_covers_its_area(name: str, area: float) -> None:
    assert coverage(name, 60.3, 59.8, 100, 120, 120).sum() / 100**2 == pytest.approx(area, rel=0.01)


@pytest.mark.parametrize("name", list(outlines()))
def test_a_shape_fills_its_box(name: str) -> None:
    points = outlines()[name]
    assert (points.max(axis=0) - points.min(axis=0)).max() == pytest.approx(1.0)
    assert np.abs(points.max(axis=0) + points.min(axis=0)).max() < 1e-6
    shape = Shape(name, "red", 20.5, 21.5, 16.0)
    covered = coverage(name, shape.x, shape.y, shape.size, 44, 40) > 0
    rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
    seen = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert np.abs(np.array(seen) - shape.box).max() <= 1


def test_edges_are_antialiased_and_colours_are_exact() -> None:
    scene = Scene(32, 40, (Shape("circle", "blue", 16.2, 14.7, 14),), (COLOURS["blue"],))
    picture = render(scene)
    assert picture.shape == (32, 40, 3)
    assert picture.dtype == np.uint8
    assert tuple(picture[14, 16]) == COLOURS["blue"]
    assert tuple(picture[0, 0]) == scene.background
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


@pytest.mark.parametrize("size", [(32, 32), (24, 80), (64, 48)])
def test_a_composed_scene_shows_what_was_asked_for(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = compose(rng, [Group("star", 1, "red"), Group("heart", 2, None, "right of", 0)], *size)
        star, *hearts = scene.shapes
        assert [shape.name for shape in scene.shapes] == ["star", "heart", "heart"]
        assert star.colour == "red"
        for heart in hearts:
            assert heart.x - star.x > 2 * abs(heart.y - star.y)
            assert heart.x - heart.size / 2 >= star.x + star.size / 2 + GAP
        for shape, paint in zip(scene.shapes, scene.paints, strict=True):
            left, top, right, bottom = shape.box
            assert left >= MARGIN - 1e-6
            assert top >= MARGIN - 1e-6
            assert right <= size[1] - MARGIN + 1e-6
            assert bottom <= size[0] - MARGIN + 1e-6
            assert np.abs(np.subtract(paint, COLOURS[shape.colour])).max() <= JITTER


def test_the_same_generator_composes_the_same_scene() -> None:
    scenes = [compose(np.random.default_rng(7), [Group("cross", 4)], 32, 32) for _ in range(2)]
    assert scenes[0] == scenes[1]


def test_too_many_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="12 shapes as asked do not fit into 32x32 pixels"):
        compose(np.random.default_rng(0), [Group("cross", 12)], 32, 32)
