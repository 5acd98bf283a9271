"""Human Preference Score v2 and v2.1: which picture people would prefer for a prompt (Wu et al. 2023, 2306.09341).

The plain cosine of prompt and picture under a CLIP ViT-H-14 tuned on preferences, about 0.2 to 0.35. The weights are
one file in open_clip's layout; architecture and tokenizer come from the model it was tuned from. Pictures are
prepared as in tgxs002/HPSv2: the longer side to 224 pixels, black at both ends of the shorter one. The published code
resizes float tensors, we resize 8-bit pictures with Pillow's antialiased bicubic filter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from raylign.types import Prompt, RewardSample, RewardScore
from rewards.base import Modality
from rewards.vision import learned
from rewards.vision.clip_model import ClipModel
from rewards.vision.learned import LearnedConfig, Rating

if TYPE_CHECKING:
    import numpy as np

RULE_VERSION = "1"


class HpsConfig(LearnedConfig):
    """Cosine of the prompt and the picture under HPSv2's weights."""

    type: Literal["hps"] = "hps"
    path: str = "xswu/HPSv2/HPS_v2.1_compressed.pt"
    """The weights: a file, or owner/repository/file on the model hub. HPS_v2_compressed.pt is version 2.0."""
    base_path: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Architecture, tokenizer and preprocessing: a directory in the layout of transformers, or a name on the hub."""
    fit: Literal["letterbox", "crop"] = "letterbox"
    """letterbox: the whole picture with black borders, as published. crop: its middle square."""


class HpsReward:
    """Higher is better; prompts beyond the model's 77 tokens are cut, and `details.truncated` says so."""

    modality: Modality = "image"
    range: tuple[float, float] | None = (-1.0, 1.0)
    higher_is_better = True
    deterministic = True
    uses_seed = False
    metadata_keys: Mapping[str, str] = {}

    def __init__(self, config: HpsConfig) -> None:
        self.name = config.name
        self.version = config.version(f"{RULE_VERSION}/{config.fit}")
        self._letterbox = config.fit == "letterbox"
        self._clip = ClipModel(config.path, config.device, config.dtype, config.base_path, config.batch_size)

    @property
    def fingerprint(self) -> str:
        return self._clip.fingerprint

    def load(self) -> None:
        self._clip.load()

    def probe(self) -> RewardSample:
        return learned.probe()

    def check(self, prompt: Prompt) -> None:
        learned.check_prompt(prompt)

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        return await learned.rate(self, samples, learned.prompt_problem, self._rate)

    def _rate(self, samples: Sequence[RewardSample]) -> list[Rating]:
        images_HWC = learned.pictures(samples)
        if self._letterbox:
            images_HWC = [letterbox(image_HWC, self._clip.image_size) for image_HWC in images_HWC]
        return learned.cosines(self._clip, samples, images_HWC)


def letterbox(image_HWC: np.ndarray, side: int) -> np.ndarray:
    """The whole RGB picture in a square of `side` pixels, in its middle, on black."""
    import numpy as np
    from PIL import Image

    height, width = image_HWC.shape[:2]
    scale = side / max(height, width)
    new_height, new_width = (max(1, round(extent * scale)) for extent in (height, width))
    small = Image.fromarray(image_HWC).resize((new_width, new_height), Image.Resampling.BICUBIC)
    square_HWC = np.zeros((side, side, 3), np.uint8)
    top, left = (side - new_height) // 2, (side - new_width) // 2
    square_HWC[top : top + new_height, left : left + new_width] = np.asarray(small)
    return square_HWC
