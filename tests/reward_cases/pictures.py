"""Rewards that look at a picture with what the wheels bring."""

import numpy as np

from raylign.types import Prompt, RewardSample
from rewards import JpegConfig, OcrConfig
from tests.reward_cases.case import SIGN, Case

BLACK = np.zeros((24, 80, 3), np.uint8)


def noise(count: int) -> list[RewardSample]:
    """Pictures of noise for one prompt."""
    images = np.random.default_rng(0).integers(0, 256, (count, 24, 80, 3), dtype=np.uint8)
    return [RewardSample(f"s{i}", SIGN, image) for i, image in enumerate(images)]


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
CASES = [
    Case(OcrConfig(), noise, [*BAD_PICTURES, *BAD_TARGETS]),
    Case(JpegConfig(), noise, BAD_PICTURES),
]
