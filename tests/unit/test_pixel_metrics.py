"""The statistics of pixels: sharpness, brightness and palette, by hand and on drawings."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
from PIL import Image, ImageFilter
from pydantic import ValidationError

from raylign.pretrain.glyph_pictures import render_clean
from raylign.pretrain.shape_pictures import BACKGROUND, COLOURS, JITTER, Group, compose, render
from raylign.types import Prompt, RewardSample
from rewards import PaletteConfig, PaletteReward
from rewards.brightness import brightness
from rewards.palette import palette_share
from rewards.sharpness import sharpness

RNG = np.random.default_rng(0)


def blurred(image_HWC: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(image_HWC).filter(ImageFilter.GaussianBlur(radius)))


def noisy(image_HWC: np.ndarray, std: float) -> np.ndarray:
    return (image_HWC + RNG.normal(0, std, image_HWC.shape)).round().clip(0, 255).astype(np.uint8)


def grey(*rows: list[int]) -> np.ndarray:
    return np.repeat(np.array(rows, np.uint8)[..., None], 3, axis=2)


def test_sharpness_by_hand() -> None:
    # Differences right/down of [[0, 255], [255, 255]]: (1, 1), (0, 0), (0, 0), (0, 0); |(1, 1)| = sqrt 2.
    assert sharpness(grey([0, 255], [255, 255])) == pytest.approx(1 / 4)
    # [[0, 255], [0, 255]]: (1, 0), (0, 0), (1, 0), (0, 0): two of length 1 among four pixels.
    assert sharpness(grey([0, 255], [0, 255])) == pytest.approx(2 / 4 / math.sqrt(2))
    # One column has no neighbours to the right: 0 -> 51 is 0.2.
    assert sharpness(grey([0], [51])) == pytest.approx(0.1 / math.sqrt(2))


def test_brightness_by_hand() -> None:
    # A red, a green, a blue and a white pixel: (0.299 + 0.587 + 0.114 + 1) / 4.
    pixels = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    assert brightness(pixels) == pytest.approx(0.5)
    assert brightness(np.zeros((3, 5, 3), np.uint8)) == 0.0
    assert brightness(np.full((3, 5, 3), 255, np.uint8)) == pytest.approx(1.0)
    assert brightness(np.full((3, 5, 3), 255, np.uint8)) <= 1.0


def test_a_channel_counts_by_its_luminance() -> None:
    shares = []
    for channel in range(3):
        image = np.zeros((1, 2, 3), np.uint8)
        image[0, 1, channel] = 255
        shares.append(sharpness(image) * 2 * math.sqrt(2))
    assert shares == pytest.approx([0.299, 0.587, 0.114])


@pytest.mark.parametrize("level", [0, 7, 255])
def test_a_flat_picture_is_not_sharp_at_all(level: int) -> None:
    assert sharpness(np.full((5, 9, 3), level, np.uint8)) == 0.0


def test_a_chequerboard_is_the_sharpest_and_in_range() -> None:
    board = grey(*[[255 * ((x + y) % 2) for x in range(40)] for y in range(40)])
    assert 0.95 < sharpness(board) <= 1.0


def test_blur_lowers_sharpness_and_noise_raises_it() -> None:
    sign = render_clean("KITE", "blue")
    assert sharpness(blurred(sign, 2.0)) < sharpness(blurred(sign, 1.0)) < sharpness(sign)
    assert sharpness(sign) < sharpness(noisy(sign, 20)) < sharpness(noisy(sign, 40))


def drawings(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [render(compose(rng, [Group("square", 2), Group("star", 1, "red")], 48, 48)) for _ in range(count)]


def test_clean_drawings_are_in_the_palette_and_smears_are_not() -> None:
    for clean in drawings(20):
        share = palette_share(clean, 32.0)
        assert share > 0.92
        assert palette_share(blurred(clean, 2.0), 32.0) < share - 0.05
        assert palette_share(noisy(clean, 40.0), 32.0) < 0.5


def test_palette_by_hand() -> None:
    picture = np.full((6, 6, 3), BACKGROUND, np.uint8)
    picture[2, 2] = COLOURS["red"]
    picture[2, 3] = np.add(COLOURS["blue"], (JITTER, -JITTER, JITTER))  # still the blue of the task
    picture[3, 2] = np.add(COLOURS["red"], BACKGROUND) // 2
    picture[3, 3] = (0, 255, 255)
    assert palette_share(picture, 32.0) == pytest.approx(34 / 36)
    assert palette_share(picture, 500.0) == 1.0
    picture[2, 3] = np.add(COLOURS["blue"], (33, 0, 0))
    assert palette_share(picture, 32.0) == pytest.approx(33 / 36)
    assert palette_share(picture, 33.0) == pytest.approx(34 / 36), "the tolerance is inclusive"


def test_the_background_is_the_pictures_own() -> None:
    picture = np.full((6, 6, 3), (0, 200, 200), np.uint8)
    assert palette_share(picture, 1.0) == 1.0
    picture[0, 2:4] = (0, 255, 200)  # a few strange pixels at the edge do not move it
    assert palette_share(picture, 1.0) == pytest.approx(34 / 36)


def test_the_configured_tolerance_is_used_and_part_of_the_version() -> None:
    picture = np.full((6, 6, 3), BACKGROUND, np.uint8)
    picture[2, 2] = np.subtract(COLOURS["red"], (20, 0, 0))
    strict, lax = (PaletteReward(PaletteConfig(tolerance=tolerance)) for tolerance in (10.0, 32.0))
    assert strict.version != lax.version
    sample = RewardSample("s", Prompt("p", "a red square"), picture)
    values = [asyncio.run(reward.score([sample]))[0].value for reward in (strict, lax)]
    assert values == pytest.approx([35 / 36, 1.0])
    with pytest.raises(ValidationError, match="greater than 0"):
        PaletteConfig(tolerance=0)
