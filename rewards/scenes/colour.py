"""Who names an object's colour: CLIP, as the official evaluation does, or the object's pixels, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from pydantic import Field

from raylign.config import Config
from rewards.scenes.rules import Detection
from rewards.scenes.task import COLOURS
from rewards.vision import checkpoints

if TYPE_CHECKING:
    import numpy.typing as npt

VERSION = "1"
"""Counts changes to how a colour is named."""
TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
"""djghosh13/geneval:evaluation/evaluate_images.py at af4902f."""
BLANK = (0x99, 0x99, 0x99)
"""What surrounds an object in the picture that CLIP sees."""

ANCHORS: Mapping[str, Sequence[tuple[int, int, int]]] = {
    "red": [(255, 0, 0), (215, 38, 38), (220, 20, 60), (178, 34, 34), (139, 0, 0)],
    "orange": [(255, 165, 0), (255, 140, 0), (240, 135, 25), (215, 133, 50), (210, 105, 30), (255, 127, 80)],
    "yellow": [(255, 255, 0), (255, 215, 0), (245, 220, 45), (240, 230, 140), (200, 180, 20)],
    "green": [(0, 255, 0), (40, 150, 60), (0, 100, 0), (107, 142, 35), (144, 238, 144), (46, 139, 87), (173, 255, 47)],
    "blue": [
        (0, 0, 255),
        (40, 80, 210),
        (65, 92, 190),
        (25, 25, 112),
        (0, 0, 128),
        (30, 144, 255),
        (135, 206, 235),
        (70, 130, 180),
    ],
    "purple": [(128, 0, 128), (125, 45, 165), (75, 0, 130), (148, 0, 211), (147, 112, 219)],
    "pink": [(255, 192, 203), (250, 150, 195), (255, 105, 180), (255, 20, 147)],
    "brown": [(139, 69, 19), (118, 70, 34), (160, 82, 45), (92, 51, 23), (60, 35, 20), (205, 133, 63), (200, 170, 125)],
    "black": [(0, 0, 0), (45, 45, 45)],
    "white": [(255, 255, 255), (215, 215, 215)],
}
"""Light, dark, vivid and dull examples of every colour, most of them CSS colours, and those of the shapes world."""


class ColourNamer(Protocol):
    """Names the colours of objects in one picture."""

    @property
    def version(self) -> str:
        """Changes whenever equal objects may be named differently."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the model files, known after `load`; empty without any."""
        ...

    def load(self) -> None:
        """Build what is slow to build."""
        ...

    def name_colours(self, image_HWC: npt.NDArray[np.uint8], detections: Sequence[Detection]) -> list[str]:
        """One of the ten colours for each object."""
        ...


class PixelColourConfig(Config):
    """The middle colour of an object's pixels, named by the nearest example in CIELAB."""

    type: Literal["pixels"] = "pixels"


class ClipColourConfig(Config):
    """The colour whose sentences are nearest to the object's cut-out in CLIP's space."""

    type: Literal["clip"] = "clip"
    path: str = "openai/clip-vit-large-patch14"
    """CLIP checkpoint: a directory in the layout of transformers, or a name on the model hub."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda or cuda:1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the model; near ties may fall the other way in bfloat16."""
    batch_size: int = Field(default=1, ge=1)
    """Cut-outs per pass."""


class PixelColours:
    """Needs neither download nor model; meant for plainly coloured objects."""

    version = f"pixels-{VERSION}"
    fingerprint = ""

    def load(self) -> None:
        _anchors()

    def name_colours(self, image_HWC: npt.NDArray[np.uint8], detections: Sequence[Detection]) -> list[str]:
        return [nearest_colour(np.median(_inner_pixels(image_HWC, one), axis=0)) for one in detections]


class ClipColours:
    """Zero-shot: per class and colour the mean of the three sentences' unit vectors, brought to length 1."""

    def __init__(self, config: ClipColourConfig) -> None:
        from rewards.vision.clip_model import ClipModel

        self._clip = ClipModel(config.path, config.device, config.dtype, batch_size=config.batch_size)
        self._classifiers: dict[str, npt.NDArray[np.float32]] = {}
        place = f"{config.dtype}-{config.device.partition(':')[0]}-b{config.batch_size}"
        libraries = checkpoints.library_versions("torch", "transformers", "tokenizers", "pillow")
        self.version = f"clip-{VERSION}-{place}/{libraries}"

    @property
    def fingerprint(self) -> str:
        return self._clip.fingerprint

    def load(self) -> None:
        self._clip.load()

    def name_colours(self, image_HWC: npt.NDArray[np.uint8], detections: Sequence[Detection]) -> list[str]:
        if not detections:
            return []
        images_ND = self._clip.embed_images([cut_out(image_HWC, detection) for detection in detections])
        return [
            COLOURS[int(np.argmax(self._classifier(detection.name) @ image_D))]
            for detection, image_D in zip(detections, images_ND, strict=True)
        ]

    def _classifier(self, name: str) -> npt.NDArray[np.float32]:
        if name not in self._classifiers:
            self._classifiers[name] = np.stack([self._direction(colour, name) for colour in COLOURS])
        return self._classifiers[name]

    def _direction(self, colour: str, name: str) -> npt.NDArray[np.float32]:
        texts = [template.format(colour=colour, name=name) for template in TEMPLATES]
        mean_D = self._clip.embed_texts(texts).mean(axis=0)
        return mean_D / np.linalg.norm(mean_D)


def make_colours(config: PixelColourConfig | ClipColourConfig) -> ColourNamer:
    """The namer that a configuration describes."""
    return ClipColours(config) if isinstance(config, ClipColourConfig) else PixelColours()


def cut_out(image_HWC: npt.NDArray[np.uint8], detection: Detection) -> npt.NDArray[np.uint8]:
    """The object over flat grey, cropped to its box; without a mask the box as it is."""
    if detection.mask_HW is not None:
        image_HWC = np.where(detection.mask_HW[..., None], image_HWC, np.asarray(BLANK, np.uint8))
    left, top, right, bottom = (max(round(edge), 0) for edge in detection.box)
    return np.ascontiguousarray(image_HWC[top : max(bottom, top + 1), left : max(right, left + 1)])


def nearest_colour(colour: npt.ArrayLike) -> str:
    """The name of an sRGB colour (0 to 255): that of the nearest example in CIELAB."""
    names, anchors_ND = _anchors()
    distances = np.linalg.norm(anchors_ND - _to_lab(np.asarray([colour], np.float32)), axis=1)
    return names[int(np.argmin(distances))]


def _inner_pixels(image_HWC: npt.NDArray[np.uint8], detection: Detection) -> npt.NDArray[np.uint8]:
    """The object's pixels that are no rim, as long as there are some."""
    import cv2

    if detection.mask_HW is None:
        left, top, right, bottom = (round(edge) for edge in detection.box)
        return image_HWC[top:bottom, left:right].reshape(-1, 3)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inner = cv2.erode(detection.mask_HW.astype(np.uint8), cross, borderValue=0) > 0
    return image_HWC[inner if inner.sum() >= 4 else detection.mask_HW]


@cache
def _anchors() -> tuple[list[str], npt.NDArray[np.float32]]:
    names = [name for name in COLOURS for _ in ANCHORS[name]]
    return names, _to_lab(np.asarray([colour for name in COLOURS for colour in ANCHORS[name]], np.float32))


def _to_lab(colours_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """sRGB from 0 to 255 → CIELAB, D65."""
    import cv2

    return np.asarray(cv2.cvtColor(colours_ND[None] / 255, cv2.COLOR_RGB2LAB)[0], np.float32)
