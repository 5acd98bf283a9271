"""The geometric detector of the shapes world: contours by OpenCV, then analysis by synthesis. No model, no download.

What differs from the background is cut into blobs. Each blob is taken for each shape in turn: the blob's area and
centre of mass fix size and place under that hypothesis, the hypothesis is drawn, and drawing and blob are compared
by soft intersection over union. The best hypothesis names the blob; how well it fits is the score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from raylign.config import Config
from rewards.scenes.rules import Detection, box_of
from rewards.vision import checkpoints

if TYPE_CHECKING:
    import numpy.typing as npt

VERSION = "1"
"""Counts changes to what is found or how it is scored."""
MIN_CONTRAST = 36.0
"""RGB distance from the background, of 441, from which a pixel belongs to something. A colour of the palette is at
least twice as far away."""
NOISE_FACTOR = 3.0
"""By as many times the median distance of the edge's own pixels, if that is more: a noisy ground is still ground."""
MIN_AREA = 0.004
"""Smallest blob, as a share of the picture; a star of 8 pixels covers 0.02 of 32x32."""
MIN_PIXELS = 9
WORST_FIT, BEST_FIT = 0.65, 0.79
"""Overlap with the best hypothesis that scores 0, and that scores 1. A drawn shape overlaps its own kind by more than
0.9, and any other kind by less than 0.87."""
MAX_SIDE = 64
"""Pixels; a larger blob is compared at this size."""
UNIT = 128
"""Side in pixels at which a shape's area and centre of mass are measured."""


class ShapesConfig(Config):
    """Plain coloured shapes (circle, square, triangle, …) on a plain background, found by their outlines."""

    type: Literal["shapes"] = "shapes"


class ShapesDetector:
    """Finds the shapes of `raylign.pretrain.shape_pictures`."""

    fingerprint = ""

    def __init__(self) -> None:
        from raylign.pretrain.shape_pictures import outlines

        self.names: Sequence[str] = tuple(outlines())
        self.version = f"shapes-{VERSION}/{checkpoints.library_versions('opencv-python-headless')}"

    def load(self) -> None:
        """Measure the shapes."""
        _measures()

    def detect(self, image_HWC: npt.NDArray[np.uint8], threshold: float) -> list[Detection]:
        """Every blob that fits a shape better than the threshold, at most one detection each."""
        seen = (_name(alpha_HW, left, top, image_HWC.shape[:2]) for alpha_HW, left, top in _blobs(image_HWC))
        return [detection for detection in seen if detection.score > threshold]


def _blobs(image_HWC: npt.NDArray[np.uint8]) -> Iterator[tuple[npt.NDArray[np.float32], int, int]]:
    """How much of each pixel is covered by one thing, cut out with a pixel to spare, and where the cut begins."""
    import cv2

    height, width = image_HWC.shape[:2]
    pixels = image_HWC.astype(np.float32)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(edge, axis=0)
    noise = float(np.median(np.linalg.norm(edge - background, axis=1)))
    offset_HWC = pixels - background
    contrast_HW = np.linalg.norm(offset_HWC, axis=2)
    differs_HW = contrast_HW > max(MIN_CONTRAST, NOISE_FACTOR * noise)
    contours, _ = cv2.findContours(differs_HW.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    smallest = max(MIN_AREA * height * width, MIN_PIXELS)
    for contour in contours:
        left, top, across, down = cv2.boundingRect(contour)
        if across * down < smallest:
            continue
        x0, y0, x1, y1 = max(left - 1, 0), max(top - 1, 0), min(left + across + 1, width), min(top + down + 1, height)
        inside = np.zeros((y1 - y0, x1 - x0), np.uint8)
        cv2.drawContours(inside, [contour], -1, 1, cv2.FILLED, offset=(-x0, -y0))
        if inside.sum() < smallest:
            continue
        # The antialiased rim lies one pixel outside.
        near = cv2.dilate(inside, np.ones((3, 3), np.uint8)) > 0
        part, strength = offset_HWC[y0:y1, x0:x1], contrast_HW[y0:y1, x0:x1]
        full = (inside > 0) & (strength >= 0.9 * np.quantile(strength[inside > 0], 0.9))
        direction = np.median(part[full], axis=0)
        alpha_HW = np.clip(part @ direction / (direction @ direction), 0, 1) * near
        yield alpha_HW.astype(np.float32), x0, y0


def _name(alpha_HW: npt.NDArray[np.float32], left: int, top: int, picture: tuple[int, int]) -> Detection:
    """The shape that a blob fits best, in the picture's coordinates."""
    fits = _fits(alpha_HW)
    name = max(fits, key=lambda name: fits[name])
    score = min(max((fits[name] - WORST_FIT) / (BEST_FIT - WORST_FIT), 0.0), 1.0)
    height, width = alpha_HW.shape
    mask_HW = np.zeros(picture, np.bool_)
    mask_HW[top : top + height, left : left + width] = alpha_HW > 0.5
    return Detection(name, score, box_of(mask_HW), mask_HW)


def _fits(alpha_HW: npt.NDArray[np.float32]) -> dict[str, float]:
    """By shape, the soft intersection over union of a blob with that shape drawn where the blob is."""
    import cv2

    from raylign.pretrain.shape_pictures import coverage

    shrink = MAX_SIDE / max(alpha_HW.shape)
    if shrink < 1:
        alpha_HW = cv2.resize(alpha_HW, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA).astype(np.float32)
    alpha_HW = np.pad(alpha_HW, max(alpha_HW.shape) // 4)  # a wrong shape reaches beyond the blob, and must pay for it
    area, x, y = _moments(alpha_HW)
    fits: dict[str, float] = {}
    for name, (unit_area, unit_x, unit_y) in _measures().items():
        size = (area / unit_area) ** 0.5
        drawn_HW = coverage(name, x - unit_x * size, y - unit_y * size, size, *alpha_HW.shape)
        fits[name] = float(np.minimum(alpha_HW, drawn_HW).sum() / np.maximum(alpha_HW, drawn_HW).sum())
    return fits


def _moments(alpha_HW: npt.NDArray[np.float32]) -> tuple[float, float, float]:
    """Area and centre of mass in pixels."""
    height, width = alpha_HW.shape
    area = float(alpha_HW.sum())
    x = float(alpha_HW.sum(axis=0) @ (np.arange(width) + 0.5)) / area
    y = float(alpha_HW.sum(axis=1) @ (np.arange(height) + 0.5)) / area
    return area, x, y


@cache
def _measures() -> dict[str, tuple[float, float, float]]:
    """Area and centre of mass of every shape at size 1, the centre measured from the middle of its box."""
    from raylign.pretrain.shape_pictures import coverage, outlines

    side = UNIT + 8
    measures: dict[str, tuple[float, float, float]] = {}
    for name in outlines():
        area, x, y = _moments(coverage(name, side / 2, side / 2, UNIT, side, side))
        measures[name] = (area / UNIT**2, (x - side / 2) / UNIT, (y - side / 2) / UNIT)
    return measures
