"""LAION's improved aesthetic predictor: how people would rate the look of a picture, about 1 to 10.

Five linear layers on the CLIP ViT-L/14 vector of the picture, scaled to length 1. The prompt plays no part. Weights:
`sac+logos+ava1-l14-linearMSE.pth` of christophschuhmann/improved-aesthetic-predictor.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Literal

from raylign.types import Prompt, RewardSample, RewardScore
from rewards import base
from rewards.base import Modality
from rewards.vision import checkpoints, learned
from rewards.vision.clip_model import ClipModel
from rewards.vision.learned import LearnedConfig, LinearHead, Rating

RULE_VERSION = "1"
_REMEDY = (
    "download sac+logos+ava1-l14-linearMSE.pth from github.com/christophschuhmann/improved-aesthetic-predictor "
    "and give its path as head_path"
)


class AestheticConfig(LearnedConfig):
    """A rating of the picture's look."""

    type: Literal["aesthetic"] = "aesthetic"
    path: str = "openai/clip-vit-large-patch14"
    """CLIP ViT-L/14: a directory in the layout of transformers, or a name on the model hub."""
    head_path: str = "sac+logos+ava1-l14-linearMSE.pth"
    """The predictor's own weights: a file, or owner/repository/file on the model hub."""


class AestheticReward:
    """Higher is better; nothing stops a policy from trading the prompt for looks, so pair it with a reward that
    reads the prompt."""

    modality: Modality = "image"
    range: tuple[float, float] | None = None
    higher_is_better = True
    deterministic = True
    uses_seed = False
    metadata_keys: Mapping[str, str] = {}

    def __init__(self, config: AestheticConfig) -> None:
        self.name = config.name
        self.version = config.version(RULE_VERSION)
        self.fingerprint = ""
        self._head_path = config.head_path
        self._clip = ClipModel(config.path, config.device, config.dtype, batch_size=config.batch_size)
        self._lock = threading.Lock()
        self._head: LinearHead | None = None

    def load(self) -> None:
        self._loaded()

    def probe(self) -> RewardSample:
        return learned.probe()

    def check(self, prompt: Prompt) -> None:
        """Any prompt will do."""

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        return await learned.rate(self, samples, base.image_problem, self._rate)

    def _rate(self, samples: Sequence[RewardSample]) -> list[Rating]:
        head = self._loaded()
        return [(head(image_D), {}) for image_D in self._clip.embed_images(learned.pictures(samples))]

    def _loaded(self) -> LinearHead:
        with self._lock:
            if self._head is None:
                file = checkpoints.find_file(self._head_path, _REMEDY)
                head = LinearHead(file, checkpoints.read_state(file), self._clip.size)
                self.fingerprint = checkpoints.join_hashes(self._clip.fingerprint, checkpoints.hash_files([file]))
                self._head = head
            return self._head
