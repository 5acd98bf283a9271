"""How much of a picture is in the plain colours of the shapes task: what is left is smears, haze and colours between.

A statistic to watch beside the geometric checker, which looks at shapes and not at what lies around them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rewards.base import RewardConfig
from rewards.pixels import PixelStatistic

if TYPE_CHECKING:
    import numpy as np

RULE_VERSION = "1"


class PaletteConfig(RewardConfig):
    """The share of pixels in the background's colour or one of the palette."""

    is_light: ClassVar[bool] = True
    type: Literal["palette"] = "palette"
    tolerance: float = Field(default=32.0, gt=0)
    """Greatest distance in RGB space, of 441, at which a pixel still has a colour."""


class PaletteReward(PixelStatistic):
    """See `palette_share`."""

    def __init__(self, config: PaletteConfig) -> None:
        share = partial(palette_share, tolerance=config.tolerance)
        super().__init__(config, f"{RULE_VERSION}/{config.tolerance:g}", share)


def palette_share(image_HWC: np.ndarray, tolerance: float) -> float:
    """Share of pixels within `tolerance` of the background or of a colour of the shapes task, in [0, 1].

    RGB uint8 (H, W, 3); distances are Euclidean. The background is the median of the picture's outermost pixels, which
    shapes never touch.
    """
    import numpy as np

    from raylign.pretrain.shape_pictures import COLOURS

    pixels_NC = image_HWC.reshape(-1, 3).astype(np.float32)
    edge_NC = np.concatenate([image_HWC[0], image_HWC[-1], image_HWC[:, 0], image_HWC[:, -1]])
    colours = np.array([*COLOURS.values(), np.median(edge_NC, axis=0)], np.float32)
    nearest_N = np.min([((pixels_NC - colour) ** 2).sum(axis=1) for colour in colours], axis=0)
    return float((nearest_N <= tolerance**2).mean())
