"""How bright a picture is, without a model: the mean of its luminance.

As a reward it is the plainest one that can be hacked: any picture becomes brighter by becoming white. It is here to
show what a guard sees, and to watch beside other rewards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from rewards.base import RewardConfig
from rewards.pixels import PixelStatistic

if TYPE_CHECKING:
    import numpy as np

RULE_VERSION = "1"


class BrightnessConfig(RewardConfig):
    """Mean luminance."""

    is_light: ClassVar[bool] = True
    type: Literal["brightness"] = "brightness"


class BrightnessReward(PixelStatistic):
    """See `brightness`."""

    def __init__(self, config: BrightnessConfig) -> None:
        super().__init__(config, RULE_VERSION, brightness)


def brightness(image_HWC: np.ndarray) -> float:
    """Mean of Y = (0.299 R + 0.587 G + 0.114 B) / 255 over pixels, in [0, 1], for RGB uint8 (H, W, 3); ITU-R BT.601."""
    import numpy as np

    return min(1.0, float((image_HWC.astype(np.float64) @ np.array([0.299, 0.587, 0.114])).mean()) / 255.0)
