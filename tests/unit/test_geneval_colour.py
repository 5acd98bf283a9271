"""Colours of objects: by pixels with every name's shades, and by CLIP with the official sentences and cut-outs."""

from __future__ import annotations

import numpy as np
import pytest

from raylign.pretrain import shape_pictures
from rewards.scenes.colour import (
    ANCHORS,
    BLANK,
    ClipColourConfig,
    ClipColours,
    PixelColours,
    cut_out,
    make_colours,
    nearest_colour,
)
from rewards.scenes.rules import Detection
from rewards.scenes.task import COLOURS
from rewards.vision.clip_model import ClipModel
from tests.tiny_clip import clip_folder


def test_the_palette_of_the_shapes_world_is_the_ten_colours() -> None:
    assert set(shape_pictures.COLOURS) == set(ANCHORS) == set(COLOURS)


@pytest.mark.parametrize("name", COLOURS)
def test_a_palette_colour_keeps_its_name_when_varied_and_faded(name: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        varied = np.array(shape_pictures.COLOURS[name]) + rng.integers(-shape_pictures.JITTER, 9, 3)
        assert nearest_colour(varied.clip(0, 255)) == name
        assert nearest_colour(128 + (varied.clip(0, 255) - 128) * 0.85) == name


@pytest.mark.parametrize(
    ("colour", "name"),
    [
        ((200, 30, 30), "red"),
        ((128, 0, 0), "red"),  # maroon
        ((255, 150, 30), "orange"),
        ((235, 225, 90), "yellow"),
        ((60, 179, 113), "green"),  # medium sea green
        ((0, 60, 20), "green"),
        ((100, 149, 237), "blue"),  # cornflower
        ((10, 10, 90), "blue"),
        ((120, 30, 160), "purple"),
        ((219, 112, 147), "pink"),  # pale violet red
        ((110, 65, 30), "brown"),
        ((25, 25, 25), "black"),
        ((5, 10, 20), "black"),
        ((240, 240, 245), "white"),
        ((220, 220, 215), "white"),
    ],
)
def test_shades_that_are_no_examples(colour: tuple[int, int, int], name: str) -> None:
    assert all(colour not in shades for shades in ANCHORS.values())
    assert nearest_colour(colour) == name


def test_the_middle_of_the_object_counts_not_its_rim_nor_its_ground() -> None:
    image = np.full((20, 20, 3), 255, np.uint8)
    mask = np.zeros((20, 20), np.bool_)
    mask[4:12, 4:12] = True
    image[mask] = (0, 0, 255)
    image[5:11, 5:11] = (255, 0, 0)
    box = (4.0, 4.0, 12.0, 12.0)
    masked, unmasked = Detection("cat", 1.0, box, mask), Detection("cat", 1.0, box)
    thin = np.zeros((20, 20), np.bool_)
    thin[4, 4:12] = True
    rim = Detection("cat", 1.0, (4.0, 4.0, 12.0, 5.0), thin)
    assert PixelColours().name_colours(image, [masked, unmasked, rim]) == ["red", "red", "blue"]


def test_a_cut_out_lies_on_flat_grey() -> None:
    image = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    mask = np.zeros((6, 8), np.bool_)
    mask[2, 3] = mask[4, 5] = True
    cut = cut_out(image, Detection("cat", 1.0, (3.0, 2.0, 6.0, 5.0), mask))
    assert cut.shape == (3, 3, 3)
    assert cut[0, 0].tolist() == image[2, 3].tolist()
    assert cut[2, 2].tolist() == image[4, 5].tolist()
    assert cut[0, 1].tolist() == list(BLANK) == [153, 153, 153]
    plain = cut_out(image, Detection("cat", 1.0, (3.0, 2.0, 6.0, 5.0)))
    assert plain.tolist() == image[2:5, 3:6].tolist()


def test_clip_takes_the_colour_whose_mean_sentence_is_nearest() -> None:
    config = ClipColourConfig(path=clip_folder())
    colours = make_colours(config)
    assert isinstance(colours, ClipColours)
    assert colours.fingerprint == ""
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    boxes = [(0.0, 0.0, 20.0, 20.0), (10.0, 5.0, 40.0, 30.0), (3.0, 3.0, 9.0, 39.0)]
    seen = [Detection(name, 1.0, box) for name, box in zip(("tv", "cat", "tv"), boxes, strict=True)]

    clip = ClipModel(clip_folder())
    expected: list[str] = []
    for one in seen:
        (picture,) = clip.embed_images([cut_out(image, one)])
        scores: list[float] = []
        for colour in COLOURS:
            mean = sum(
                clip.embed_texts([text])[0]
                for text in (
                    f"a photo of a {colour} {one.name}",
                    f"a photo of a {colour}-colored {one.name}",
                    f"a photo of a {colour} object",
                )
            )
            scores.append(float(picture @ mean / np.linalg.norm(mean)))
        expected.append(COLOURS[int(np.argmax(scores))])
    assert colours.name_colours(image, seen) == expected
    assert [colours.name_colours(image, [one])[0] for one in seen] == expected
    assert colours.name_colours(image, []) == []
    np.testing.assert_allclose(np.linalg.norm(colours._classifier("tv"), axis=1), 1.0, rtol=1e-5)
    assert colours.fingerprint == clip.fingerprint != ""
