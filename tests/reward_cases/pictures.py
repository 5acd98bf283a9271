"""Rewards that look at a picture with what the wheels bring."""

import numpy as np

from raylign.pretrain.glyph_pictures import COLOURS, random_target, render_clean
from raylign.types import Prompt, RewardSample
from rewards import BrightnessConfig, GlyphPixelsConfig, JpegConfig, OcrConfig, PaletteConfig, SharpnessConfig
from tests.reward_cases.case import SIGN, Case

BLACK = np.zeros((24, 80, 3), np.uint8)


def noise(count: int) -> list[RewardSample]:
    """Pictures of noise for one prompt."""
    images = np.random.default_rng(0).integers(0, 256, (count, 24, 80, 3), dtype=np.uint8)
    return [RewardSample(f"s{i}", SIGN, image) for i, image in enumerate(images)]


def signs(count: int) -> list[RewardSample]:
    """Clean pictures of the glyphs task."""
    rng = np.random.default_rng(0)
    targets = [random_target(rng, 0.5, frozenset()) for _ in range(count)]
    return [
        RewardSample(f"s{i}", Prompt("p", f'a {colour} sign that says "{target}"'), render_clean(target, colour))
        for i, (target, colour) in enumerate(zip(targets, list(COLOURS) * count, strict=False))
    ]


BAD_PICTURES = [
    RewardSample("nothing", SIGN),
    RewardSample("grey", SIGN, np.zeros((24, 80), np.uint8)),
    RewardSample("float", SIGN, np.zeros((24, 80, 3), np.float32)),
    RewardSample("empty", SIGN, np.zeros((0, 0, 3), np.uint8)),
    RewardSample("sliver", SIGN, np.zeros((1, 5000, 3), np.uint8)),
    RewardSample("two", SIGN, BLACK, more_images_HWC=(BLACK,)),
]
BAD_TARGETS = [
    RewardSample("no quotes", Prompt("q", "a sign"), BLACK),
    RewardSample("empty prompt", Prompt("q", ""), BLACK),
    RewardSample("metadata", Prompt("r", 'a "x"', {"target": [1, None]}), BLACK),
]
OTHER_SIZE = RewardSample("other size", SIGN, np.zeros((24, 96, 3), np.uint8))
CASES = [
    Case(OcrConfig(), noise, [*BAD_PICTURES, *BAD_TARGETS]),
    Case(JpegConfig(), noise, BAD_PICTURES),
    Case(SharpnessConfig(), noise, BAD_PICTURES),
    Case(BrightnessConfig(), noise, BAD_PICTURES),
    Case(PaletteConfig(), noise, BAD_PICTURES),
    Case(GlyphPixelsConfig(), signs, [*BAD_PICTURES, *BAD_TARGETS, OTHER_SIZE]),
]
