"""How sharp a picture is, without a model: the mean gradient of its luminance.

A statistic to watch beside a reward, not to maximise: blur lowers it, noise and ringing raise it as much as edges do.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from rewards.base import RewardConfig
from rewards.pixels import PixelStatistic

if TYPE_CHECKING:
    import numpy as np

RULE_VERSION = "1"


class SharpnessConfig(RewardConfig):
    """Mean gradient magnitude of the luminance."""

    is_light: ClassVar[bool] = True
    type: Literal["sharpness"] = "sharpness"


class SharpnessReward(PixelStatistic):
    """See `sharpness`."""

    def __init__(self, config: SharpnessConfig) -> None:
        super().__init__(config, RULE_VERSION, sharpness)


def sharpness(image_HWC: np.ndarray) -> float:
    """Mean over pixels of |∇Y| / √2 in [0, 1], for RGB uint8 (H, W, 3); ∇ by forward differences, 0 at the far edges.

    Y = (0.299 R + 0.587 G + 0.114 B) / 255, the luminance of ITU-R BT.601. A flat picture has 0, and a picture whose
    every pixel differed fully from its right and its lower neighbour would have 1.
    """
    import numpy as np

    luminance_HW = image_HWC.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255.0
    across_HW = np.diff(luminance_HW, axis=1, append=luminance_HW[:, -1:])
    down_HW = np.diff(luminance_HW, axis=0, append=luminance_HW[-1:])
    return min(1.0, float(np.hypot(across_HW, down_HW).mean()) / math.sqrt(2.0))
