"""A reward in twenty lines: how blue a picture is. docs/own_reward.md says how a run comes to train on it.

    python examples/custom_reward.py docs/images/sign.png

Everything above the line of dashes is what goes into `rewards/blue.py`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from rewards.base import RewardConfig
from rewards.pixels import PixelStatistic


class BlueConfig(RewardConfig):
    """Mean share of blue in the colour of a pixel."""

    type: Literal["blue"] = "blue"


class BlueReward(PixelStatistic):
    """Blue over the sum of red, green and blue; black pixels count as grey."""

    def __init__(self, config: BlueConfig) -> None:
        super().__init__(config, "1", blueness)


def blueness(image_HWC: np.ndarray) -> float:
    """Of an RGB uint8 picture, in [0, 1]."""
    colour_HWC = image_HWC.astype(np.float64) + 1
    return float((colour_HWC[..., 2] / colour_HWC.sum(axis=-1)).mean())


# ----------------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    import asyncio
    import sys

    from PIL import Image

    from raylign.types import Prompt, RewardSample
    from rewards.mix import RewardMix

    config = BlueConfig()
    mix = RewardMix([(config, BlueReward(config))])
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in sys.argv[1:]]
    samples = [RewardSample(str(place), Prompt("p", "blue"), image) for place, image in enumerate(pictures)]
    for path, breakdown in zip(sys.argv[1:], asyncio.run(mix.score(samples)), strict=True):
        print(f"{breakdown.total:.3f}  {path}")
