"""PickScore v1: which picture people would pick for a prompt (Kirstain et al. 2023, arXiv 2305.01569).

exp(logit_scale) * cos(text, image) with the scale that the checkpoint learned; peers divide by 26, which brings
scores to about 0.8 to 1. Preprocessing and tokenizer are those of the CLIP ViT-H-14 it was trained from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from raylign.types import Prompt, RewardSample, RewardScore
from rewards.base import Modality
from rewards.vision import learned
from rewards.vision.clip_model import ClipModel
from rewards.vision.learned import LearnedConfig, Rating

RULE_VERSION = "1"


class PickScoreConfig(LearnedConfig):
    """Scaled cosine of the prompt and the picture under PickScore's weights."""

    type: Literal["pickscore"] = "pickscore"
    path: str = "yuvalkirstain/PickScore_v1"
    """The weights: a directory in the layout of transformers, or a name on the model hub."""
    processor_path: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Tokenizer and preprocessing, likewise."""
    scale: Literal["raw", "over_26"] = "over_26"
    """raw: about 16 to 26. over_26: divided by 26, as flow_grpo, DiffusionNFT and verl-omni do."""


class PickScoreReward:
    """Higher is better; prompts beyond the model's 77 tokens are cut, and `details.truncated` says so."""

    modality: Modality = "image"
    range: tuple[float, float] | None = None
    higher_is_better = True
    deterministic = True
    uses_seed = False
    metadata_keys: Mapping[str, str] = {}

    def __init__(self, config: PickScoreConfig) -> None:
        self.name = config.name
        self.version = config.version(f"{RULE_VERSION}/{config.scale}")
        self._divisor = 26.0 if config.scale == "over_26" else 1.0
        self._clip = ClipModel(config.path, config.device, config.dtype, config.processor_path, config.batch_size)

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
        factor = self._clip.logit_scale / self._divisor
        return [
            (factor * cosine, {"cosine": cosine, **details})
            for cosine, details in learned.cosines(self._clip, samples, learned.pictures(samples))
        ]
