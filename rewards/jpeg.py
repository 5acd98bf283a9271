"""JPEG size as a reward: a toy without a model, for tests and first runs (DDPO's compressibility task).

In kilobytes at quality 95: `incompress` is the size, `compress` is -size/500, the scales that peers use.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from raylign.types import Prompt, RewardSample, RewardScore
from rewards import base
from rewards.base import Modality, RewardConfig

if TYPE_CHECKING:
    import numpy as np

RULE_VERSION = "1"


class JpegConfig(RewardConfig):
    """The size of the picture as a JPEG file."""

    type: Literal["jpeg"] = "jpeg"
    direction: Literal["compress", "incompress"] = "compress"
    """compress rewards small files, incompress large ones."""
    quality: int = Field(default=95, ge=1, le=95)
    """JPEG quality; 95 is what peers report."""


class JpegReward:
    """Higher is better in either direction; the prompt plays no part."""

    modality: Modality = "image"
    range: tuple[float, float] | None = None
    higher_is_better = True
    deterministic = True
    uses_seed = False
    fingerprint = ""
    metadata_keys: Mapping[str, str] = {}

    def __init__(self, config: JpegConfig) -> None:
        from PIL import __version__ as pillow_version

        self.name = config.name
        self._direction = config.direction
        self._quality = config.quality
        self.version = f"{RULE_VERSION}/{config.direction}/q{config.quality}/pillow-{pillow_version}"

    def load(self) -> None:
        """Nothing to build."""

    def probe(self) -> RewardSample:
        import numpy as np

        return RewardSample("probe", Prompt("probe", ""), np.zeros((8, 8, 3), np.uint8))

    def check(self, prompt: Prompt) -> None:
        """Any prompt will do."""

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        return await asyncio.to_thread(lambda: [self._score_one(sample) for sample in samples])

    def _score_one(self, sample: RewardSample) -> RewardScore:
        problem = base.image_problem(sample)
        if problem is not None or sample.image_HWC is None:
            return base.failure(self, "invalid_input", problem or "the sample has no image")
        started = time.perf_counter()
        kilobytes = jpeg_bytes(sample.image_HWC, self._quality) / 1000
        value = kilobytes if self._direction == "incompress" else -kilobytes / 500
        return base.success(self, value, time.perf_counter() - started, {"kilobytes": kilobytes})


def jpeg_bytes(image_HWC: np.ndarray, quality: int) -> int:
    """Size of an RGB uint8 picture as a JPEG file, bytes; Pillow's other settings at their defaults."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="JPEG", quality=quality)
    return buffer.tell()
