"""ImageReward: which picture people would prefer for a prompt (Xu et al. 2023, arXiv 2304.05977), about -2 to 2.

(head(BLIP(prompt, picture)) - 0.16717) / 1.03334, the mean and deviation over the authors' data. Each prompt meets its
own picture only; peers that compute every pair and keep the diagonal get the same numbers for the square of the cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from raylign.types import Prompt, RewardSample, RewardScore
from rewards.base import Modality
from rewards.vision import learned
from rewards.vision.blip import ImageRewardModel
from rewards.vision.learned import LearnedConfig, Rating

RULE_VERSION = "1"
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
"""As in THUDM/ImageReward, ImageReward/ImageReward.py."""


class ImageRewardConfig(LearnedConfig):
    """Standardised preference for the picture, given the prompt."""

    type: Literal["imagereward"] = "imagereward"
    path: str = "THUDM/ImageReward/ImageReward.pt"
    """The weights: a file, or owner/repository/file on the model hub."""
    config_path: str = "THUDM/ImageReward/med_config.json"
    """The text encoder's architecture, likewise."""
    tokenizer_path: str = "google-bert/bert-base-uncased"
    """BERT's tokenizer: a directory, or a name on the model hub."""


class ImageRewardReward:
    """Higher is better; prompts beyond 35 tokens are cut, and `details.truncated` says so."""

    modality: Modality = "image"
    range: tuple[float, float] | None = None
    higher_is_better = True
    deterministic = True
    uses_seed = False
    metadata_keys: Mapping[str, str] = {}

    def __init__(self, config: ImageRewardConfig) -> None:
        self.name = config.name
        self.version = config.version(RULE_VERSION)
        self._model = ImageRewardModel(
            config.path, config.config_path, config.tokenizer_path, config.device, config.dtype, config.batch_size
        )

    @property
    def fingerprint(self) -> str:
        return self._model.fingerprint

    def load(self) -> None:
        self._model.load()

    def probe(self) -> RewardSample:
        return learned.probe()

    def check(self, prompt: Prompt) -> None:
        learned.check_prompt(prompt)

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        return await learned.rate(self, samples, learned.prompt_problem, self._rate)

    def _rate(self, samples: Sequence[RewardSample]) -> list[Rating]:
        texts = [sample.prompt.text for sample in samples]
        return [
            ((value - MEAN) / DEVIATION, {"truncated": self._model.is_truncated(text)})
            for text, value in zip(texts, self._model.rate(texts, learned.pictures(samples)), strict=True)
        ]
